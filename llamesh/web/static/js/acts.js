// What can be done to models and nodes, here and at any other node. Every act asks first.

import { post } from "./api.js";
import { faceOf } from "./cells.js";
import { confirmAct, sheet } from "./dialogs.js";
import { el } from "./dom.js";
import { count, plural, publicName, size, speed } from "./format.js";
import { whyNotAt, whyNotAnywhere } from "./may.js";

const PAUSES = [["900", "15 minutes"], ["3600", "an hour"], ["14400", "4 hours"], ["", "until it is ended"]];

const nodeOf = (document, id) => document.nodes.find((node) => node.id === id);

/** Ask where to load a model, then do so. */
export function askToLoad(model, document, wanted = "") {
  const select = el("select", { id: "load-node" }, new Option("this node when it has the model, else the best one", ""));
  for (const node of document.nodes) {
    const cell = model.nodes[node.id];
    if (!cell || (node.status !== "alive" && node.status !== "asleep")) continue;
    const why = node.status === "asleep" ? "" : whyNotAt(node);
    const option = new Option(`${node.id}: ${why ? "not from here" : faceOf(cell).text}`, node.id, false, node.id === wanted && !why);
    option.disabled = Boolean(why);
    select.append(option);
  }
  const field = el("div", { look: "field" }, el("label", { text: "Where", for: "load-node" }), select);
  confirmAct(`Load ${model.name}?`,
    "It is started before anyone asks for it. Where there is no room, idle models leave first; what isn't on the node's disk is downloaded first.", "Load",
    async () => {
      const body = { model: model.name, wait: false };
      if (select.value) body.node = select.value;
      const answer = await post("admin/prewarm", body);
      return `${model.name} is ${answer.status}${answer.node ? ` on ${answer.node}` : ""}`;
    }, { more: [field] });
}

/** What unloading does to instances, in a sentence. */
function leaving(instances, where) {
  const busy = instances.reduce((sum, one) => sum + one.busy, 0);
  const are = busy === 1 ? "is" : "are";
  return `${plural(instances.length, "instance")} on ${where} will end. ` +
    (busy ? `${plural(busy, "request")} that ${are} answered now ${are} finished first.` : "None of them is busy.");
}

async function unload(document, node, key) {
  const answer = await post("admin/unload", { ...(key && { model: key }), node });
  return answer.unloading.length ? `unloading ${answer.unloading.join(", ")} on ${node}` : "nothing of it was loaded";
}

/** Ask whether all instances of a model should end, on one node. `key`: "model:profile". */
export function askToUnload(key, node, document) {
  const there = document.instances.filter((one) => one.model === key && one.node === node);
  confirmAct(`Unload ${publicName(key)} from ${node}?`, leaving(there, node), "Unload",
    () => unload(document, node, key), { danger: true });
}

function askToUnloadAll(node, document) {
  const there = document.instances.filter((one) => one.node === node.id);
  confirmAct(`Unload everything from ${node.id}?`, leaving(there, node.id), "Unload all",
    () => unload(document, node.id), { danger: true });
}

export function askToDrain(node, drain) {
  if (!drain) {
    confirmAct(`Undrain ${node.id}?`, "It takes requests again.", "Undrain", async () => {
      await post("admin/undrain", { node: node.id });
      return `${node.id} takes requests again`;
    });
    return;
  }
  confirmAct(`Drain ${node.id}?`,
    `It takes no new requests until you undrain it. Those that are there (${plural(node.running ?? 0, "runs", "run")}, ` +
    `${plural(node.queue ?? 0, "waits", "wait")}) are finished.`, "Drain", async () => {
      await post("admin/drain", { node: node.id });
      return `${node.id} is draining`;
    }, { danger: true });
}

function askToPause(node) {
  const select = el("select", { id: "pause-time" }, ...PAUSES.map(([value, text]) => new Option(text, value)));
  const field = el("div", { look: "field" }, el("label", { text: "For", for: "pause-time" }), select);
  confirmAct(`Pause ${node.id}?`, "All its models leave after their requests, and it starts none: the machine is its owner's for a while.", "Pause", async () => {
    await post("admin/pause", { node: node.id, ...(select.value && { seconds: Number(select.value) }) });
    return `${node.id} is paused`;
  }, { more: [field], danger: true });
}

function askToResume(node) {
  confirmAct(`End the pause of ${node.id}?`, "It starts models and takes requests again, unless something else keeps it from that.", "End the pause", async () => {
    const answer = await post("admin/pause", { node: node.id, seconds: 0 });
    return answer.status === "ready" ? `the pause of ${node.id} is over` : `${node.id}: ${answer.reason}`;
  });
}

function askToReload(node) {
  confirmAct(`Read the files of ${node.id} again?`, "Configuration and cookbook. A mistake in them changes nothing, and is shown here.", "Read them", async () => {
    const { added, changed, removed, settings, needs_restart: later } = await post("admin/reload", { node: node.id });
    const news = [...added, ...changed, ...removed, ...settings].length;
    return `${node.id}: ${news ? plural(news, "change") : "nothing new"}${later.length ? `; ${later.join(", ")} at the next start` : ""}`;
  });
}

function askToRebuild(node) {
  confirmAct(`Update llama.cpp on ${node.id}?`, "It looks for a newer version, builds and tests it, and moves over while it serves. Without llama_cpp.enabled there is nothing to do.", "Update", async () => {
    await post("admin/rebuild-llama", { node: node.id });
    return `${node.id} looks for a newer llama.cpp`;
  });
}

/** Everything that is done seldom. */
export function showNodeActs(node, document) {
  const loaded = document.instances.some((one) => one.node === node.id);
  const choices = [
    ["Unload all…", "every model, after its requests", () => askToUnloadAll(node, document), loaded ? "" : "nothing is loaded there"],
    ["Pause…", "give the machine back to its owner", () => askToPause(node)],
    ["End the pause…", "models and requests are taken again", () => askToResume(node)],
    ["Read files…", "configuration and cookbook", () => askToReload(node)],
    ["Update llama.cpp…", "build the newest, and move over", () => askToRebuild(node)],
  ];
  const list = el("ul", { look: "choices" });
  for (const [text, about, run, why] of choices) {
    const one = el("button", { type: "button", text });
    one.disabled = Boolean(why);
    one.addEventListener("click", run); // the next dialog takes the place of this one
    list.append(el("li", {}, one, el("span", { text: why || about, look: "dim" })));
  }
  sheet(`${node.id}: more`, [list]);
}

export function askToCancel(request) {
  confirmAct("Cancel this request?",
    `${request.id} (${request.model ?? "no model yet"}): its client gets an error, or its stream is cut; the slot is free again.`,
    "Cancel the request", async () => {
      const answer = await post("admin/cancel", { request_id: request.id });
      return `cancelled on ${answer.node}`;
    }, { danger: true });
}

/** All about a model on a node, with what can be done about it. */
export function showCell(model, node, document, openLog) {
  const cell = model.nodes[node.id];
  const facts = el("dl", { look: "sheet-facts" });
  const add = (name, value) => value && facts.append(el("dt", { text: name }), el("dd", { text: value }));
  add("State", faceOf(cell).text);
  add("Why", cell.why);
  add("Instances", count(cell.instances));
  add("Waiting", cell.queue === null ? "" : count(cell.queue));
  add("Speed of one answer", cell.tps === null ? "" : `${speed(cell.tps)} tokens/s`);
  add("Needs", [cell.estimate_vram !== null && `${size(cell.estimate_vram)} VRAM`, cell.estimate_ram !== null && `${size(cell.estimate_ram)} memory`].filter(Boolean).join(", "));
  add("Context", model.context_length ? `${count(model.context_length)} tokens` : "");
  add("Profile", model.key);
  add("About", model.description);
  const log = { text: "Its log", look: "", run: async () => openLog(model.key, node.id) };
  // The next dialog takes the place of this one.
  const why = whyNotAt(node);
  const load = { text: "Load here…", disabled: why, run: async () => queueMicrotask(() => askToLoad(model, document, node.id)) };
  const unloads = { text: "Unload…", look: "danger", disabled: why, run: async () => queueMicrotask(() => askToUnload(model.key, node.id, document)) };
  const acts = [log];
  if (!["loaded", "loading", "never"].includes(cell.state)) acts.push(load);
  if (cell.instances) acts.push(unloads);
  const body = [facts];
  if (why && acts.length > 1) body.push(el("p", { text: `Not possible: ${why}.`, look: "dim" }));
  sheet(`${model.name} on ${node.id}`, body, acts);
}
