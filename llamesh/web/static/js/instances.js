// The llama-server processes of all nodes.

import { askToUnload } from "./acts.js";
import { at, badge, button, el, keyed, setAttribute, setBadge, setText, show } from "./dom.js";
import { age, count, duration, moment, size, speed } from "./format.js";
import { allow, whyNotAt } from "./may.js";

const LOOKS = { ready: "good", starting: "busy", draining: "busy", stopping: "off" };
const SHOWN_SLOTS = 12;

let last = null;
let openLog = () => {};

export function setUpInstances(onLog) {
  openLog = onLog;
}

const cell = (name, look = "") => el("td", { look, "data-name": name });

function make() {
  const parts = {
    id: cell("Instance", "name"), node: cell("Node"), stateCell: cell("State"), state: badge(), why: el("small", { look: "dim" }),
    slotCell: cell("Slots"), slots: el("span", { look: "slots", "aria-hidden": "true" }), busy: el("span"),
    queue: cell("Queue", "n"), tps: cell("Tokens/s", "n"), age: cell("Age", "n"), load: cell("Load time", "n"),
    vram: cell("VRAM", "n"), ram: cell("Memory", "n"), pid: cell("Process", "n dim"), acts: cell("", "end"), one: null,
  };
  parts.stateCell.append(parts.state, parts.why);
  parts.slotCell.append(parts.slots, parts.busy);
  parts.log = button("Log", () => openLog(parts.one.model, parts.one.node, parts.one.id));
  parts.unload = button("Unload…", () => askToUnload(parts.one.model, parts.one.node, last), { "data-act": "unload" });
  parts.acts.append(parts.log, parts.unload);
  parts.root = el("tr", {}, parts.id, parts.node, parts.stateCell, parts.slotCell, parts.queue, parts.tps,
    parts.age, parts.load, parts.vram, parts.ram, parts.pid, parts.acts);
  return parts;
}

function showSlots(parts, one) {
  const shown = Math.min(one.slots, SHOWN_SLOTS);
  while (parts.slots.children.length > shown) parts.slots.lastElementChild.remove();
  while (parts.slots.children.length < shown) parts.slots.append(el("i"));
  [...parts.slots.children].forEach((slot, index) => slot.classList.toggle("busy", index < one.busy));
  setText(parts.busy, `${count(one.busy)} of ${count(one.slots)}`);
}

function update(parts, one, now) {
  parts.one = one;
  setText(parts.id, one.id);
  setText(parts.node, one.node);
  setAttribute(parts.log, "aria-label", `Log of ${one.id} on ${one.node}`);
  setAttribute(parts.unload, "aria-label", `Unload… ${one.id} on ${one.node}`);
  setBadge(parts.state, LOOKS[one.state] ?? "off", one.on_cpu ? `${one.state} · CPU` : one.state);
  setText(parts.why, one.reason ?? "");
  showSlots(parts, one);
  const waits = last.models.find((model) => model.key === one.model)?.nodes[one.node]?.queue;
  setText(parts.queue, count(waits));
  setText(parts.tps, speed(one.tps));
  setText(parts.age, age(now - one.started));
  setAttribute(parts.age, "title", `started ${moment(one.started)}`);
  setText(parts.load, duration(one.load_ms));
  setText(parts.vram, size(one.vram ?? one.reserved_vram));
  setText(parts.ram, size(one.ram ?? one.reserved_ram));
  setAttribute(parts.vram, "title", `seen ${size(one.vram)}, counted ${size(one.reserved_vram)}`);
  setAttribute(parts.ram, "title", `seen ${size(one.ram)}, counted ${size(one.reserved_ram)}`);
  setText(parts.pid, one.pid === null ? "–" : String(one.pid));
  allow(parts.unload, one.state === "stopping" ? "it is ending" : whyNotAt(last.nodes.find((node) => node.id === one.node)));
}

export function showInstances(document, now) {
  last = document;
  const list = [...document.instances].sort((a, b) => a.node.localeCompare(b.node) || a.id.localeCompare(b.id));
  keyed(at("instance-rows"), list, (one) => `${one.node} ${one.id} ${one.started}`, make,
    (parts, one) => update(parts, one, now));
  show(at("instances-empty"), list.length === 0);
  show(at("instance-rows").parentElement, list.length > 0);
  setText(at("instance-count"), list.length ? count(list.length) : "");
}
