// The charts of the last hour, summed over all nodes.

import { Chart } from "./chart.js";
import { at } from "./dom.js";
import { count, size, speed } from "./format.js";

const tenth = (value) => count(Math.round(value * 10) / 10);
const tick = (mib) => (mib >= 1024 ? `${tenth(mib / 1024)} GiB` : `${Math.round(mib)}`);

const CHARTS = {
  tokens_per_second: new Chart({ title: "Speed", unit: "tokens/s", format: (v) => (v >= 10 || v === 0 ? count(Math.round(v)) : speed(v)), tick: tenth, least: 10 }),
  queue: new Chart({ title: "Queue", unit: "waiting", format: tenth, least: 4 }),
  vram: new Chart({ title: "VRAM in use", unit: "", format: size, tick, least: 1024, binary: true }),
  ram: new Chart({ title: "Memory in use", unit: "", format: size, tick, least: 1024, binary: true }),
};

export function setUpCharts() {
  at("charts").append(...Object.values(CHARTS).map((chart) => chart.root));
}

function total(nodes, kind) {
  const known = nodes.map((node) => node.memory[kind].total).filter((value) => value !== null);
  return known.length ? known.reduce((sum, value) => sum + value, 0) : null;
}

export function showCharts(document) {
  const { series, step, end } = document.history;
  const limits = { vram: total(document.nodes, "vram"), ram: total(document.nodes, "ram") };
  // Without a GPU anywhere the chart would stay empty.
  const noGpu = limits.vram === null && series.vram.every((value) => !value);
  CHARTS.vram.root.hidden = noGpu;
  for (const [name, chart] of Object.entries(CHARTS)) {
    if (!chart.root.hidden) chart.set(series[name], step, end, limits[name] ?? null);
  }
}
