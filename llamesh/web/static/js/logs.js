// What the llama-servers of a model say, as they say it.

import { call, explain } from "./api.js";
import { at, el, setOptions, setText, show } from "./dom.js";
import { events } from "./sse.js";

const MOST_LINES = 1000;
const RETRY_MS = 3000;

let reading = null; // the AbortController of the stream that is open
let wanted = { model: "", node: "" };

export function setUpLogs() {
  at("log-model").addEventListener("change", follow);
  at("log-node").addEventListener("change", follow);
  at("log-follow").addEventListener("change", toEnd);
}

/** Choose a model and a node from elsewhere on the page. */
export function openLog(model, node) {
  at("log-model").value = model;
  at("log-node").value = node;
  follow();
  at("logs").scrollIntoView({ block: "nearest" });
  at("log-box").focus({ preventScroll: true });
}

export function showLogChoices(document) {
  setOptions(at("log-model"), [["", "choose a model"], ...document.models.map((one) => [one.key, one.name])]);
  setOptions(at("log-node"), document.nodes.map((one) => [one.id, one.id]));
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
  box.append(...batch.map(({ instance, line }) => el("div", {}, el("span", { text: instance.split("#").pop(), look: "who", title: instance }), line)));
  while (box.children.length > MOST_LINES) box.firstElementChild.remove();
  say("");
  toEnd();
}

async function follow() {
  reading?.abort();
  const mine = (reading = new AbortController());
  wanted = { model: at("log-model").value, node: at("log-node").value };
  at("log-lines").replaceChildren();
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
