// May this viewer administer, and may that node be administered from here? Buttons say so before anyone tries.

import { get, onRights } from "./api.js";
import { at, setAttribute, setText, show } from "./dom.js";

let whyNot = ""; // of this viewer; "" while it isn't known, too: the node has the last word
let redraw = () => {};

/** Why nothing can be done at a node of the state document, "" when it can. */
export function whyNotAt(node) {
  if (whyNot) return whyNot;
  if (!node) return "this node isn't in the mesh any more";
  if (node.self) return "";
  if (node.status === "asleep") return `${node.id} is asleep`;
  if (node.status !== "alive") return `${node.id} doesn't answer at the moment`;
  if (node.accepts_administration === false) {
    return `the owner of ${node.id} allows this only at ${node.id} itself (cluster.accept_administration)`;
  }
  return "";
}

/** Why nothing can be done anywhere, "" when it can. */
export const whyNotAnywhere = () => whyNot;

/** A button that does something: off, with the reason, where that isn't allowed. `or` is another reason. */
export function allow(button, why) {
  if (button.disabled !== Boolean(why)) button.disabled = Boolean(why);
  setAttribute(button, "title", why);
}

/** Ask the node. */
export async function askWhetherAllowed() {
  try {
    const answer = await get("api/v1/access");
    whyNot = answer.administer ? "" : answer.why_not;
  } catch {
    whyNot = ""; // what is wrong is said elsewhere, or by the act itself
  }
  setText(at("look-only-why"), whyNot ? `${whyNot[0].toUpperCase()}${whyNot.slice(1)}.` : "");
  show(at("look-only"), Boolean(whyNot));
  redraw();
}

/** `draw()` shows the buttons anew; `isLive()`: the node has let us in. */
export function setUpMay(draw, isLive) {
  redraw = draw;
  onRights(() => isLive() && askWhetherAllowed());
}
