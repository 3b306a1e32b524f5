// The dashboard: reads /metrics each second while it is looked at.

import { explain, text } from "./api.js";
import { Chart } from "./chart.js";
import { increase, mean, parse, quantile, total } from "./metrics.js";
import { element } from "./render.js";

const $ = (id) => document.getElementById(id);
// What the charts show, what percentiles are of, and what speeds are of. Health is of all that is shown.
const SECONDS = 180;
const WINDOW = 60;
const MOMENT = 5;
// See "Model health" in docs/guide/serve.md.
const LIMITS = { repetition: 0.5, lowEntropy: 0.05, highEntropy: 6, saturated: 0.1, zero: 0.95, zeroOfDown: 0.999, kvBits: 3 };
// Answers that a mean must be of before anything is said against a model, as in deploy/prometheus-alerts.yml: one text
// may well be sure of itself.
const ENOUGH = 20;
// How requests end well, and what clients do to themselves.
const FINE = new Set(["ok", "cancelled"]);

const number = (v, digits = 1) => (v == null ? "–" : v.toLocaleString("en", { maximumFractionDigits: v < 10 ? digits : 0 }));
const time = (s) => (s == null ? "–" : s < 1 ? `${number(s * 1000)} ms` : `${number(s, 2)} s`);
const percent = (v) => (v == null ? "–" : `${number(100 * v)} %`);

let models = [];
let isShown = false;
let isWatching = false;
const readings = [];
const cards = {};

// A card with big figures and a chart below them.
function card(name, figures, format, series = figures) {
  const values = figures.map(() => element("output", {}, "–"));
  const chart = new Chart(series.map((s, i) => ({ name: s, class: ["main", "second"][i] })), SECONDS, format);
  const list = element("dl", { class: "figures" }, ...figures.map((figure, i) =>
    element("div", { class: ["main", "second"][i] }, element("dt", {}, figure), element("dd", {}, values[i]))));
  document.querySelector(`[data-card=${name}]`).append(list, chart.svg);
  cards[name] = (...found) => {
    found.forEach((value, i) => (values[i].value = format(value)));
    chart.push(...found);
  };
}

function panel(name) {
  const body = element("div", { class: "panel" });
  document.querySelector(`[data-card=${name}]`).append(body);
  cards[name] = (...children) => body.replaceChildren(...children);
}

function build() {
  card("tokens", ["written", "read"], (v) => number(v));
  card("texts", ["computed", "waiting"], (v) => number(v, 0));
  card("batch", ["mean, texts per step"], (v) => number(v), [""]);
  card("first", ["median", "95 %"], time);
  card("interval", ["median", "99 %"], time);
  card("requests", ["answered", "failed"], (v) => number(v, 0));
  card("prefix", ["of prompt tokens"], percent, [""]);
  ["cache", "errors", "health"].forEach(panel);
}

function update(now) {
  const since = (seconds) => readings.findLast((r) => now.at - r.at >= seconds * 1000) ?? readings[0] ?? null;
  const before = since(WINDOW), last = since(MOMENT);
  readings.push(now);
  while (now.at - readings[0].at > SECONDS * 1000) readings.shift();
  const [f, b] = [now.figures, before?.figures];
  const rate = (name, labels) => (last ? increase(f, last.figures, name, labels) / ((now.at - last.at) / 1000) : null);
  const share = (part, whole) => {
    const n = increase(f, b, whole);
    return n ? increase(f, b, part) / n : null;
  };
  cards.tokens(rate("onebit_completion_tokens_total"), rate("onebit_prompt_tokens_total"));
  cards.texts(total(f, "onebit_texts_running"), total(f, "onebit_texts_waiting"));
  cards.batch(mean(f, last?.figures, "onebit_batch_texts"));
  cards.first(quantile(0.5, f, b, "onebit_time_to_first_token_seconds"), quantile(0.95, f, b, "onebit_time_to_first_token_seconds"));
  cards.interval(quantile(0.5, f, b, "onebit_inter_token_seconds"), quantile(0.99, f, b, "onebit_inter_token_seconds"));
  const minutes = before ? Math.max((now.at - before.at) / 60000, 1 / 60) : null;
  const ended = outcomes(f, b);
  const bad = ended.filter(([outcome]) => !FINE.has(outcome));
  const count = (list) => (minutes ? list.reduce((sum, [, n]) => sum + n, 0) / minutes : null);
  cards.requests(count(ended), count(bad));
  cards.prefix(share("onebit_prefix_hit_tokens_total", "onebit_prefix_query_tokens_total"));
  cards.cache(...cacheBar(f));
  cards.errors(...outcomeList(outcomes(f, null)));
  cards.health(healthTable(f, readings[0].figures, (labels) => rate("onebit_completion_tokens_total", labels)));
}

// How requests to models ended: [[outcome, count], ...], most first.
function outcomes(f, b) {
  const names = new Set((f.onebit_requests_total ?? []).filter((r) => isAnswer(r.labels)).map((r) => r.labels.outcome));
  const count = (figures, outcome) => (figures?.onebit_requests_total ?? [])
    .filter((r) => isAnswer(r.labels) && r.labels.outcome === outcome).reduce((sum, r) => sum + r.value, 0);
  return [...names].map((outcome) => [outcome, count(f, outcome) - count(b, outcome)]).sort(([, a], [, c]) => c - a);
}

const isAnswer = (labels) => labels.path.startsWith("/v1/") && !labels.path.startsWith("/v1/models");

function cacheBar(f) {
  const all = total(f, "onebit_kv_blocks");
  const used = total(f, "onebit_kv_blocks_used"), kept = total(f, "onebit_kv_blocks_cached");
  const parts = [["used", used], ["kept for their prefix", kept], ["free", all - used - kept]];
  const bar = element("div", { class: "meter", role: "img", "aria-label": `${used} of ${all} blocks used` });
  const legend = element("dl", { class: "legend" });
  parts.forEach(([name, n], i) => {
    const part = element("span", { class: `part-${i}` });
    part.style.flexGrow = n;
    bar.append(part);
    legend.append(element("div", { class: `part-${i}` }, element("dt", {}, name), element("dd", {}, `${number(n, 0)} blocks`)));
  });
  const preempted = total(f, "onebit_preemptions_total");
  const note = preempted ? `${number(preempted, 0)} times a text gave up its blocks to an older one.` : "No text ever had to give up its blocks.";
  return [bar, legend, element("p", { class: "note" }, note)];
}

function outcomeList(counts) {
  const all = counts.reduce((sum, [, n]) => sum + n, 0);
  if (!all) return [element("p", { class: "note" }, "No request yet.")];
  return [element("ul", { class: "bars" }, ...counts.filter(([, n]) => n).map(([name, n]) => {
    const bar = element("span", { class: FINE.has(name) ? "fine" : "bad" });
    bar.style.width = `${Math.max((100 * n) / all, 1)}%`;
    return element("li", {}, element("span", {}, name.replaceAll("_", " ")), element("span", { class: "track" }, bar), element("span", {}, number(n, 0)));
  }))];
}

function healthTable(f, start, rate) {
  const heads = ["Model", "Numbers", "Tokens/s", "Repetition", "Entropy", "Saturated", "Zero", "Cache", "Failed steps", "Weights"];
  return element("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Model health" }, element("table", {},
    element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))),
    element("tbody", {}, ...models.map((model) => healthRow(model, f, start, rate)))));
}

function healthRow(model, f, start, rate) {
  const own = { model: model.id }, engine = { model: model.parent ?? model.id };
  // Without an answer in these minutes, what is known since the start.
  const recent = (name) => {
    const since = increase(f, start, `${name}_count`, own) ? start : null;
    return { value: mean(f, since, name, own), isEnough: increase(f, since, `${name}_count`, own) >= ENOUGH };
  };
  const repetition = recent("onebit_repetition"), entropy = recent("onebit_entropy_nats");
  const failed = total(f, "onebit_failed_steps_total", engine);
  const repeats = repetition.isEnough && repetition.value > LIMITS.repetition;
  const entropyIsOff = entropy.isEnough && (entropy.value < LIMITS.lowEntropy || entropy.value > LIMITS.highEntropy);
  return element("tr", {}, element("th", { scope: "row" }, model.id), element("td", {}, model.label),
    // An adapter's tokens count with its model.
    element("td", {}, model.parent ? "" : number(rate(own) ?? 0)),
    element("td", {}, verdict(repeats, percent(repetition.value))),
    element("td", {}, verdict(entropyIsOff, entropy.value === null ? "–" : `${number(entropy.value, 2)} nats`)),
    ...layers(f, start, model), element("td", {}, verdict(failed > 0, number(failed, 0))), element("td", {}, weights(f, engine)));
}

// What layers read and keep, each where it is nearest to its limit; an adapter's counts with its model.
function layers(f, start, model) {
  if (model.parent) return [1, 2, 3].map(() => element("td", {}));
  const lines = (name, value) => (f[name] ?? []).filter((line) => line.labels.model === model.id)
    .map(({ labels }) => ({ ...labels, value: value(labels) })).filter((line) => line.value !== null);
  const shares = (name) => lines(name, (labels) => {
    // Without an answer in these minutes, what is known since the start.
    for (const since of [start, null]) {
      const n = increase(f, since, "onebit_input_codes_total", labels);
      if (n) return increase(f, since, name, labels) / n;
    }
    return null;
  });
  const bits = lines("onebit_kv_entropy_bits_count", (labels) =>
    mean(f, start, "onebit_kv_entropy_bits", labels) ?? mean(f, null, "onebit_kv_entropy_bits", labels));
  const zeroLimit = (line) => (line.input === "down" ? LIMITS.zeroOfDown : LIMITS.zero);
  const worst = (list, nearness, isBad, words) => {
    const line = list.reduce((a, b) => (a && nearness(a) >= nearness(b) ? a : b), null);
    if (!line) return element("td", {}, "–");
    const place = `layer ${line.layer}, ${line.input?.replace("_", "/") ?? line.part}`;
    return element("td", {}, verdict(isBad(line), words(line.value)), " ", element("small", {}, place));
  };
  return [
    worst(shares("onebit_saturated_codes_total"), (l) => l.value, (l) => l.value > LIMITS.saturated, percent),
    worst(shares("onebit_zero_codes_total"), (l) => l.value / zeroLimit(l), (l) => l.value > zeroLimit(l), percent),
    worst(bits, (l) => -l.value, (l) => l.value < LIMITS.kvBits, (v) => `${number(v, 2)} bits`),
  ];
}

function weights(f, engine) {
  const flipped = total(f, "onebit_flipped_tensors", engine);
  if (flipped) return verdict(true, `${flipped} tensors differ from the file`);
  const checkedS = total(f, "onebit_weight_check_timestamp_seconds", engine);
  if (!checkedS) return verdict(false, "being checked");
  const minutes = Math.max(Math.round((Date.now() / 1000 - checkedS) / 60), 0);
  return verdict(false, minutes ? `intact, ${minutes} min ago` : "intact, just checked");
}

const verdict = (isBad, words) => element("span", { class: isBad ? "verdict bad" : "verdict" }, isBad ? `⚠ ${words}` : words);

async function watch() {
  if (isWatching) return;
  isWatching = true;
  while (isShown && !document.hidden) {
    try {
      const figures = parse(await text("metrics"));
      $("board-error").hidden = true;
      update({ at: Date.now(), figures });
    } catch (error) {
      $("board-error").textContent = explain(error);
      $("board-error").hidden = false;
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  isWatching = false;
}

export function use(list) {
  models = list;
}

export function show(is) {
  isShown = is;
  watch();
}

build();
document.addEventListener("visibilitychange", watch);
