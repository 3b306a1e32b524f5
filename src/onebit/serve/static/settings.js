// Sampling controls in a drawer, remembered by the browser.

import { key } from "./api.js";

const STORE = "onebit.settings";
// Those of `onebit run`.
const DEFAULTS = {
  temperature: 0.8, top_p: 0.95, min_p: 0, repetition_penalty: 1, top_k: 40, max_tokens: 256, seed: "", system: "",
};

const $ = (id) => document.getElementById(id);
const dialog = $("settings");

function stored() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(STORE)) };
  } catch {
    return DEFAULTS;
  }
}

function show() {
  const values = stored();
  for (const name of Object.keys(DEFAULTS)) $(name).value = values[name];
  $("key").value = key.get();
  showNumbers();
}

function showNumbers() {
  for (const input of dialog.querySelectorAll("input[type=range]")) {
    input.closest("label").querySelector("output").value = Number(input.value).toFixed(2);
  }
}

function save() {
  const values = {};
  // What a field does not allow is not taken.
  for (const name of Object.keys(DEFAULTS)) values[name] = $(name).checkValidity() ? $(name).value : DEFAULTS[name];
  localStorage.setItem(STORE, JSON.stringify(values));
  showNumbers();
}

// The fields of a request; without a seed one is drawn, so that it can be told.
export function sampling() {
  const values = stored();
  const number = (name) => (values[name] === "" ? DEFAULTS[name] : Number(values[name]));
  return {
    temperature: number("temperature"), top_p: number("top_p"), min_p: number("min_p"),
    repetition_penalty: number("repetition_penalty"), top_k: number("top_k"), max_tokens: number("max_tokens"),
    seed: values.seed === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number(values.seed),
  };
}

export const systemPrompt = () => stored().system.trim();
export const hasSeed = () => stored().seed !== "";

export function open(notice = "") {
  $("settings-notice").textContent = notice;
  $("settings-notice").hidden = !notice;
  show();
  if (!dialog.open) dialog.showModal();
  if (notice) $("key").focus();
}

export function showSystemPrompt(isUsed) {
  $("system-field").hidden = !isUsed;
}

export function start(onKey) {
  $("open-settings").addEventListener("click", () => open());
  dialog.addEventListener("input", (event) => {
    if (event.target.id !== "key") save();
  });
  $("key").addEventListener("change", () => {
    key.set($("key").value.trim());
    onKey();
  });
  $("reset").addEventListener("click", () => {
    localStorage.removeItem(STORE);
    show();
  });
  // A click beside the drawer closes it.
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
}
