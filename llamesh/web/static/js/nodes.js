// One card for each node: its state, its memory, its load, and how it is reached.

import { askToDrain, showNodeActs } from "./acts.js";
import { at, badge, button, el, keyed, setAttribute, setBadge, setText, show } from "./dom.js";
import { age, count, duration, moment, size } from "./format.js";
import { allow, whyNotAt } from "./may.js";

const PARTS = ["ours", "promised", "others", "open", "held"];

let last = null;

/** The address of another node's dashboard, null where there is none that a browser could open. */
export function dashboardOf(node) {
  if (node.self || !node.address) return null;
  try {
    const url = new URL(node.address.includes("://") ? node.address : `${location.protocol}//${node.address}`);
    return ["http:", "https:"].includes(url.protocol) ? new URL("/ui/", url).href : null;
  } catch {
    return null;
  }
}

function makeBar(name) {
  const parts = Object.fromEntries(PARTS.map((part) => [part, el("span", { look: `part ${part}` })]));
  const bar = el("div", { look: "meter", role: "img" }, ...Object.values(parts));
  const figures = el("span", { look: "figures" });
  const root = el("div", { look: "memory" },
    el("div", { look: "line" }, el("span", { text: name, look: "label" }), figures), bar);
  return { root, bar, parts, figures, name };
}

/** `used`: MiB that our instances hold, as far as they were seen; what is counted for them beyond that is promised. */
function updateBar(made, room, used, nothing) {
  const total = room.total ?? room.max;
  const whole = total > 0;
  show(made.bar, whole);
  if (!whole) {
    setText(made.figures, nothing);
    return;
  }
  const counted = room.reserved ?? 0;
  const ours = Math.min(used, counted);
  const others = Math.max(0, room.external ?? 0);
  const rest = total - counted - others;
  const open = Math.max(0, Math.min(room.free ?? rest, rest));
  const values = { ours, promised: counted - ours, others, open, held: Math.max(0, rest - open) };
  for (const part of PARTS) {
    const share = `${((100 * values[part]) / total).toFixed(2)}%`;
    if (made.parts[part].style.width !== share) made.parts[part].style.width = share;
  }
  const text = `${size(room.free)} free of ${size(total)}`;
  setText(made.figures, text);
  const said = `ours ${size(ours)}, reserved for ours ${size(values.promised)}, other programs ${size(room.external)}, free for models ` +
    `${size(room.free)}, kept back ${size(values.held)}, total ${size(total)}`;
  setAttribute(made.bar, "aria-label", `${made.name}: ${said}`);
  setAttribute(made.bar, "title", `${said}; in use by anybody ${size(room.used)}`);
}

function make() {
  const parts = {
    name: el("h3"), state: badge(), self: el("span", { look: "tag", text: "this node" }),
    vram: makeBar("VRAM"), ram: makeBar("Memory"),
    devices: el("ul", { look: "devices" }), facts: el("p", { look: "facts" }),
    about: el("p", { look: "about dim" }), problems: el("ul", { look: "problems" }),
    acts: el("div", { look: "acts" }), node: null,
  };
  parts.drain = button("Drain…", () => askToDrain(parts.node, true), { "data-act": "drain" });
  parts.undrain = button("Undrain…", () => askToDrain(parts.node, false), { "data-act": "undrain" });
  parts.link = el("a", { text: "Its dashboard", target: "_blank", rel: "noreferrer noopener" });
  parts.more = button("More…", () => showNodeActs(parts.node, last), { "data-act": "more" });
  parts.acts.append(parts.drain, parts.undrain, parts.more, parts.link);
  parts.root = el("article", { look: "card node" },
    el("div", { look: "line" }, parts.name, parts.self, parts.state),
    parts.vram.root, parts.ram.root, parts.devices, parts.facts, parts.problems, parts.about, parts.acts);
  return parts;
}

function stateOf(node) {
  if (node.status === "asleep") return ["idle", "asleep"];
  if (node.status === "suspect") return ["busy", "not heard of"];
  return node.ready ? ["good", "ready"] : ["busy", "takes no requests"];
}

function update(parts, node, now) {
  parts.node = node;
  parts.root.dataset.node = node.id;
  setText(parts.name, node.id);
  setAttribute(parts.name, "title", node.id);
  show(parts.self, node.self);
  const [look, text] = stateOf(node);
  setBadge(parts.state, look, text, node.reason ?? "");
  const held = (name) => last.instances.reduce((sum, one) => sum + (one.node === node.id ? one[name] ?? 0 : 0), 0);
  updateBar(parts.vram, node.memory.vram, held("vram"), node.devices.length ? "not known" : "no GPU");
  updateBar(parts.ram, node.memory.ram, held("ram"), "not known");
  keyed(parts.devices, node.devices.map((one, index) => ({ ...one, index })), (one) => one.index,
    () => el("li"), (row, one) => {
      const load = one.utilization === null ? "" : ` · ${Math.round(one.utilization * 100)} % busy`;
      setText(row, one.error ? `${one.name}: ${one.error}` : `${one.name} · ${size(one.used)} of ${size(one.total)} used${load}`);
    });
  const facts = [`${count(node.running)} running`, `${count(node.queue)} waiting`];
  if (node.link) {
    facts.push(node.link.direct ? `${duration(node.link.round_trip_ms)} away` : "reached through others");
    if (node.link.forwards_in_flight) facts.push(`${count(node.link.forwards_in_flight)} forwarded`);
  }
  if (node.started) facts.push(`up ${age(now - node.started)}`);
  setText(parts.facts, facts.join(" · "));
  const problems = [...node.problems];
  if (!node.ready && node.reason) problems.unshift(node.reason);
  if (node.link?.breaker && !["closed", "ok"].includes(node.link.breaker)) problems.push(`breaker: ${node.link.breaker}`);
  if (node.link?.problem) problems.push(`the last try failed: ${node.link.problem}`);
  if (!node.fresh && node.status === "alive") problems.push("it can't be asked from here: little is known, and may be old");
  if (node.status === "suspect" && node.last_seen) problems.push(`last heard of ${age(now - node.last_seen)} ago`);
  keyed(parts.problems, [...new Set(problems)], (text_) => text_, (text_) => el("li", { text: text_ }), () => {});
  const engine = [node.engine, node.engine_version].filter(Boolean).join(" ");
  setText(parts.about, [node.version && `llamesh ${node.version}`, engine && `engine ${engine}`, node.address].filter(Boolean).join(" · "));
  setAttribute(parts.about, "title", node.started ? `started ${moment(node.started)}` : "");
  const drained = node.drained ?? !node.ready;
  show(parts.drain, !drained);
  show(parts.undrain, drained);
  const why = whyNotAt(node);
  for (const act of [parts.drain, parts.undrain, parts.more]) {
    allow(act, why);
    setAttribute(act, "aria-label", `${act.textContent} ${node.id}`);
  }
  const href = dashboardOf(node);
  show(parts.link, href !== null);
  if (href) setAttribute(parts.link, "href", href);
}

export function showNodes(document, now) {
  last = document;
  const nodes = [...document.nodes].sort((a, b) => b.self - a.self || a.id.localeCompare(b.id));
  keyed(at("node-cards"), nodes, (node) => node.id, make, (parts, node) => update(parts, node, now));
}
