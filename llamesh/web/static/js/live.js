// The state of the mesh as it changes: keeps the stream open, resumes it, says when it is lost.

import { call, keyGiven, Refused } from "./api.js";
import { events } from "./sse.js";

const SILENCE_MS = 25_000; // a beat comes every ten seconds
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 15_000;
const HIDDEN_MS = 60_000; // a page that nobody sees lets go of the stream

export class Live {
  /** onChange(document, names of the sections that changed, whether all of it is new); onStatus(look, text, canRetry). */
  constructor(onChange, onStatus) {
    this.onChange = onChange;
    this.onStatus = onStatus;
    this.document = null;
    this.skew = 0; // seconds that the node's clock is ahead of ours
    this.lastId = "";
    this.failures = 0;
    this.stop = null;
    this.wake = () => {};
    this.hideTimer = 0;
    document.addEventListener("visibilitychange", () => this.visibility());
    window.addEventListener("online", () => this.retry());
  }

  /** The node's time now, in Unix seconds. */
  now() {
    return Date.now() / 1000 + this.skew;
  }

  retry() {
    this.wake();
  }

  visibility() {
    clearTimeout(this.hideTimer);
    if (document.hidden) this.hideTimer = setTimeout(() => this.stop?.abort(), HIDDEN_MS);
    else this.wake();
  }

  async run() {
    for (;;) {
      try {
        await this.once();
        throw new Error("the stream ended");
      } catch (error) {
        if (error instanceof Refused && error.status === 401) {
          this.onStatus("idle", "needs a key", false);
          await keyGiven();
          continue;
        }
        await this.pause(error);
      }
    }
  }

  async once() {
    this.stop = new AbortController();
    const watch = { timer: 0 };
    const alive = () => {
      clearTimeout(watch.timer);
      watch.timer = setTimeout(() => this.stop.abort(), SILENCE_MS);
    };
    alive();
    try {
      const headers = { accept: "text/event-stream" };
      if (this.lastId) headers["last-event-id"] = this.lastId;
      const response = await call("api/v1/state/stream", { headers, signal: this.stop.signal });
      for await (const one of events(response.body, alive)) {
        if (one.comment !== undefined) continue;
        this.take(one);
      }
    } finally {
      clearTimeout(watch.timer);
      this.stop.abort();
    }
  }

  take({ event, id, data }) {
    const told = JSON.parse(data);
    if (id) this.lastId = id;
    if (told.time) this.skew = told.time - Date.now() / 1000;
    this.failures = 0;
    this.onStatus("good", "live", false);
    if (event === "snapshot") {
      this.document = told;
      this.onChange(told, Object.keys(told), true);
    } else if (event === "change" && this.document) {
      Object.assign(this.document, told);
      this.onChange(this.document, Object.keys(told), false);
    }
  }

  async pause(error) {
    if (document.hidden) {
      this.onStatus("idle", "paused", false);
      await new Promise((resolve) => (this.wake = resolve));
      return;
    }
    this.failures += 1;
    const backoff = Math.min(LAST_RETRY_MS, FIRST_RETRY_MS * 2 ** (this.failures - 1));
    // Not all viewers of a node that comes back should knock at the same moment.
    const wait = Math.max((error.retryAfter ?? 0) * 1000, backoff * (0.75 + Math.random() / 2));
    const until = Date.now() + wait;
    const what = error instanceof Refused ? error.message : "connection lost";
    const say = () => {
      const seconds = Math.max(1, Math.ceil((until - Date.now()) / 1000));
      this.onStatus("bad", `${what} · retry in ${seconds} s`, true);
    };
    say();
    const ticker = setInterval(say, 1000);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, wait);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    clearInterval(ticker);
    this.wake = () => {};
    this.onStatus("busy", "connecting", false);
  }
}
