// Figures in the text format of Prometheus, and what can be computed from them.

// Lines as {name: [{labels, value}]}.
export function parse(text) {
  const found = {};
  for (const line of text.split("\n")) {
    const parts = line.match(/^([a-z_]\w*)(?:\{(.*)\})? (\S+)$/i);
    if (!parts) continue;
    const labels = {};
    for (const [, label, value] of (parts[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[label] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    }
    (found[parts[1]] ??= []).push({ labels, value: Number(parts[3].replace("Inf", "Infinity")) });
  }
  return found;
}

// Sum over all lines of a name, or over those with a label.
export function total(figures, name, labels = {}) {
  let sum = 0;
  for (const line of figures[name] ?? []) {
    if (Object.entries(labels).every(([label, value]) => line.labels[label] === value)) sum += line.value;
  }
  return sum;
}

// What came between two readings; counters begin at 0 again where the server did.
export function increase(now, before, name, labels) {
  const step = total(now, name, labels) - (before ? total(before, name, labels) : 0);
  return step < 0 ? total(now, name, labels) : step;
}

// Buckets of a histogram between two readings: [[upper bound, count up to there], ...].
function buckets(now, before, name, labels) {
  const bounds = new Set((now[`${name}_bucket`] ?? []).map((line) => line.labels.le));
  return [...bounds].map((le) => [Number(le.replace("+Inf", "Infinity")), increase(now, before, `${name}_bucket`, { ...labels, le })])
    .sort(([a], [b]) => a - b);
}

// A quantile, linear within its bucket; null where nothing was observed.
export function quantile(q, now, before, name, labels = {}) {
  const counts = buckets(now, before, name, labels);
  const all = counts.at(-1)?.[1] ?? 0;
  if (!all) return null;
  let low = 0, below = 0;
  for (const [high, count] of counts) {
    if (count >= q * all) return high === Infinity ? low : low + (high - low) * ((q * all - below) / (count - below || 1));
    [low, below] = [high, count];
  }
  return low;
}

// The mean between two readings; null where nothing was observed.
export function mean(now, before, name, labels = {}) {
  const n = increase(now, before, `${name}_count`, labels);
  return n ? increase(now, before, `${name}_sum`, labels) / n : null;
}
