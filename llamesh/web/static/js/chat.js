// The playground: a conversation with a model, streamed, by the way that any client's request takes.

import { call, explain, get } from "./api.js";
import { faceOf } from "./cells.js";
import { Combo } from "./combo.js";
import { at, el, setText, show } from "./dom.js";
import { count, duration, speed } from "./format.js";
import { Prose } from "./prose.js";
import { events } from "./sse.js";

// The sooner it would answer, the earlier; what has to be downloaded comes after all of these.
const SOONEST = ["loaded", "loading", "fits", "needs_eviction"];
const rankOf = (cell) => {
  const place = SOONEST.indexOf(cell.state);
  return place >= 0 ? place : SOONEST.length + (cell.download ? 0 : 1);
};

const KINDS = ["embedding", "rerank"]; // nothing to chat with

let talk = []; // the messages, as the API takes them
let asking = null; // the AbortController of the answer that is coming
let combo = null;

export function setUpChat() {
  combo = new Combo(at("chat-model"), at("chat-models"));
  at("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  at("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  at("stop").addEventListener("click", () => asking?.abort());
  at("chat-clear").addEventListener("click", () => {
    asking?.abort();
    talk = [];
    at("talk").replaceChildren(at("talk-empty"));
    show(at("talk-empty"), true);
    setText(at("chat-figures"), "");
  });
  at("talk").append(at("talk-empty"));
}

export function showChatModels(document) {
  combo.setItems(document.models.filter((one) => !KINDS.includes(one.kind)).map((one) => {
    const cells = Object.entries(one.nodes);
    const rank = Math.min(...cells.map(([, cell]) => rankOf(cell)));
    const best = cells.filter(([, cell]) => rankOf(cell) === rank);
    const where = best.length ? `${faceOf(best[0][1]).text} on ${best.map(([node]) => node).join(", ")}` : "";
    return { value: one.name, note: [where, one.description].filter(Boolean).join(" · "), rank };
  }));
}

// The view follows only a reader who is at the end already.
function following(act) {
  const box = at("talk");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
  const result = act();
  if (follows) box.scrollTop = box.scrollHeight;
  return result;
}

function say(look, who, text = "") {
  show(at("talk-empty"), false);
  const body = el("div", { look: "body" });
  following(() => at("talk").append(el("article", { look: `said-by ${look}` }, el("span", { text: who, look: "who dim" }), body)));
  const prose = new Prose(body);
  if (text) prose.add(text);
  return prose;
}

async function* chunks(response) {
  for await (const one of events(response.body)) {
    if (one.comment !== undefined) {
      if (one.comment) setText(at("chat-figures"), one.comment); // what the request waits for
      continue;
    }
    if (one.data === "[DONE]") return;
    const chunk = JSON.parse(one.data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("The answer was cut off.");
}

function ask(model, messages, signal) {
  const system = at("chat-system").value.trim();
  const body = {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  const most = at("chat-tokens").valueAsNumber;
  if (most >= 1) body.max_tokens = Math.round(most);
  return call("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  });
}

/** Of an answer that began and was cut the browser tells nothing; the node's record of it does. */
async function whyCut(id) {
  if (!id) return "";
  try {
    const record = await get(`api/v1/requests/${id.split("/").map(encodeURIComponent).join("/")}`);
    return record.message ?? "";
  } catch {
    return ""; // the node is gone, too: the first error says so
  }
}

class Meter {
  constructor() {
    this.asked = performance.now();
    this.first = 0;
    this.last = 0;
    this.pieces = 0;
    this.usage = null;
    this.node = "";
    this.id = ""; // of the request, as soon as its answer began
  }

  piece() {
    this.last = performance.now();
    this.first ||= this.last;
    this.pieces += 1;
  }

  text(end) {
    if (!this.first) return end;
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const seconds = (this.last - this.first) / 1000;
    const parts = [`first token ${duration(this.first - this.asked)}`, `${count(tokens)} tokens`];
    if (tokens > 1 && seconds > 0) parts.push(`${speed((tokens - 1) / seconds)} tokens/s`);
    if (this.node) parts.push(this.node);
    if (end) parts.push(end);
    return parts.join(" · ");
  }
}

function busy(is) {
  show(at("send"), !is);
  show(at("stop"), is);
}

async function send() {
  const question = at("question").value.trim();
  const model = combo.value;
  if (!question || asking) return;
  if (!model) {
    setText(at("chat-figures"), "There is no model to ask.");
    return;
  }
  const conversation = talk;
  asking = new AbortController();
  at("question").value = "";
  conversation.push({ role: "user", content: question });
  say("user", "you", question);
  busy(true);
  setText(at("chat-figures"), "asking");
  const meter = new Meter();
  let answer = null, thought = null, end = "";
  try {
    const response = await ask(model, conversation, asking.signal);
    meter.id = response.headers.get("x-request-id") ?? "";
    meter.node = response.headers.get("x-llamesh-node") ?? "";
    for await (const chunk of chunks(response)) {
      meter.usage = chunk.usage ?? meter.usage;
      const delta = chunk.choices?.[0]?.delta;
      const aside = delta?.reasoning_content || "", text = delta?.content || "";
      if (!aside && !text) continue;
      meter.piece();
      if (aside) (thought ??= say("thought", "thinks")) && following(() => thought.add(aside));
      if (text) (answer ??= say("model", model)) && following(() => answer.add(text));
      setText(at("chat-figures"), meter.text(""));
    }
    if (!meter.first) end = "an empty answer";
  } catch (error) {
    if (error.name === "AbortError") end = "stopped";
    else say("wrong", "error", await whyCut(meter.id) || explain(error));
  }
  setText(at("chat-figures"), meter.text(end));
  // An unanswered question isn't part of the conversation.
  if (answer) conversation.push({ role: "assistant", content: answer.text });
  else conversation.pop();
  asking = null;
  busy(false);
  if (document.activeElement === document.body) at("question").focus({ preventScroll: true });
}
