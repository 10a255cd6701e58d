// One small chart of the last hour, as SVG: axes, a line with gaps where nobody looked, and a cursor.

import { el, setAttribute, setText } from "./dom.js";
import { clock, clockShort } from "./format.js";

const NS = "http://www.w3.org/2000/svg";
const LEFT = 48, RIGHT = 8, TOP = 8, BOTTOM = 18;
const TICK_SECONDS = 900;

function svg(name, attributes = {}) {
  const made = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** The next round number: 1, 2 or 5 times a power of ten. */
function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

/** The same for MiB: in steps of a GiB from there on, finer, since a limit often fills the scale. */
function roundUpSize(mib) {
  if (mib < 1024) return roundUp(mib);
  const gib = mib / 1024, step = roundUp(gib / 8);
  return Math.ceil(gib / step / 2) * 2 * step * 1024;
}

export class Chart {
  /** `format` makes a text of a value, `tick` of one on the axis; `least`: the scale ends no lower; `binary`: values are MiB. */
  constructor({ title, unit, format, tick = format, least = 1, binary = false }) {
    Object.assign(this, { title, unit, format, tick, least, binary, values: [], end: 0, step: 10, limit: null, at: null });
    this.value = el("span", { look: "value" });
    this.when = el("span", { look: "when dim" });
    this.svg = svg("svg", { role: "img", tabindex: "0", class: "plot" });
    this.grid = svg("g", { class: "grid" });
    this.area = svg("path", { class: "area" });
    this.line = svg("path", { class: "line" });
    this.dashes = svg("path", { class: "limit" });
    this.cursor = svg("path", { class: "cursor" });
    this.dot = svg("circle", { class: "dot", r: 3 });
    this.svg.append(this.grid, this.area, this.dashes, this.line, this.cursor, this.dot);
    this.root = el("figure", { look: "card chart" },
      el("figcaption", {}, el("span", { text: title, look: "label" }), this.value, this.when), this.svg);
    this.svg.addEventListener("pointermove", (event) => this.point(this.indexAt(event.offsetX)));
    this.svg.addEventListener("pointerleave", () => this.point(null));
    this.svg.addEventListener("blur", () => this.point(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  set(values, step, end, limit = null) {
    Object.assign(this, { values, step, end, limit });
    this.draw();
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -30, PageDown: 30 }[event.key];
    if (!steps) return;
    event.preventDefault();
    const last = this.values.length - 1;
    this.point(Math.max(0, Math.min(last, (this.at ?? last) + steps)));
  }

  indexAt(x) {
    const share = (x - LEFT) / (this.width - LEFT - RIGHT);
    return Math.max(0, Math.min(this.values.length - 1, Math.round(share * (this.values.length - 1))));
  }

  x(index) {
    return LEFT + (index / Math.max(1, this.values.length - 1)) * (this.width - LEFT - RIGHT);
  }

  y(value) {
    return TOP + (1 - value / this.top) * (this.height - TOP - BOTTOM);
  }

  draw() {
    this.width = this.svg.clientWidth;
    this.height = this.svg.clientHeight;
    if (this.width < 80 || !this.values.length) return;
    const most = Math.max(this.least, this.limit ?? 0, ...this.values.map((value) => value ?? 0));
    this.top = this.binary ? roundUpSize(most) : roundUp(most);
    setAttribute(this.svg, "viewBox", `0 0 ${this.width} ${this.height}`);
    this.drawGrid();
    this.drawLine();
    this.point(this.at);
  }

  drawGrid() {
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const value = this.top * share, y = Math.round(this.y(value)) + 0.5;
      parts.push(svg("path", { d: `M${LEFT} ${y}H${this.width - RIGHT}` }));
      const label = svg("text", { x: LEFT - 6, y: y + 3.5, "text-anchor": "end" });
      label.textContent = this.tick(value);
      parts.push(label);
    }
    const start = this.end - this.values.length * this.step;
    const narrow = this.width < 220 ? 2 : 1;
    const every = TICK_SECONDS * narrow;
    for (let time = Math.ceil(start / every) * every; time <= this.end; time += every) {
      const x = LEFT + ((time - start) / (this.end - start)) * (this.width - LEFT - RIGHT);
      if (x < LEFT + 12 || x > this.width - RIGHT - 12) continue;
      const label = svg("text", { x, y: this.height - 5, "text-anchor": "middle" });
      label.textContent = clockShort(time);
      parts.push(label);
    }
    this.grid.replaceChildren(...parts);
  }

  drawLine() {
    let line = "", area = "", from = null;
    const base = this.y(0).toFixed(1);
    const finish = (index) => {
      if (from === null) return;
      area += `L${this.x(index).toFixed(1)} ${base}L${this.x(from).toFixed(1)} ${base}Z`;
      from = null;
    };
    this.values.forEach((value, index) => {
      if (value === null) return finish(index - 1);
      const place = `${this.x(index).toFixed(1)} ${this.y(value).toFixed(1)}`;
      // A lone value would be a line without a length: the round ends of the stroke show it.
      line += from === null ? `M${place}L${place}` : `L${place}`;
      area += from === null ? `M${place}` : `L${place}`;
      from ??= index;
    });
    finish(this.values.length - 1);
    setAttribute(this.line, "d", line || "M0 0");
    setAttribute(this.area, "d", area || "M0 0");
    const shown = this.limit !== null && this.limit > 0;
    setAttribute(this.dashes, "d", shown ? `M${LEFT} ${this.y(this.limit).toFixed(1)}H${this.width - RIGHT}` : "M0 0");
  }

  /** Show the value at a step; null shows the newest. */
  point(index) {
    this.at = index;
    const last = this.values.findLastIndex((value) => value !== null);
    const shown = index ?? last;
    const value = shown < 0 ? null : this.values[shown];
    setText(this.value, value === null || value === undefined ? "–" : `${this.format(value)}${this.unit ? ` ${this.unit}` : ""}`);
    setText(this.when, index === null ? "" : clock(this.end - (this.values.length - 1 - index) * this.step));
    const visible = index !== null && value !== null && value !== undefined;
    this.dot.classList.toggle("on", visible || last >= 0);
    setAttribute(this.cursor, "d", index === null ? "M0 0" : `M${this.x(index).toFixed(1)} ${TOP}V${this.height - BOTTOM}`);
    const marked = visible ? index : last; // without a cursor, the newest value
    if (marked >= 0) {
      setAttribute(this.dot, "cx", this.x(marked).toFixed(1));
      setAttribute(this.dot, "cy", this.y(this.values[marked]).toFixed(1));
    }
    setAttribute(this.svg, "aria-label", `${this.title} in the last hour, ${this.when.textContent || "now"}: ${this.value.textContent}. Arrow keys move the cursor.`);
  }
}
