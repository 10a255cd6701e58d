#!/usr/bin/env python3
"""A llama-server that misbehaves on command, for tests of what must survive it.

Usable as `binary_path`: takes llama-server's flags (`-m --host --port -c -np -a --api-key`; others are
ignored) and answers like it: 503 on `/health` while loading, slots, silent queueing past them, SSE in
chunked encoding with `usage` and `timings` in the last event, `Keep-Alive: timeout=5, max=100` and
meant so. Only the standard library, and any `python3` from 3.9 on runs it.

The model file is a small JSON object that says how to behave, so every profile misbehaves on its own
(`tests.support.fake.fake_profile_file` writes one). A request may carry a member `fake` in its JSON body
with the same keys (those marked *), for that request alone.

Start:
    start_delay S           stay at 503 for S seconds          never_ready true     stay there for ever
    ready_when PATH         stay there until the file exists    open_delay S         no port for S seconds
    exit_at_start {code, lines}   print the lines, exit         lines [...]          print these first
    eat_mb N                allocate and touch N MiB            ignore_term true     survive SIGTERM
    launches [{...}, ...]   overrides for the 1st, 2nd, ... launch of this file (the last one repeats)
Serving:
    slots N, n_ctx N        what it reports (else -np, -c)      no_slots_route, no_props_route   404 there
    close_after N           requests a connection (100)         idle_seconds S       then it closes (5)
    die_after_requests N    answers N inference requests and exits when the next one arrives
One inference request:
  * tokens N                how many (else max_tokens, else 5)  token_delay S        before each
  * pad N                   bytes of padding in each event      headers {...}        more response headers
  * status N                answer this status, with a llama-server error body
  * hang_before_head true   never answer                        refuse true          close without a byte
  * garbage true            answer bytes that aren't HTTP       head_gate PATH       no head before it exists
  * gate PATH               wait for the file before token number `gate_after` (0)
  * die_mid_stream K        exit after K events                 cut_mid_stream K     close after K events
  * cut_body true           promise a whole body, send half of it, close
  * echo true               answer with the head and body as they arrived
What doesn't exist echoes as well. A lost client ends a streaming request at once, any other one runs on
and keeps its slot, as with the real thing. `GET /__fake/stats` counts (see `Stats`). Each request is a
line on stdout: `request METHOD TARGET`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Started as a program, possibly through a link, it still finds its other half.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.support.fake_http import ClientGone, Closed, Connection, Request, counts, error, event

INFERENCE = {
    *("/v1/chat/completions", "/chat/completions", "/v1/completions", "/completions", "/completion"),
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens", "/v1/audio/transcriptions", "/infill"),
    *("/v1/embeddings", "/embeddings", "/embedding", "/v1/rerank", "/rerank", "/v1/reranking", "/reranking"),
    *("/tokenize", "/detokenize", "/apply-template"),
}
PUBLIC = {"/health", "/v1/health", "/__fake/stats"}
POLL_SECONDS = 0.005
DEFAULT_TOKENS = 5


@dataclass
class Stats:
    """What happened so far. Counts are of inference requests, unless the name says otherwise."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    running: int = 0
    max_running: int = 0
    queued: int = 0
    unauthorized: int = 0
    all_requests: int = 0
    connections: int = 0
    open_connections: int = 0
    paths: list[str] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)
    """The last inference request: method, target, headers (a list of pairs), body (text)."""


class FakeServer:
    """The behaviour file's server."""

    def __init__(self, behaviour: dict[str, Any], flags: dict[str, str]) -> None:
        self.behaviour = behaviour
        self.slots = int(behaviour.get("slots") or flags.get("-np") or 2)
        self.n_ctx = int(behaviour.get("n_ctx") or flags.get("-c") or 0) or 4096
        self.name = flags.get("-a") or flags["-m"]
        self.key = flags.get("--api-key") or os.environ.get("LLAMA_API_KEY", "")
        self.stats = Stats()
        self.busy = [False] * self.slots
        self.free_slots = asyncio.Semaphore(self.slots)
        self.ready = False

    async def load(self) -> None:
        """Become ready, if ever."""
        await asyncio.sleep(self.behaviour.get("start_delay", 0))
        if gate := self.behaviour.get("ready_when"):
            await exists(gate)
        if self.behaviour.get("never_ready"):
            return
        say(f"load_model: initializing, n_slots = {self.slots}, n_ctx_slot = {self.n_ctx // self.slots}")
        say("model loaded")
        self.ready = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end."""
        self.stats.connections += 1
        self.stats.open_connections += 1
        connection = Connection(reader, writer)
        try:
            for _ in range(int(self.behaviour.get("close_after", 100))):
                request = await asyncio.wait_for(connection.request(), self.behaviour.get("idle_seconds", 5))
                await self.answer(connection, request)
                if request.header("connection").lower() == "close":
                    break
        except (Closed, ClientGone, asyncio.TimeoutError):  # noqa: UP041 - two things before 3.11
            pass
        finally:
            self.stats.open_connections -= 1
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def answer(self, connection: Connection, request: Request) -> None:
        """Everything between the whole request and the last byte of its reply."""
        say(f"request {request.method} {request.target}")
        self.stats.all_requests += 1
        if (
            self.key
            and request.path not in PUBLIC
            and request.header("authorization") != f"Bearer {self.key}"
        ):
            self.stats.unauthorized += 1
            await connection.reply(401, error("Invalid API Key", "authentication_error", 401))
        elif request.path == "/__fake/stats":
            await connection.reply(200, asdict(self.stats))
        elif not self.ready:
            await connection.reply(503, error("Loading model", "unavailable_error", 503))
        elif request.path in INFERENCE:
            await self.infer(connection, request)
        else:
            content = self.information(request.path)
            await connection.reply(200, request.head + request.body if content is None else content)

    def information(self, path: str) -> Any:
        """The reply of a GET route, None where there is no such route."""
        settings = {"n_ctx": self.n_ctx // self.slots, "params": {}}
        slots = [{"id": number, "is_processing": busy, **settings} for number, busy in enumerate(self.busy)]
        model = {"id": self.name, "object": "model", "meta": {"n_ctx_train": self.n_ctx}}
        routes: dict[str, Any] = {
            "/health": {"status": "ok"},
            "/v1/health": {"status": "ok"},
            "/v1/models": {"object": "list", "data": [model]},
        }
        if not self.behaviour.get("no_slots_route"):
            routes["/slots"] = slots
        if not self.behaviour.get("no_props_route"):
            routes["/props"] = {
                "total_slots": self.slots,
                "default_generation_settings": settings,
                "model_path": self.name,
                "build_info": "fake",
            }
        return routes.get(path)

    async def infer(self, connection: Connection, request: Request) -> None:
        """One inference request: counted, queued for a slot, watched for its client's leaving."""
        stats, told = self.stats, {**self.behaviour, **request.document.get("fake", {})}
        stats.requests += 1
        stats.paths.append(request.path)
        text = request.body.decode("utf-8", "replace")
        stats.last = {
            "method": request.method,
            "target": request.target,
            "headers": request.headers,
            "body": text,
        }
        if stats.requests > told.get("die_after_requests", stats.requests):
            leave(1)
        work = asyncio.ensure_future(self.work(connection, request, told))
        watch = asyncio.ensure_future(connection.fill())
        while not work.done():
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done() and not work.done():
                if watch.result():
                    # The next request, pipelined: it waits in the buffer, and so does its client.
                    await asyncio.wait({work})
                    break
                stats.aborted += 1
                if request.document.get("stream"):
                    work.cancel()
                with contextlib.suppress(asyncio.CancelledError, ClientGone):
                    await work
                raise ClientGone
        watch.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watch
        work.result()
        stats.finished += 1

    async def work(self, connection: Connection, request: Request, told: dict[str, Any]) -> None:
        async with self.slot():
            if told.get("refuse"):
                raise Closed
            if told.get("garbage"):
                await connection.send(b"\x00\xff\xfenothing that speaks HTTP\r\n\r\n")
                raise Closed
            if told.get("hang_before_head"):
                await asyncio.Event().wait()
            if gate := told.get("head_gate"):
                await exists(gate)
            more = told.get("headers", {})
            if (status := told.get("status", 200)) != 200:
                await connection.reply(status, error("told to fail", "server_error", status), more)
            elif told.get("echo"):
                await connection.reply(200, request.head + request.body, more)
            elif request.document.get("stream"):
                await self.stream(connection, request, told)
            else:
                await self.whole(connection, request, told)

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Hold a slot, waiting for one without a word."""
        self.stats.queued += 1
        try:
            await self.free_slots.acquire()
        finally:
            self.stats.queued -= 1
        number = self.busy.index(False)
        self.busy[number] = True
        self.stats.running += 1
        self.stats.max_running = max(self.stats.max_running, self.stats.running)
        try:
            yield
        finally:
            self.stats.running -= 1
            self.busy[number] = False
            self.free_slots.release()

    async def tokens(self, request: Request, told: dict[str, Any]) -> AsyncIterator[str]:
        """The words of the reply, one at a time, at the pace that was asked for."""
        count = told.get("tokens", request.document.get("max_tokens", DEFAULT_TOKENS))
        for number in range(count):
            if (gate := told.get("gate")) and number == told.get("gate_after", 0):
                await exists(gate)
            if delay := told.get("token_delay", 0):
                await asyncio.sleep(delay)
            yield f"t{number} "

    async def stream(self, connection: Connection, request: Request, told: dict[str, Any]) -> None:
        """SSE: one event a token, a last one with the counts, `[DONE]`."""
        await connection.head(200, "text/event-stream", None, told.get("headers", {}))
        chat = "chat" in request.path
        pad = {"pad": "x" * told["pad"]} if told.get("pad") else {}
        sent = 0
        async for word in self.tokens(request, told):
            if sent == told.get("die_mid_stream", -1):
                leave(1)
            if sent == told.get("cut_mid_stream", -1):
                raise Closed
            choice = {"delta": {"content": word}} if chat else {"text": word}
            await connection.chunk(event(self.chunk_document(chat, {**choice, "finish_reason": None}) | pad))
            sent += 1
        last = self.chunk_document(
            chat, {("delta" if chat else "text"): {} if chat else "", "finish_reason": "length"}
        )
        await connection.chunk(event(last | counts(sent)))
        await connection.chunk(b"data: [DONE]\n\n")
        await connection.send(b"0\r\n\r\n")

    async def whole(self, connection: Connection, request: Request, told: dict[str, Any]) -> None:
        """One JSON document."""
        more = told.get("headers", {})
        if "embedding" in request.path:
            inputs = request.document.get("input", "")
            inputs = inputs if isinstance(inputs, list) else [inputs]
            data = [
                {"object": "embedding", "index": index, "embedding": [len(str(text)) / 7, 0.5, -0.25]}
                for index, text in enumerate(inputs)
            ]
            document = {"object": "list", "model": self.name, "data": data} | counts(0)
        elif "rerank" in request.path:
            scores = [
                {"index": index, "relevance_score": float(-index)}
                for index in range(len(request.document.get("documents", [])))
            ]
            document = {"object": "list", "model": self.name, "results": scores} | counts(0)
        else:
            words = [word async for word in self.tokens(request, told)]
            chat, text = "chat" in request.path, "".join(words)
            choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            document = self.chunk_document(chat, {**choice, "finish_reason": "length"}) | counts(len(words))
            document["object"] = "chat.completion" if chat else "text_completion"
        if told.get("cut_body"):
            body = json.dumps(document).encode()
            await connection.head(200, "application/json", len(body), more)
            await connection.send(body[: len(body) // 2])
            raise Closed
        await connection.reply(200, document, more)

    def chunk_document(self, chat: bool, choice: dict[str, Any]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chat else "text_completion"
        choices = [{"index": 0, **choice}]
        return {
            "choices": choices,
            "created": int(time.time()),
            "model": self.name,
            "object": kind,
            "id": "fake",
        }


async def exists(path: str) -> None:
    """Wait for a file."""
    while not os.path.exists(path):
        await asyncio.sleep(POLL_SECONDS)


def say(line: str) -> None:
    """A line on stdout; nobody need read it."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def leave(code: int) -> None:
    """Exit as a crash does, in the middle of everything."""
    say("error: dying as told")
    os._exit(code)


def read_flags(argv: list[str]) -> dict[str, str]:
    """The flags that are understood, by their short name."""
    known = {"--model": "-m", "--ctx-size": "-c", "--parallel": "-np", "--alias": "-a"}
    known |= {name: name for name in ("-m", "-c", "-np", "-a", "--host", "--port", "--api-key")}
    return {known[name]: value for name, value in zip(argv, argv[1:]) if name in known}  # noqa: B905, RUF007


def count_launch(model: str) -> int:
    """How often this behaviour file was launched before; leaves a file `MODEL.launch.N` with our pid."""
    number = 0
    while True:
        with contextlib.suppress(FileExistsError), open(f"{model}.launch.{number}", "x") as file:
            file.write(str(os.getpid()))
            return number
        number += 1


async def run(behaviour: dict[str, Any], flags: dict[str, str]) -> None:
    """Serve for ever."""
    server = FakeServer(behaviour, flags)
    await asyncio.sleep(behaviour.get("open_delay", 0))
    host, port = flags.get("--host", "127.0.0.1"), int(flags.get("--port", "8080"))
    try:
        listener = await asyncio.start_server(server.serve, host, port)
    except OSError as problem:
        say(f"error: couldn't bind HTTP server socket, hostname: {host}, port: {port}: {problem}")
        raise SystemExit(1) from None
    say(f"listening on http://{host}:{listener.sockets[0].getsockname()[1]}")
    async with listener:
        await asyncio.gather(server.load(), listener.serve_forever())


def main(argv: list[str], leave_now: Callable[[int], None] = os._exit) -> None:
    """The command."""
    if "--version" in argv:
        say("version: 0 (fake)")
        return
    flags = read_flags(argv)
    if "-m" not in flags or not os.path.isfile(flags["-m"]):
        say(f"error: failed to open {flags.get('-m', 'no model at all')}")
        raise SystemExit(1)
    with open(flags["-m"], encoding="utf-8") as file:
        behaviour = json.load(file)
    launch = count_launch(flags["-m"])
    if launches := behaviour.get("launches"):
        behaviour |= launches[min(launch, len(launches) - 1)]
    for line in behaviour.get("lines", []):
        say(line)
    if ending := behaviour.get("exit_at_start"):
        for line in ending.get("lines", []):
            say(line)
        raise SystemExit(ending.get("code", 1))
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour.get("ignore_term") else lambda *_: leave_now(0))
    ballast = bytearray(behaviour.get("eat_mb", 0) << 20)
    for page in range(0, len(ballast), 4096):
        ballast[page] = 1
    asyncio.run(run(behaviour, flags))


if __name__ == "__main__":
    main(sys.argv[1:])
