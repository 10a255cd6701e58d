// Server-sent events from a fetched body: unlike EventSource, a fetch can carry a key.

const MOST_BUFFERED = 64 << 20; // characters of one line; a state of a large mesh is some MiB

async function* lines(body, onBytes) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      onBytes();
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      if (rest.length > MOST_BUFFERED) throw new Error("a line of the stream is too long");
      for (const part of parts) yield part.endsWith("\r") ? part.slice(0, -1) : part;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops listening also hangs up
  }
}

/** Yields {event, id, data, comment}; comments come alone. `onBytes` is called for every sign of life. */
export async function* events(body, onBytes = () => {}) {
  let event = "", id = "", data = null;
  for await (const line of lines(body, onBytes)) {
    if (line === "") {
      if (data !== null) yield { event: event || "message", id, data };
      event = "";
      data = null;
      continue;
    }
    if (line.startsWith(":")) {
      yield { comment: line.slice(1).trim() };
      continue;
    }
    const colon = line.indexOf(":");
    const name = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (name === "data") data = data === null ? value : `${data}\n${value}`;
    else if (name === "event") event = value;
    else if (name === "id") id = value;
  }
}
