// Light or dark, before anything is drawn; later the button calls `toggleTheme`.
{
  const root = document.documentElement;
  const stored = localStorage.getItem("onebit.theme");
  if (stored) root.dataset.theme = stored;

  window.toggleTheme = () => {
    const dark = getComputedStyle(root).colorScheme === "dark"
      || (!root.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("onebit.theme", root.dataset.theme);
  };
}
