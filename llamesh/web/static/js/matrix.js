// Models x nodes: what is loaded where, what could be, and what can't.

import { askToLoad, showCell } from "./acts.js";
import { faceOf } from "./cells.js";
import { at, badge, button, el, keyed, setAttribute, setBadge, setText, show } from "./dom.js";
import { count, speed } from "./format.js";
import { allow, whyNotAnywhere } from "./may.js";

let last = null;
let openLog = () => {};

export function setUpMatrix(onLog) {
  openLog = onLog;
  at("model-filter").addEventListener("input", () => last && showMatrix(last));
}

function makeCell(model, nodeId) {
  const parts = { state: badge(), more: el("span", { look: "more dim" }), none: el("span", { look: "none", text: "·", title: "not in its cookbook" }) };
  parts.button = el("button", { type: "button", look: "cell", "data-node": nodeId }, parts.state, parts.more);
  parts.root = el("td", {}, parts.button, parts.none);
  parts.button.addEventListener("click", () => {
    const now = last.models.find((one) => one.key === model.key);
    const node = last.nodes.find((one) => one.id === nodeId);
    if (now?.nodes[nodeId] && node) showCell(now, node, last, openLog);
  });
  return parts;
}

function updateCell(parts, model, nodeId) {
  const cell = model.nodes[nodeId];
  show(parts.button, Boolean(cell));
  show(parts.none, !cell);
  if (!cell) return;
  const { look, text } = faceOf(cell);
  setBadge(parts.state, look, text);
  const more = [];
  if (cell.instances > 1) more.push(`×${count(cell.instances)}`);
  if (cell.tps && cell.state === "loaded") more.push(`${speed(cell.tps)} t/s`);
  if (cell.download === "coming" && cell.why) more.push(cell.why.replace(/^downloading [^,]*, /, ""));
  if (cell.queue) more.push(`${count(cell.queue)} waiting`);
  setText(parts.more, more.join(" · "));
  setAttribute(parts.button, "title", cell.why ?? "");
  setAttribute(parts.button, "aria-label", `${model.name} on ${nodeId}: ${text}${more.length ? `, ${more.join(", ")}` : ""}`);
}

function makeRow(model) {
  const parts = {
    name: el("span", { look: "name" }), about: el("small", { look: "dim" }), context: el("td", { look: "n dim" }),
    cells: null, head: null,
  };
  parts.head = el("th", { scope: "row" }, parts.name, parts.about);
  parts.load = button("Load…", () => {
    const now = last.models.find((one) => one.key === model.key);
    if (now) askToLoad(now, last);
  }, { "aria-label": `Load… ${model.name}` });
  // Cells come between the head and what follows it, by a list of their own.
  parts.root = el("tr", { "data-model": model.key }, parts.head, parts.context, el("td", { look: "end" }, parts.load));
  parts.byNode = new Map();
  return parts;
}

function updateRow(parts, model, nodes) {
  allow(parts.load, whyNotAnywhere());
  setText(parts.name, model.name);
  setText(parts.about, model.description || model.kind);
  setAttribute(parts.head, "title", model.description);
  setText(parts.context, model.context_length ? count(model.context_length) : "–");
  let place = parts.context.nextElementSibling;
  for (const node of nodes) {
    let cell = parts.byNode.get(node.id);
    if (!cell) parts.byNode.set(node.id, (cell = makeCell(model, node.id)));
    updateCell(cell, model, node.id);
    if (cell.root === place) place = place.nextElementSibling;
    else parts.root.insertBefore(cell.root, place);
  }
  for (const [id, cell] of parts.byNode) {
    if (nodes.some((node) => node.id === id)) continue;
    cell.root.remove();
    parts.byNode.delete(id);
  }
}

export function showMatrix(document) {
  last = document;
  const nodes = [...document.nodes].sort((a, b) => b.self - a.self || a.id.localeCompare(b.id));
  const heads = [["", "Model"], ["", "Context", "n"], ...nodes.map((node) => [node.id, node.id]), ["", "", "end"]];
  keyed(at("matrix-head"), heads, ([id, text, look]) => `${id}/${text}/${look ?? ""}`,
    ([, text, look = ""]) => (text ? el("th", { scope: "col", text, look }) : el("td", { look })), () => {});
  const sought = at("model-filter").value.trim().toLowerCase();
  const models = document.models.filter((one) => `${one.name} ${one.key} ${one.description}`.toLowerCase().includes(sought));
  keyed(at("matrix-body"), models, (one) => one.key, makeRow, (parts, one) => updateRow(parts, one, nodes));
  setText(at("model-count"), sought ? `${models.length} of ${document.models.length}` : count(document.models.length));
  show(at("matrix"), models.length > 0);
  show(at("matrix-empty"), models.length === 0);
  setText(at("matrix-empty"), document.models.length
    ? "No model is called so. Clear the search to see all."
    : "The cookbook has no enabled model. Add one to cookbook.yaml; the file is read again by itself.");
}
