// The last minutes as a line. A gap in the values is a gap in the line.

const NS = "http://www.w3.org/2000/svg";

function shape(tag, attributes) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

export class Chart {
  // series: [{name, class}], length: readings from edge to edge, format: a value in words.
  constructor(series, length, format) {
    Object.assign(this, { series, length, format, values: series.map(() => []), pointer: null });
    this.svg = shape("svg", { class: "chart", "aria-hidden": "true" });
    this.svg.addEventListener("pointermove", (event) => this.draw((this.pointer = event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.draw((this.pointer = null)));
  }

  push(...values) {
    this.values.forEach((line, i) => {
      line.push(values[i]);
      if (line.length > this.length) line.shift();
    });
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.svg;
    if (!width) return;
    const most = Math.max(...this.values.flat().map((v) => v ?? 0), 1e-9) * 1.1;
    const n = this.values[0].length;
    const x = (i) => width - 4 - ((n - 1 - i) * (width - 8)) / (this.length - 1);
    const y = (value) => height - 1 - (value / most) * (height - 8);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(shape("path", { class: "floor", d: `M0 ${height - 0.5}H${width}` }));
    this.values.forEach((line, s) => {
      const points = line.map((v, i) => (v == null ? null : [x(i), y(v)]));
      const d = points.map((p, i) => p && `${points[i - 1] ? "L" : "M"}${p[0].toFixed(1)} ${p[1].toFixed(1)}`).filter(Boolean).join("");
      if (!d) return;
      const first = points.find(Boolean), last = points.findLast(Boolean);
      if (s === 0 && !points.slice(points.indexOf(first)).includes(null)) {
        this.svg.append(shape("path", { class: "area", d: `${d}L${last[0]} ${height}L${first[0]} ${height}Z` }));
      }
      this.svg.append(shape("path", { class: `line ${this.series[s].class}`, d }));
      this.svg.append(shape("circle", { class: `dot ${this.series[s].class}`, cx: last[0], cy: last[1], r: 2.5 }));
    });
    if (this.pointer !== null && n) this.tell(x, n, width, height);
  }

  tell(x, n, width, height) {
    const i = Math.min(Math.max(Math.round(n - 1 - ((width - 4 - this.pointer) * (this.length - 1)) / (width - 8)), 0), n - 1);
    const values = this.series.map(({ name }, s) => `${name} ${this.format(this.values[s][i])}`.trim());
    this.svg.append(shape("path", { class: "cursor", d: `M${x(i).toFixed(1)} 0V${height}` }));
    const label = shape("text", { x: x(i) + (x(i) > width / 2 ? -6 : 6), y: 11, "text-anchor": x(i) > width / 2 ? "end" : "start" });
    label.textContent = `${n - 1 - i} s ago: ${values.join(", ")}`;
    this.svg.append(label);
  }
}
