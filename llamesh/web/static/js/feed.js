// The event feed, the newest first.

import { at, el, keyed, show } from "./dom.js";
import { clock, moment } from "./format.js";

const LOOKS = { info: "idle", warning: "busy", error: "bad" };

let last = null;

export function setUpFeed() {
  at("events-bad").addEventListener("change", () => last && showEvents(last));
}

function make(one) {
  return el("li", { look: "event", "data-look": LOOKS[one.level] ?? "idle" },
    el("time", { text: clock(one.time), title: moment(one.time), datetime: new Date(one.time * 1000).toISOString() }),
    el("span", { text: one.node, look: "where dim" }),
    el("span", { look: "what" }, el("strong", { text: one.event }), " ", one.text === one.event ? "" : one.text));
}

export function showEvents(document) {
  last = document;
  const bad = at("events-bad").checked;
  const list = [...document.events].filter((one) => !bad || one.level !== "info").sort((a, b) => b.time - a.time || b.id - a.id);
  keyed(at("event-rows"), list, (one) => `${one.node} ${one.time} ${one.id}`, make, () => {});
  show(at("events-empty"), list.length === 0);
}
