// What the llama-servers of a model say, as they say it.

import { call, explain } from "./api.js";
import { at, el, setOptions, setText, show } from "./dom.js";
import { events } from "./sse.js";

const MOST_LINES = 1000;
const RETRY_MS = 3000;

let reading = null; // the AbortController of the stream that is open
let wanted = { model: "", node: "" };
let last = null; // the state of the mesh
const heard = new Set(); // instances that wrote something, ended ones too

export function setUpLogs() {
  at("log-model").addEventListener("change", follow);
  at("log-node").addEventListener("change", follow);
  at("log-child").addEventListener("change", pick);
  at("log-follow").addEventListener("change", toEnd);
}

/** Choose a model, a node and perhaps one instance from elsewhere on the page. */
export function openLog(model, node, child = "") {
  at("log-model").value = model;
  at("log-node").value = node;
  follow();
  showChildren(child);
  at("logs").scrollIntoView({ block: "nearest" });
  at("log-box").focus({ preventScroll: true });
}

export function showLogChoices(document) {
  setOptions(at("log-model"), [["", "choose a model"], ...document.models.map((one) => [one.key, one.name])]);
  setOptions(at("log-node"), document.nodes.map((one) => [one.id, one.id]));
  last = document;
  showChildren();
}

/** The choice of instances: those that run, and those that were heard. `chosen`: the one to show, "" for all. */
function showChildren(chosen = at("log-child").value) {
  const running = (last?.instances ?? []).filter((one) => one.model === wanted.model && one.node === wanted.node);
  const ids = [...new Set([...heard, ...running.map((one) => one.id), ...(chosen ? [chosen] : [])])];
  ids.sort((a, b) => numberOf(a) - numberOf(b));
  setOptions(at("log-child"), [["", "all instances"], ...ids.map((id) => [id, `#${numberOf(id)}`])]);
  at("log-child").value = chosen;
  pick();
}

const numberOf = (id) => Number(id.split("#").pop());

/** Show the lines of the chosen instance only. */
function pick() {
  const child = at("log-child").value;
  for (const line of at("log-lines").children) show(line, !child || line.dataset.child === child);
  toEnd();
}

function say(text) {
  setText(at("log-empty"), text);
  show(at("log-empty"), text !== "");
}

function toEnd() {
  if (at("log-follow").checked) at("log-box").scrollTop = at("log-box").scrollHeight;
}

function add(batch) {
  const box = at("log-lines");
  const child = at("log-child").value;
  box.append(...batch.map(({ instance, line }) => el("div", { "data-child": instance, hidden: Boolean(child) && child !== instance },
    el("span", { text: instance.split("#").pop(), look: "who", title: instance }), line)));
  if (batch.some(({ instance }) => !heard.has(instance) && heard.add(instance))) showChildren();
  while (box.children.length > MOST_LINES) box.firstElementChild.remove();
  say("");
  toEnd();
}

async function follow() {
  reading?.abort();
  const mine = (reading = new AbortController());
  wanted = { model: at("log-model").value, node: at("log-node").value };
  at("log-lines").replaceChildren();
  heard.clear();
  showChildren("");
  if (!wanted.model) {
    say("Choose a model to see what its llama-server says.");
    return;
  }
  while (!mine.signal.aborted) {
    try {
      await read(mine.signal);
    } catch (error) {
      if (mine.signal.aborted) return;
      say(explain(error));
      if (error.status && error.status < 500) return;
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    if (!mine.signal.aborted) at("log-lines").replaceChildren(); // the stream begins with the last lines
  }
}

async function read(signal) {
  const model = wanted.model.split("/").map(encodeURIComponent).join("/");
  const path = `logs/stream/${model}?format=sse&node=${encodeURIComponent(wanted.node)}`;
  const response = await call(path, { signal });
  say("Nothing yet: no instance of this model runs there, or it has said nothing. Lines come here as they are written.");
  let batch = [], planned = 0;
  for await (const one of events(response.body)) {
    if (one.data === undefined) continue;
    batch.push(JSON.parse(one.data));
    planned ||= setTimeout(() => {
      if (!signal.aborted) add(batch);
      batch = [];
      planned = 0;
    }, 50);
  }
}
