// What a model wrote, as elements. Text stays text: no part of it is ever read as markup of the page.

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function copyButton(text, label = "Copy") {
  const button = element("button", { type: "button", class: "plain" }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      button.textContent = "Copied";
    } catch {
      button.textContent = "Not allowed";
    }
    setTimeout(() => (button.textContent = label), 1500);
  });
  return button;
}

// Paragraphs, fenced code and `code`. A fence that is still open is code already.
export function blocks(text) {
  return text.split(/^```/m).flatMap((part, i) => {
    if (i % 2 === 0) return part.split(/\n{2,}/).filter((p) => p.trim()).map(paragraph);
    const [, language, code] = part.match(/^([^\n]*)\n?([^]*)$/);
    const head = element("figcaption", {}, element("span", {}, language.trim() || "code"), copyButton(() => code));
    return [element("figure", { class: "code" }, head, element("pre", {}, element("code", {}, code)))];
  });
}

function paragraph(text) {
  const parts = text.trim().split(/`([^`\n]+)`/);
  return element("p", {}, ...parts.map((part, i) => (i % 2 ? element("code", {}, part) : part)));
}
