// Puts the page together: the live state goes to the views, once a frame, and only what changed.

import { showAttention } from "./attention.js";
import { setUpCharts, showCharts } from "./charts.js";
import { setUpChat, showChatModels } from "./chat.js";
import { setUpDialogs } from "./dialogs.js";
import { at, setLook, setText, show } from "./dom.js";
import { setUpFeed, showEvents } from "./feed.js";
import { plural } from "./format.js";
import { setUpInstances, showInstances } from "./instances.js";
import { Live } from "./live.js";
import { openLog, setUpLogs, showLogChoices } from "./logs.js";
import { askWhetherAllowed, setUpMay } from "./may.js";
import { setUpMatrix, showMatrix } from "./matrix.js";
import { showNodes } from "./nodes.js";
import { refreshEnded, setUpRequests, showRequests } from "./requests.js";

// View -> the sections that it shows.
const VIEWS = [
  [(d) => showAttention(d, live.now()), ["attention", "nodes"]],
  [(d) => showNodes(d, live.now()), ["nodes", "instances"]],
  [showMatrix, ["models", "nodes"]],
  [(d) => showInstances(d, live.now()), ["instances", "models"]],
  [showRequests, ["requests"]],
  [showEvents, ["events"]],
  [showCharts, ["history", "nodes"]],
  [showLogChoices, ["models", "nodes"]],
  [showChatModels, ["models"]],
  [showHead, ["nodes", "models", "instances", "requests"]],
];
const TICKING = [0, 1, 3, 4]; // ages go on by themselves

let due = new Set();
let planned = false;

function showHead(document_) {
  setText(at("node-name"), document_.node_id);
  const title = `${document_.attention.length ? `(${document_.attention.length}) ` : ""}${document_.node_id} · llamesh`;
  if (document.title !== title) document.title = title;
  const loaded = document_.instances.filter((one) => one.state === "ready").length;
  setText(at("summary"), [plural(document_.nodes.length, "node"), plural(document_.models.length, "model"),
    `${loaded} loaded`, plural(document_.requests.length, "request")].join(" · "));
  setText(at("about"), `llamesh ${document_.version} · state schema ${document_.schema}`);
}

function draw() {
  planned = false;
  const now = due;
  due = new Set();
  for (const [index, [view, sections]] of VIEWS.entries()) {
    if (now.has(index) || sections.some((name) => now.has(name))) view(live.document);
  }
  document.body.dataset.ready = "1";
}

function plan(names) {
  for (const name of names) due.add(name);
  if (planned) return;
  planned = true;
  requestAnimationFrame(draw); // doesn't come while nobody sees the page
}

const live = new Live(
  (_, names, isNew) => {
    plan(names);
    if (isNew) askWhetherAllowed();
  },
  (look, text, canRetry) => {
    setLook(at("link"), look);
    setText(at("link"), text);
    show(at("retry"), canRetry);
    document.body.classList.toggle("stale", look === "bad");
  },
);

setUpDialogs();
setUpMay(() => plan(["nodes", "models", "instances", "requests"]), () => live.document !== null);
setUpCharts();
setUpMatrix(openLog);
setUpInstances(openLog);
setUpRequests(() => live.now());
setUpFeed();
setUpLogs();
setUpChat();
at("retry").addEventListener("click", () => live.retry());
setInterval(() => {
  if (document.hidden || !live.document) return;
  plan(TICKING);
  refreshEnded();
}, 1000);
live.run();
