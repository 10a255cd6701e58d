// Why a request went where it went: what each node would have cost, term by term.

import { el } from "./dom.js";
import { duration } from "./format.js";

const TERMS = ["link", "wake", "download", "room", "start", "queue", "prefill", "decode"];

function bar(one, longest) {
  const box = el("div", { look: "terms", role: "img" });
  const said = [];
  for (const name of TERMS) {
    const ms = one.parts[name];
    if (!ms) continue;
    const part = el("span", { look: `term ${name}` });
    part.style.width = `${(100 * ms) / longest}%`;
    part.title = `${name} ${duration(ms)}`;
    box.append(part);
    said.push(`${name} ${duration(ms)}`);
  }
  box.setAttribute("aria-label", said.join(", ") || "nothing to wait for");
  return [box, said.join(" · ")];
}

/** The rows of a decision as elements. */
export function decisionOf(request) {
  const candidates = [...request.decision].sort((a, b) => (a.total ?? Infinity) - (b.total ?? Infinity));
  if (!candidates.length) {
    return [el("p", { look: "dim", text: request.via.length > 1
      ? "The node that sent it on has no terms any more."
      : "There was nothing to decide: no other node could have served it, or a free slot was here." })];
  }
  const longest = Math.max(...candidates.map((one) => one.total ?? 0), 1);
  const list = el("ol", { look: "candidates" });
  for (const one of candidates) {
    const chosen = one.node === request.served_by;
    const row = el("li", { look: chosen ? "chosen" : "" },
      el("span", { text: one.node, look: "name" }),
      el("span", { text: one.total === null ? "–" : duration(one.total), look: "n" }));
    if (one.total === null) {
      row.append(el("span", { text: one.why_not ?? "it can't serve this", look: "dim" }));
    } else {
      const [box, said] = bar(one, longest);
      row.append(el("div", {}, box, el("small", { text: [said || "nothing to wait for", one.why_not].filter(Boolean).join(" · "), look: "dim" })));
    }
    list.append(row);
  }
  return [el("p", { look: "dim", text: "What each node would have cost, in expected time:" }), list];
}
