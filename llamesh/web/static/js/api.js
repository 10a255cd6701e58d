// Calls of this node. The key stays in the tab: sessionStorage, and nowhere else.

const KEY_NAME = "llamesh-api-key";
const PATIENCE_MS = 20_000;

let memory = "";
try {
  memory = sessionStorage.getItem(KEY_NAME) ?? "";
} catch {
  // Storage may be forbidden; then the key lasts as long as the page.
}

const waiting = new Set();
let askForKey = () => {};
let tellRights = () => {};

export const hasKey = () => memory !== "";

export function setKey(key) {
  memory = key;
  try {
    if (key) sessionStorage.setItem(KEY_NAME, key);
    else sessionStorage.removeItem(KEY_NAME);
  } catch {
    // See above.
  }
  for (const resume of [...waiting]) resume();
  tellRights();
}

/** `listener` is called whenever what the viewer may do is perhaps another than before. */
export function onRights(listener) {
  tellRights = listener;
}

/** Who shows the dialog: called with what the node said. */
export function onKeyWanted(show) {
  askForKey = show;
}

/** Until somebody gives another key. */
export function keyGiven() {
  return new Promise((resolve) => {
    const resume = () => {
      waiting.delete(resume);
      resolve();
    };
    waiting.add(resume);
  });
}

/** What a node refused, in its words. */
export class Refused extends Error {
  constructor(status, message, retryAfter = 0) {
    super(message);
    this.name = "Refused";
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** A response that is a success. Paths are relative to /ui/: it also works below a prefix of a proxy. */
export async function call(path, { headers = {}, ...options } = {}) {
  const sent = { ...headers };
  if (memory) sent.authorization = `Bearer ${memory}`;
  const response = await fetch(`../${path}`, {
    ...options,
    headers: sent,
    cache: "no-store",
    credentials: "omit",
  });
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 2000) || `${path} answered ${response.status}`;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // No error of ours: shown as it is.
  }
  if (response.status === 401) askForKey(memory ? message : "");
  if (response.status === 403) tellRights(); // what the key may has changed, perhaps
  throw new Refused(response.status, message, Number(response.headers.get("retry-after")) || 0);
}

export async function get(path) {
  return (await call(path, { signal: AbortSignal.timeout(PATIENCE_MS) })).json();
}

export async function post(path, document) {
  const response = await call(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(document),
    signal: AbortSignal.timeout(PATIENCE_MS),
  });
  return response.json();
}

/** What a failed call is to a person. */
export function explain(error) {
  if (error instanceof Refused) return error.message;
  if (error.name === "TimeoutError") return "The node didn't answer in time.";
  if (error instanceof TypeError) return "The node can't be reached.";
  return error.message;
}
