// Requests: those under way, live; those that ended, as this node remembers them.

import { explain, get } from "./api.js";
import { askToCancel } from "./acts.js";
import { decisionOf } from "./decision.js";
import { at, badge, button, el, keyed, setAttribute, setBadge, setText, show } from "./dom.js";
import { count, duration, moment, plural } from "./format.js";
import { allow, whyNotAnywhere } from "./may.js";

const LOOKS = { queued: "idle", loading: "busy", forwarded: "busy", prefill: "busy", decode: "good", done: "off" };
const LISTED = 30;
const EVERY_MS = 3000;
const COLUMNS = 10;
const MOST_KEPT = 480; // pixels

const open = new Set();
let shown = "live";
let ended = [];
let problem = "";
let asked = 0;
let last = null;
let clock = () => 0;
let kept = 0; // the height that the list had, in pixels

/** What is below the list stays where it is when requests end: the list keeps its height, until somebody acts. */
function keepHeight() {
  const box = at("request-box");
  const height = Math.min(box.offsetHeight, MOST_KEPT);
  if (height <= kept) return;
  kept = height;
  box.style.minHeight = `${height}px`;
}

function forgetHeight() {
  kept = 0;
  at("request-box").style.minHeight = "";
}

export function setUpRequests(now) {
  clock = now;
  window.addEventListener("resize", forgetHeight);
  for (const tab of document.querySelectorAll("#requests [data-show]")) {
    tab.addEventListener("click", () => {
      shown = tab.dataset.show;
      for (const other of document.querySelectorAll("#requests [data-show]")) {
        other.setAttribute("aria-pressed", String(other === tab));
      }
      ended = [];
      problem = "";
      asked = 0;
      forgetHeight();
      draw();
      refreshEnded();
    });
  }
}

/** Ask for those that ended, at most every three seconds, while somebody looks at them. */
export async function refreshEnded() {
  if (shown === "live" || document.hidden || Date.now() - asked < EVERY_MS) return;
  asked = Date.now();
  const wanted = shown;
  try {
    const answer = await get(`api/v1/requests?limit=${LISTED}${wanted === "failed" ? "&failed=1" : ""}`);
    if (wanted !== shown) return;
    ended = answer.requests.filter((one) => one.phase === "done");
    problem = "";
  } catch (error) {
    problem = explain(error);
  }
  draw();
}

const cell = (name, look = "") => el("td", { look, "data-name": name });

function make(item) {
  const parts = {
    fold: cell("", "fold-button"), who: cell("Request"), id: el("span", { look: "name mono" }), model: el("small", { look: "dim" }),
    phaseCell: cell("Phase"), phase: badge(), waits: el("small", { look: "dim" }), path: cell("Path", "path"),
    ms: cell("Time", "n"), prompt: cell("Prompt", "n"), cached: cell("Cached", "n"), tokens: cell("Tokens", "n"),
    first: cell("First token", "n"), acts: cell("", "end"), detail: el("div", { look: "detail" }), one: item, told: "",
  };
  parts.who.append(parts.id, parts.model);
  parts.phaseCell.append(parts.phase, parts.waits);
  parts.toggle = button("", () => {
    if (open.has(item.id)) open.delete(item.id);
    else open.add(item.id);
    forgetHeight();
    draw();
  }, { look: "toggle", "aria-label": `Details of ${item.id}` });
  parts.fold.append(parts.toggle);
  parts.cancel = button("Cancel…", () => askToCancel(parts.one), { "data-act": "cancel", "aria-label": `Cancel… ${item.id}` });
  parts.acts.append(parts.cancel);
  parts.line = el("tr", {}, parts.fold, parts.who, parts.phaseCell, parts.path, parts.ms, parts.prompt,
    parts.cached, parts.tokens, parts.first, parts.acts);
  return parts;
}

function update(parts, one) {
  parts.one = one;
  const done = one.phase === "done";
  setText(parts.id, one.id);
  setAttribute(parts.id, "title", `${one.id} · ${one.path} · started ${moment(one.started)}`);
  setText(parts.model, [one.model ?? "no model", one.key && `key ${one.key}`, one.streams && "streams"].filter(Boolean).join(" · "));
  const failed = done && (one.error || one.status >= 400);
  setBadge(parts.phase, failed ? "bad" : done ? "good" : LOOKS[one.phase], done ? `${one.status || "cut"}${one.error ? ` ${one.error}` : ""}` : one.phase);
  setText(parts.waits, done ? (failed ? one.message ?? "" : "") : one.waiting_for ?? "");
  setText(parts.path, one.via.length ? one.via.join(" → ") : one.node);
  setText(parts.ms, duration(done ? one.ms : Math.max(0, (clock() - one.started) * 1000)));
  setText(parts.prompt, count(one.prompt_tokens));
  setText(parts.cached, count(one.cached_tokens));
  setText(parts.tokens, count(one.tokens));
  setText(parts.first, duration(one.first_token_ms));
  show(parts.cancel, !done);
  allow(parts.cancel, whyNotAnywhere());
  const isOpen = open.has(one.id);
  setAttribute(parts.toggle, "aria-expanded", String(isOpen));
  if (isOpen) fillDetail(parts, one);
}

function fillDetail(parts, one) {
  const told = JSON.stringify([one.decision, one.tries, one.served_by, one.message, one.queue_ms, one.instance, one.via]);
  if (told === parts.told) return;
  parts.told = told;
  const facts = [
    one.served_by && `served by ${one.served_by}${one.instance ? ` (${one.instance})` : ""}`,
    one.queue_ms !== null && `waited ${duration(one.queue_ms)}`,
    one.path, one.streams ? "a stream" : "a whole answer",
  ].filter(Boolean).join(" · ");
  const body = [el("p", { text: facts, look: "dim" })];
  if (one.message) body.push(el("p", { text: one.message, look: "problem" }));
  body.push(...decisionOf(one));
  if (one.tries.length) {
    body.push(el("p", { text: "What didn't work:", look: "dim" }), el("ul", {}, ...one.tries.map((text) => el("li", { text }))));
  }
  parts.detail.replaceChildren(...body);
}

function makeDetail({ id }) {
  return { root: el("tr", { look: "detail-row" }, el("td", { colspan: String(COLUMNS) })), id };
}

function draw() {
  if (!last) return;
  const list = shown === "live" ? [...last.requests].sort((a, b) => b.started - a.started) : ended;
  const rows = list.flatMap((one) => (open.has(one.id) ? [{ one }, { one, detail: true }] : [{ one }]));
  const bodies = new Map();
  keyed(at("request-rows"), rows, ({ one, detail }) => `${detail ? "detail" : "line"} ${one.id}`,
    ({ one, detail }) => {
      if (detail) return makeDetail(one);
      const parts = make(one);
      return { root: parts.line, parts };
    },
    (made, { one, detail }) => {
      if (!detail) {
        update(made.parts, one);
        bodies.set(one.id, made.parts.detail);
      } else if (!made.root.firstElementChild.contains(bodies.get(one.id))) {
        made.root.firstElementChild.replaceChildren(bodies.get(one.id));
      }
    });
  const ids = new Set([...last.requests, ...ended].map((one) => one.id));
  for (const id of open) if (!ids.has(id)) open.delete(id);
  show(at("request-rows").parentElement, list.length > 0);
  show(at("requests-empty"), list.length === 0);
  const nothing = {
    live: "No request is under way. Send one to /v1/chat/completions, or use the chat below.",
    recent: asked ? "This node has answered nothing yet." : "Asking…",
    failed: "None of the requests that this node remembers has failed.",
  };
  setText(at("requests-empty"), problem || nothing[shown]);
  keepHeight();
  setText(at("request-count"), last.requests.length ? `${plural(last.requests.length, "live", "live")}` : "");
}

export function showRequests(document) {
  last = document;
  draw();
}
