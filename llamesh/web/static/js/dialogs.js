// Dialogs that ask before something is done, and short messages about what became of it.

import { explain, setKey, hasKey, onKeyWanted } from "./api.js";
import { at, button, el, show } from "./dom.js";

const TOAST_MS = 7000;
const MOST_TOASTS = 4;

/** A message that goes away by itself; an error stays until it is closed. */
export function toast(text, look = "good") {
  const box = at("toasts");
  const made = el("div", { look: "toast", "data-look": look }, el("span", { text }));
  made.append(button("Close", () => made.remove(), { "aria-label": "Close this message" }));
  box.append(made);
  while (box.children.length > MOST_TOASTS) box.firstElementChild.remove();
  if (look !== "bad") setTimeout(() => made.remove(), TOAST_MS);
}

/**
 * Show a dialog. `acts`: [{text, look, run}]; `run` may take its time: the dialog stays while it does, and
 * stays with the reason when it throws. Without acts it only informs.
 */
export function sheet(title, body, acts = []) {
  const dialog = at("sheet"), problem = at("sheet-problem");
  at("sheet-title").textContent = title;
  at("sheet-body").replaceChildren(...body);
  show(problem, false);
  const close = button(acts.length ? "Cancel" : "Close", () => dialog.close(), { look: "" });
  const made = acts.map(({ text, look = "main", run, disabled = "" }) => {
    const one = button(text, async () => {
      const all = [...at("sheet-acts").children];
      for (const other of all.slice(1)) other.disabled = true;
      show(problem, false);
      try {
        const said = await run();
        if (dialog.open && one.isConnected) dialog.close();
        if (said) toast(said);
      } catch (error) {
        problem.textContent = explain(error);
        show(problem, true);
      }
      for (const other of all.slice(1)) other.disabled = other.dataset.never === "1";
    }, { look, title: disabled || null });
    if (disabled) {
      one.disabled = true;
      one.dataset.never = "1";
    }
    return one;
  });
  at("sheet-acts").replaceChildren(close, ...made);
  if (!dialog.open) dialog.showModal();
  // What was focused may be gone. Where something is chosen, there; else on what does no harm.
  (at("sheet-body").querySelector("select, button:not(:disabled)") ?? close).focus();
}

/** Ask whether to do it. */
export function confirmAct(title, text, label, run, { danger = false, more = [] } = {}) {
  const body = [el("p", { text }), ...more];
  sheet(title, body, [{ text: label, look: danger ? "danger" : "main", run }]);
}

function showKeyDialog(text) {
  const dialog = at("key-dialog");
  at("key-text").textContent = text;
  show(at("key-forget"), hasKey());
  if (!dialog.open) dialog.showModal();
  at("key").focus();
}

export function setUpDialogs() {
  at("sheet-form").addEventListener("submit", (event) => event.preventDefault());
  at("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = at("key").value.trim();
    if (!key) return;
    at("key").value = "";
    at("key-dialog").close();
    setKey(key);
  });
  at("key-close").addEventListener("click", () => at("key-dialog").close());
  at("key-forget").addEventListener("click", () => {
    at("key-dialog").close();
    setKey("");
  });
  at("key-button").addEventListener("click", () => {
    showKeyDialog(hasKey() ? "This tab has a key. Another one replaces it." : "This tab has no key.");
  });
  onKeyWanted((said) => showKeyDialog(said || "This node asks for a key."));
}
