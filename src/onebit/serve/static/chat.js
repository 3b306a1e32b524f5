// The chat: a conversation, or for models without chat template a text that goes on.

import { ApiError, explain, stream } from "./api.js";
import { blocks, copyButton, element } from "./render.js";
import * as settings from "./settings.js";

const $ = (id) => document.getElementById(id);
const SUGGESTIONS = {
  chat: ["Explain to a child why the sky is blue", "Write a haiku about small numbers", "What is a ternary weight?"],
  story: ["Once upon a time", "The dragon said", "One day, Lily found a box"],
};

let model = null;
// {role, text, body, note, error}: what was said, and where it stands on the page.
let turns = [];
let editing = null;
let running = null;

const isChat = () => model.has_chat_template;
const prompt = $("prompt");

export function use(chosen) {
  if (running) running.abort();
  const isOther = model && model.has_chat_template !== chosen.has_chat_template;
  model = chosen;
  if (isOther) turns = [];
  settings.showSystemPrompt(isChat());
  prompt.placeholder = isChat() ? "Ask anything" : "Begin a text";
  $("chat").classList.toggle("story", !isChat());
  draw();
}

function draw() {
  $("turns").replaceChildren(...turns.map(drawTurn).filter(Boolean));
  $("welcome").hidden = turns.length > 0;
  $("new").hidden = turns.length === 0;
  if (!model || turns.length) return;
  $("welcome-title").textContent = model.id;
  $("welcome-text").textContent = isChat() ? "" : "This model does not answer. It continues what you begin.";
  $("welcome-numbers").textContent = `${model.label} · up to ${model.max_model_len.toLocaleString("en")} tokens`;
  $("suggestions").replaceChildren(...SUGGESTIONS[isChat() ? "chat" : "story"].map((text) =>
    element("li", {}, element("button", { type: "button", onclick: () => send(text) }, text))));
}

function drawTurn(turn, i) {
  if (turn.role === "user") {
    // A story flows: its beginning is drawn with what follows.
    if (!isChat()) return null;
    const edit = element("button", { type: "button", class: "plain", onclick: () => startEdit(i) }, "Edit");
    return element("article", { class: "turn user", "aria-label": "You" },
      element("div", { class: "text" }, turn.text), element("div", { class: "actions" }, edit));
  }
  turn.body = element("div", { class: "text" });
  turn.foot = element("div", { class: "actions" });
  turn.element = element("article", { class: "turn answer", "aria-label": isChat() ? model.id : "Story" }, turn.body, turn.foot);
  drawText(turn);
  drawFoot(turn);
  return turn.element;
}

function drawText(turn) {
  if (isChat()) turn.body.replaceChildren(...blocks(turn.text));
  else turn.body.replaceChildren(element("span", { class: "seed" }, turns[turns.indexOf(turn) - 1].text), turn.text);
}

function drawFoot(turn) {
  const i = turns.indexOf(turn);
  turn.element.setAttribute("aria-busy", String(turn.isRunning));
  turn.element.classList.toggle("running", turn.isRunning);
  turn.foot.replaceChildren();
  if (turn.error) {
    const again = element("button", { type: "button", onclick: () => regenerate(i) }, "Try again");
    waitFor(again, turn.error.retryS);
    turn.foot.append(element("p", { class: "notice", role: "alert" }, explain(turn.error), " ", again));
  }
  if (turn.isRunning || turn.error) return;
  const whole = () => (isChat() ? turn.text : turns[i - 1].text + turn.text);
  turn.foot.append(copyButton(whole),
    element("button", { type: "button", class: "plain", onclick: () => regenerate(i) }, "Regenerate"));
  if (!isChat()) {
    turn.foot.append(element("button", { type: "button", class: "plain", onclick: () => startEdit(i - 1) }, "Edit"));
    if (turn.goesOn && i === turns.length - 1) {
      turn.foot.append(element("button", { type: "button", class: "plain", onclick: () => send("", true) }, "Continue"));
    }
  }
  turn.foot.append(element("span", { class: "figures" }, turn.note));
}

// Holds a button for as long as the server asked to wait.
function waitFor(button, seconds) {
  if (!seconds) return;
  button.disabled = true;
  button.textContent = `Try again in ${seconds} s`;
  setTimeout(() => {
    button.disabled = false;
    button.textContent = "Try again";
    waitFor(button, seconds - 1);
  }, 1000);
}

function startEdit(i) {
  editing = i;
  prompt.value = turns[i].text;
  $("hint").textContent = "Editing: what follows will be written anew. Esc cancels.";
  prompt.focus();
  resize();
}

function endEdit() {
  editing = null;
  prompt.value = "";
  $("hint").textContent = "Enter sends, Shift+Enter starts a new line, Esc stops.";
  resize();
}

async function send(text, isEmptyFine = false) {
  if (running || !model || !(text.trim() || isEmptyFine)) return;
  if (editing !== null) turns.length = editing;
  endEdit();
  turns.push({ role: "user", text });
  await answer();
}

async function regenerate(i) {
  if (running) return;
  const n = (turns[i].attempt ?? 0) + 1;
  turns.length = i;
  await answer(n);
}

function request(attempt) {
  const body = { model: model.id, ...settings.sampling() };
  // The same seed would give the same text again.
  if (settings.hasSeed()) body.seed += attempt;
  const said = turns.slice(0, -1);
  if (!isChat()) return ["v1/completions", { ...body, prompt: said.map((turn) => turn.text).join("") }];
  const messages = said.map((turn) => ({ role: turn.role, content: turn.text }));
  const system = settings.systemPrompt();
  if (system) messages.unshift({ role: "system", content: system });
  return ["v1/chat/completions", { ...body, messages }];
}

async function answer(attempt = 0) {
  const turn = { role: "assistant", text: "", note: "", attempt, isRunning: true };
  turns.push(turn);
  draw();
  toEnd(true);
  setRunning(new AbortController());
  const [path, body] = request(attempt);
  const begun = performance.now();
  let first = null, last = null, nTokens = 0, reason = "stopped";
  let frame = 0;
  try {
    for await (const event of stream(path, body, running.signal)) {
      const choice = event.choices[0];
      if (event.usage) nTokens = event.usage.completion_tokens;
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) {
        last = performance.now();
        first ??= last;
        // A text that is stopped never gets its usage: its pieces are counted.
        nTokens += 1;
        turn.text += piece;
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          drawText(turn);
          toEnd();
        });
      }
      reason = choice?.finish_reason ?? reason;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      turn.error = error instanceof ApiError || !turn.text ? error : new ApiError(0, error.message);
      if (error.status === 401) settings.open(explain(error));
    }
  }
  cancelAnimationFrame(frame);
  turn.isRunning = false;
  turn.goesOn = reason !== "stop";
  turn.note = figures(nTokens, first - begun, last - first, reason, body.seed);
  setRunning(null);
  drawText(turn);
  drawFoot(turn);
  toEnd();
  $("status").textContent = turn.error ? "" : reason === "stopped" ? "Stopped." : `Answer complete, ${nTokens} tokens.`;
}

function figures(nTokens, firstMs, restMs, reason, seed) {
  if (!nTokens) return reason === "stopped" ? "stopped before the first token" : "nothing to say";
  const parts = [`${nTokens} tokens`];
  if (restMs > 0 && nTokens > 1) parts.push(`${((nTokens - 1) / restMs * 1000).toFixed(1)} per second`);
  parts.push(`first after ${firstMs < 1000 ? `${Math.round(firstMs)} ms` : `${(firstMs / 1000).toFixed(1)} s`}`);
  parts.push(`seed ${seed}`);
  if (reason === "stopped") parts.push("stopped");
  if (reason === "length") parts.push("reached its limit");
  return parts.join(" · ");
}

function setRunning(controller) {
  running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  if (controller) $("status").textContent = "Writing.";
}

// Follows the text, unless its reader has scrolled up.
function toEnd(force = false) {
  const box = $("scroll");
  if (force || box.scrollHeight - box.scrollTop - box.clientHeight < 120) box.scrollTop = box.scrollHeight;
}

function resize() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

export function start() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send(prompt.value);
  });
  prompt.addEventListener("keydown", (event) => {
    // Enter also ends the composition of a character.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send(prompt.value);
    }
  });
  prompt.addEventListener("input", resize);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || $("settings").open) return;
    if (running) running.abort();
    else if (editing !== null) endEdit();
  });
  $("stop").addEventListener("click", () => {
    running?.abort();
    prompt.focus();
  });
  $("new").addEventListener("click", () => {
    running?.abort();
    turns = [];
    endEdit();
    draw();
    prompt.focus();
  });
}
