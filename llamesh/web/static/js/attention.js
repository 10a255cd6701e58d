// What needs attention: one quiet line when nothing does.

import { at, el, keyed, setAttribute, setLook, setText, show } from "./dom.js";
import { age, moment, plural, words } from "./format.js";

function make() {
  const parts = {
    what: el("strong"),
    where: el("span", { look: "dim" }),
    since: el("span", { look: "dim since" }),
    text: el("p", { look: "said" }),
    fix: el("p", { look: "fix" }),
  };
  parts.root = el("li", { look: "concern" },
    el("div", { look: "line" }, parts.what, parts.where, parts.since), parts.text, parts.fix);
  return parts;
}

export function showAttention(document, now) {
  const list = document.attention;
  show(at("concerns"), list.length > 0);
  show(at("calm"), list.length === 0);
  const alive = document.nodes.filter((node) => node.status === "alive").length;
  setText(at("calm"), `All is well: ${plural(alive, "node")} ${alive === 1 ? "answers" : "answer"}, nothing needs attention.`);
  at("calm").classList.add("well");
  const order = [...list].sort((a, b) => (a.level !== "error") - (b.level !== "error") || a.since - b.since);
  keyed(at("concerns"), order, (one) => JSON.stringify([one.what, one.node, one.since, one.text]), make, (parts, one) => {
    setLook(parts.root, one.level === "error" ? "bad" : "busy");
    setText(parts.what, words(one.what));
    setText(parts.where, `on ${one.node}`);
    setText(parts.since, `for ${age(now - one.since)}`);
    setAttribute(parts.since, "title", moment(one.since));
    setText(parts.text, one.text);
    setText(parts.fix, one.fix);
  });
}
