// Starts the page: models, tabs, theme.

import { explain, json } from "./api.js";
import * as chat from "./chat.js";
import * as dashboard from "./dashboard.js";
import { element } from "./render.js";
import * as settings from "./settings.js";

const $ = (id) => document.getElementById(id);
const MODEL = "onebit.model";
let models = [];

async function loadModels() {
  try {
    models = (await json("v1/models")).data;
  } catch (error) {
    $("welcome-text").textContent = explain(error);
    if (error.status === 401) settings.open(explain(error));
    return;
  }
  const stored = localStorage.getItem(MODEL);
  const chosen = models.find((model) => model.id === stored) ?? models[0];
  $("model").replaceChildren(...models.map((model) => element("option", { value: model.id, title: model.label }, model.id)));
  $("model").value = chosen.id;
  chat.use(chosen);
  dashboard.use(models);
}

function showTab(tab) {
  for (const other of document.querySelectorAll("[role=tab]")) {
    const isShown = other === tab;
    other.setAttribute("aria-selected", String(isShown));
    other.tabIndex = isShown ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !isShown;
  }
  const name = tab.getAttribute("aria-controls");
  history.replaceState(null, "", name === "chat" ? location.pathname : `#${name}`);
  dashboard.show(name === "dashboard");
}

settings.start(loadModels);
chat.start();
$("theme").addEventListener("click", window.toggleTheme);
$("model").addEventListener("change", () => {
  localStorage.setItem(MODEL, $("model").value);
  chat.use(models.find((model) => model.id === $("model").value));
});
const tabs = [...document.querySelectorAll("[role=tab]")];
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => showTab(tab));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const next = tabs.at((i + step) % tabs.length);
    next.focus();
    showTab(next);
  });
}
showTab($(location.hash === "#dashboard" ? "tab-dashboard" : "tab-chat"));
loadModels();
