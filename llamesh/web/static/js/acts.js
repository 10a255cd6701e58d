// Loading and unloading models. Every act asks first.

import { post } from "./api.js";
import { confirmAct, sheet } from "./dialogs.js";
import { el } from "./dom.js";
import { count, plural, publicName, size, speed } from "./format.js";
import { dashboardOf } from "./nodes.js";
import { CELLS } from "./cells.js";

/** Ask where to load a model, then do so. */
export function askToLoad(model, document, wanted = "") {
  const select = el("select", { id: "load-node" }, new Option("this node when it has the model, else the best one", ""));
  for (const node of document.nodes) {
    const cell = model.nodes[node.id];
    if (!cell || node.status !== "alive") continue;
    const state = CELLS[cell.state].text;
    select.append(new Option(`${node.id}: ${state}`, node.id, false, node.id === wanted));
  }
  const field = el("div", { look: "field" }, el("label", { text: "Where", for: "load-node" }), select);
  confirmAct(`Load ${model.name}?`,
    "It is started before anyone asks for it. Where there is no room, idle models leave first.", "Load",
    async () => {
      const body = { model: model.name, wait: false };
      if (select.value) body.node = select.value;
      const answer = await post("admin/prewarm", body);
      return `${model.name} is ${answer.status}${answer.node ? ` on ${answer.node}` : ""}`;
    }, { more: [field] });
}

/** Ask whether all instances of a model on this node should end. `key`: "model:profile". */
export function askToUnload(key, document) {
  const here = document.instances.filter((one) => one.model === key && one.node === document.node_id);
  const busy = here.reduce((sum, one) => sum + one.busy, 0);
  const text = `${plural(here.length, "instance")} of it on ${document.node_id} will end. ` +
    (busy ? `${plural(busy, "request")} that ${busy === 1 ? "is" : "are"} answered now ${busy === 1 ? "is" : "are"} finished first.` : "None of them is busy.");
  confirmAct(`Unload ${publicName(key)}?`, text, "Unload", async () => {
    const answer = await post("admin/unload", { model: key });
    return answer.unloading.length ? `unloading ${answer.unloading.join(", ")}` : "nothing of it was loaded";
  }, { danger: true });
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
  add("State", CELLS[cell.state].text);
  add("Why", cell.why);
  add("Instances", count(cell.instances));
  add("Waiting", cell.queue === null ? "" : count(cell.queue));
  add("Speed of one answer", cell.tps === null ? "" : `${speed(cell.tps)} tokens/s`);
  add("Needs", [cell.estimate_vram !== null && `${size(cell.estimate_vram)} VRAM`, cell.estimate_ram !== null && `${size(cell.estimate_ram)} memory`].filter(Boolean).join(", "));
  add("Context", model.context_length ? `${count(model.context_length)} tokens` : "");
  add("Profile", model.key);
  add("About", model.description);
  const body = [facts];
  const href = dashboardOf(node);
  if (href && cell.instances) {
    body.push(el("p", { look: "dim" }, "Models are unloaded at their own node: ",
      el("a", { text: `${node.id}'s dashboard`, href, target: "_blank", rel: "noreferrer noopener" })));
  }
  const log = { text: "Its log", look: "", run: async () => openLog(model.key, node.id) };
  // The next dialog takes the place of this one.
  const load = { text: "Load here…", run: async () => queueMicrotask(() => askToLoad(model, document, node.id)) };
  const unload = { text: "Unload…", look: "danger", run: async () => queueMicrotask(() => askToUnload(model.key, document)) };
  const acts = [log];
  if (!["loaded", "loading", "missing", "never"].includes(cell.state)) acts.push(load);
  if (node.self && cell.instances) acts.push(unload);
  sheet(`${model.name} on ${node.id}`, body, acts);
}
