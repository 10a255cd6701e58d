// The status page of one node: reads four documents every two seconds, and chats with a model.
// Whatever a model or a node says becomes text nodes, never markup.
"use strict";

const REFRESH_MS = 2000;
const PATIENCE_MS = 5000;
const KEY_NAME = "llamesh-api-key";
const STATUS_LOOK = { loaded: "good", ready: "good", loading: "busy", queued: "busy", starting: "busy", draining: "busy", failed: "bad" };

const at = (id) => document.getElementById(id);
let key = sessionStorage.getItem(KEY_NAME) || "";
let timer = 0;
let talk = []; // the messages of the conversation, as the API takes them
let asking = null; // the AbortController of the answer that is coming

class Refused extends Error {}

// Relative to /ui/, so that the page also works below a prefix of a reverse proxy.
function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  return fetch(`../${path}`, { ...options, headers, cache: "no-store", credentials: "omit" });
}

async function read(path) {
  const response = await call(path, { signal: AbortSignal.timeout(PATIENCE_MS) });
  if (response.status === 401) throw new Refused((await response.json()).error.message);
  if (!response.ok && response.status !== 503) throw new Error(`${path} answered ${response.status}`);
  return response.json();
}

// Status.

function element(name, text = "", look = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (look) made.className = look;
  return made;
}

function row(...cells) {
  const made = element("tr");
  for (const [name, text, look = "", below = ""] of cells) {
    const cell = made.appendChild(element("td"));
    cell.dataset.name = name;
    cell.appendChild(element("span", text, look));
    if (below) cell.appendChild(element("small", below));
  }
  return made;
}

function fill(id, rows, nothing) {
  if (!rows.length) {
    const cell = element("td", nothing, "empty");
    cell.colSpan = 8;
    const only = element("tr");
    only.appendChild(cell);
    rows = [only];
  }
  at(id).replaceChildren(...rows);
}

function age(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const count = (number) => (number ?? 0).toLocaleString("en");

function showTotals(metrics, ready) {
  const waiting = Object.values(metrics.hashes).reduce((sum, one) => sum + one.queue_len, 0);
  const tokens = Object.values(metrics.hashes).reduce((sum, one) => sum + one.tokens_generated_total, 0);
  const free = metrics.node_resources.available_sysmem;
  const totals = [
    ["Running", count(Math.max(0, metrics.current_requests - waiting))],
    ["Waiting", count(waiting)],
    ["Requests", count(metrics.requests_total)],
    ["Errors", count(metrics.errors_total)],
    ["Tokens", count(tokens)],
    ["Free memory", free === null ? "–" : `${(free / 1024).toFixed(1)} GiB`],
  ];
  at("totals").replaceChildren(...totals.map(([name, value]) => {
    const box = element("div");
    box.append(element("dt", name), element("dd", value));
    return box;
  }));
  at("light").className = `light ${ready.status === "ready" ? "good" : "busy"}`;
}

function showModels(models, metrics) {
  fill("models", models.map((model) => {
    const about = model.metadata;
    const stats = metrics.hashes[`${about.model}:${about.profile_id}`] || {};
    const status = model.status.value;
    const speed = about.estimated_tokens_per_second;
    return row(
      ["Model", model.id, "", about.profile_description || about.description],
      ["Status", status, STATUS_LOOK[status] || "dim"],
      ["Tokens/s", speed ? speed.toFixed(1) : "–"],
      ["Context", model.context_length ? count(model.context_length) : "–"],
      ["Waiting", count(stats.queue_len)],
      ["Running", count(Math.max(0, (stats.current_requests ?? 0) - (stats.queue_len ?? 0)))],
      ["Requests", count(stats.requests_total)],
      ["Errors", count(stats.errors_total), stats.errors_total ? "bad" : ""],
    );
  }), "The cookbook has no enabled model.");
  const names = models.map((model) => model.id);
  const options = [...at("model").options].map((option) => option.value);
  if (names.join("\n") !== options.join("\n")) {
    const chosen = at("model").value;
    at("model").replaceChildren(...names.map((name) => new Option(name, name, false, name === chosen)));
  }
}

function showInstances(running) {
  fill("instances", running.map((one) => row(
    ["Instance", one.instance],
    ["State", one.state, STATUS_LOOK[one.state] || "dim"],
    ["Slots busy", `${one.busy} of ${one.slots}`],
    ["Age", age(one.age_seconds)],
    ["Process", one.pid === null ? "–" : String(one.pid)],
  )), "None is running; the first request starts one.");
}

function showAbout(version) {
  at("node").textContent = version.node_id;
  document.title = `${version.node_id} · llamesh`;
  at("about").textContent = `llamesh ${version.version} · engine: ${version.engine}, ${version.llama_cpp_version}`;
}

function notice(text) {
  at("notice").textContent = text;
  at("notice").hidden = !text;
}

function askForKey(show) {
  if (show && at("key-form").hidden) {
    at("key-form").hidden = false;
    at("key").focus();
  } else if (!show) {
    at("key-form").hidden = true;
  }
}

async function refresh() {
  clearTimeout(timer);
  try {
    showAbout(await read("version"));
    const [models, running, metrics, ready] = await Promise.all(
      ["v1/models", "running", "metrics/json", "readyz"].map(read));
    askForKey(false);
    showTotals(metrics, ready);
    showModels(models.data, metrics);
    showInstances(running.running);
    notice(ready.status === "ready" ? "" : "This node is draining: it takes no new requests.");
  } catch (error) {
    at("light").className = "light bad";
    if (error instanceof Refused) {
      askForKey(true);
      notice(key ? error.message : "");
    } else {
      notice(`The node can't be reached (${error.message}); trying again.`);
    }
  }
  clearTimeout(timer);
  if (!document.hidden) timer = setTimeout(refresh, REFRESH_MS);
}

// Chat.

function say(look, text = "") {
  const made = element("p", text, look);
  const box = at("talk");
  box.hidden = false;
  box.appendChild(made);
  box.scrollTop = box.scrollHeight;
  return made;
}

// Text goes to the end of a paragraph; the view follows only a reader who is at the end already.
function add(paragraph, text) {
  const box = at("talk");
  const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  paragraph.append(text);
  if (follows) box.scrollTop = box.scrollHeight;
}

// The lines of a stream: server-sent events end theirs with a line feed, maybe a carriage return before.
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n");
    rest = parts.pop();
    yield* parts.map((part) => part.replace(/\r$/, ""));
  }
}

async function* chunks(response) {
  for await (const line of lines(response.body)) {
    if (line.startsWith(": ")) at("speed").textContent = line.slice(2); // what the request waits for
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(chunk.error.message);
    yield chunk;
  }
  throw new Error("the answer was cut off");
}

async function ask(model, messages, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    signal,
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ model, messages, stream: true, stream_options: { include_usage: true } }),
  });
  if (response.ok) return response;
  if (response.status === 401) askForKey(true);
  const text = await response.text();
  let message = text;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Not JSON: shown as it is.
  }
  throw new Error(`${response.status}: ${message}`);
}

async function send() {
  const question = at("question").value.trim();
  const model = at("model").value;
  if (!question || !model || asking) return;
  at("question").value = "";
  talk.push({ role: "user", content: question });
  say("user", question);
  asking = new AbortController();
  at("send").disabled = true;
  at("stop").disabled = false;
  at("speed").textContent = "asking…";
  const conversation = talk;
  const started = performance.now();
  let answer = "", paragraph = null, thought = null, first = 0, tokens = 0;
  try {
    for await (const chunk of chunks(await ask(model, conversation, asking.signal))) {
      tokens = chunk.usage?.completion_tokens ?? tokens;
      const delta = chunk.choices?.[0]?.delta;
      const text = delta?.content || "", aside = delta?.reasoning_content || "";
      if (!text && !aside) continue;
      if (!first) {
        first = performance.now();
        at("speed").textContent = "answering…";
      }
      if (aside) add(thought ??= say("thought"), aside);
      if (text) add(paragraph ??= say("answer"), text);
      answer += text;
    }
    const seconds = (performance.now() - first) / 1000;
    const speed = first && tokens > 1 ? `, then ${((tokens - 1) / seconds).toFixed(0)} tokens/s` : "";
    at("speed").textContent = first ? `first token after ${((first - started) / 1000).toFixed(2)} s${speed}` : "an empty answer";
  } catch (error) {
    at("speed").textContent = error.name === "AbortError" ? "stopped" : "";
    if (error.name !== "AbortError") say("wrong", error.message);
  }
  // An unanswered question isn't part of the conversation.
  if (answer) conversation.push({ role: "assistant", content: answer });
  else conversation.pop();
  asking = null;
  at("send").disabled = false;
  at("stop").disabled = true;
}

at("chat-form").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
});
at("stop").addEventListener("click", () => asking?.abort());
at("clear").addEventListener("click", () => {
  asking?.abort();
  talk = [];
  at("talk").replaceChildren();
  at("talk").hidden = true;
  at("speed").textContent = "";
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  at("key").value = "";
  sessionStorage.setItem(KEY_NAME, key);
  refresh();
});
document.addEventListener("visibilitychange", () => document.hidden || refresh());
refresh();
