"""`GET /logs/stream[/{model}]`: what the children say, the last lines first, then as it comes.

Plain text, or server-sent events for whoever accepts them (`Accept: text/event-stream`, or `?format=sse`):
`data: {"instance": ..., "line": ...}`. `?node=` shows another node's. Children that ended a moment ago are
shown, too: of a start that failed nothing else is left. `?lines=N` begins with the last N lines,
`?follow=false` ends after those that are there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated
from urllib.parse import unquote

import msgspec
import trio

from llamesh.dispatch import Dispatch
from llamesh.errors import Forbidden, InvalidRequest, ModelNotFound, NotFound, Overloaded
from llamesh.local.instance import Instance
from llamesh.local.pool import Pool
from llamesh.web.access import Access
from llamesh.web.direct import Call, only_get
from llamesh.web.mesh_state import LOGS, MeshRoute
from llamesh.web.state_stream import STREAM_HEADERS

# How often new lines are looked for: here, and at a peer.
_LOOK_SECONDS = 0.25
_PEER_SECONDS = 1.0

_BEAT_SECONDS = 10.0

# Streams at once.
_MOST_READERS = 64

# Lines of one answer to a peer, the newest.
_MOST_LINES = 1000
_MOST_BYTES = 512 << 10

PREFIX = "/logs/stream"


class Seen(msgspec.Struct, frozen=True):
    """A question of a peer. model: "model:profile", "" for all; seen: lines that it has, by instance."""

    model: str = ""
    seen: Annotated[dict[str, int], msgspec.Meta(max_length=10_000)] = {}


class Lines(msgspec.Struct, frozen=True):
    """New lines, and what to ask with next time. lines: (instance, line), in each instance's order."""

    lines: list[tuple[str, str]] = []
    seen: dict[str, int] = {}


class TooManyReaders(Overloaded):
    """As many read logs already as may."""

    type, retry_after = "too_many_readers", 30


# Asks a node other than this one: (node, path, body) -> JSON, None when it doesn't answer.
AskOne = Callable[[str, str, bytes], Awaitable[bytes | None]]


async def _nobody(node: str, path: str, body: bytes) -> bytes | None:
    return None


class LogStream:
    """The handler, see `web.direct`. `ask_one` is set by the mesh."""

    def __init__(self, pool: Pool, dispatch: Dispatch, access: Access, node_id: Callable[[], str]) -> None:
        self.ask_one: AskOne = _nobody
        self._pool = pool
        self._dispatch = dispatch
        self._access = access
        self._node_id = node_id
        self._readers = 0

    def admit(self, call: Call) -> None:
        """A key, as for metrics."""
        only_get(call)
        call.caller = self._access.check_private(call.headers)

    async def run(self, call: Call) -> None:
        """Until the reader leaves."""
        arguments = call.arguments()
        name = unquote(call.path.decode("latin-1"))[len(PREFIX) :].strip("/")
        node = arguments.get("node", "")
        if node == self._node_id():
            node = ""
        key = self._key(name, anywhere=bool(node))
        if call.caller.models is not None:
            if not key:
                raise Forbidden(f"the key {call.caller.name} may not read all logs; name a model in the path")
            self._access.check_model(call.caller, *key.split(":", 1))
        if self._readers >= _MOST_READERS:
            raise TooManyReaders(f"{_MOST_READERS} streams of logs are open, as many as there may be")
        sse = arguments.get("format") == "sse" or "text/event-stream" in call.header(b"accept")
        most = _number(arguments.get("lines"))
        once = arguments.get("follow") in ("0", "false")
        self._readers += 1
        try:
            await self._follow(call, key, node, most, sse=sse, once=once)
        finally:
            self._readers -= 1

    async def last(self, name: str, node: str = "") -> list[tuple[str, str]]:
        """The last lines (instance, line) of a model, or of all for "", here or at another `node`. Raises
        LlameshError.
        """
        return (await self._lines(self._key(name, anywhere=bool(node)), {}, node)).lines

    def _key(self, name: str, *, anywhere: bool) -> str:
        if not name:
            return ""
        profile = self._dispatch.find(name)
        if profile is not None:
            return profile.key
        if anywhere:
            return name if ":" in name else f"{name}:default"
        raise ModelNotFound(f"node {self._node_id()} knows no model {name[:120]!r}", param="model")

    async def _follow(
        self, call: Call, key: str, node: str, most: int | None, *, sse: bool, once: bool
    ) -> None:
        sink = call.sink
        if sse:
            headers = STREAM_HEADERS
        else:
            # Never as HTML, whatever a child writes.
            headers = [(b"content-type", b"text/plain; charset=utf-8"), *STREAM_HEADERS[1:]]
        answer = await self._lines(key, {}, node)
        if most is not None:
            answer = Lines(answer.lines[max(0, len(answer.lines) - most) :], answer.seen)
        sink.start(200, headers, length=None)
        await sink.flush()
        spoke = trio.current_time()
        while True:
            if answer.lines:
                spoke = trio.current_time()
                await sink.write(_rendered(answer.lines, sse=sse, named=not key))
            elif sse and trio.current_time() - spoke > _BEAT_SECONDS:
                spoke = trio.current_time()
                await sink.write(b": nothing new\n\n")
            if once:
                await sink.finish()
                return
            await trio.sleep(_PEER_SECONDS if node else _LOOK_SECONDS)
            answer = await self._lines(key, answer.seen, node)

    async def _lines(self, key: str, seen: dict[str, int], node: str) -> Lines:
        if not node:
            return self.read(key, seen)
        data = await self.ask_one(node, LOGS, msgspec.json.encode(Seen(key, seen)))
        try:
            if data is not None:
                return msgspec.json.decode(data, type=Lines)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            data = None
        if seen:
            return Lines([], seen)  # it may answer again
        raise NotFound(f"node {node[:64]!r} isn't in the mesh, or doesn't show logs", param="node")

    # Reading.

    def read(self, key: str, seen: dict[str, int]) -> Lines:
        """The lines that are new to whoever has `seen` so many of each instance."""
        lines: list[tuple[str, str]] = []
        now_seen = {}
        for instance in self._instances(key):
            child = instance.child
            if child is None:
                continue
            kept, total = child.tail.lines(), child.tail.total
            new = max(0, total - seen.get(instance.id, 0))
            now_seen[instance.id] = total
            lines += [(instance.id, line) for line in kept[-new:] if new]
        return Lines(_cut(lines), now_seen)

    def _instances(self, key: str) -> Iterator[Instance]:
        for instance in (*self._pool.last_gone, *self._pool.all()):
            if not key or instance.profile.key.casefold() == key.casefold():
                yield instance

    def mesh_routes(self) -> dict[str, MeshRoute]:
        """The same for peers."""

        async def logs(peer: str, body: bytes) -> tuple[int, bytes]:
            try:
                wanted = msgspec.json.decode(body, type=Seen)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise InvalidRequest(f"not a question about logs: {error}") from None
            return 200, msgspec.json.encode(self.read(wanted.model, wanted.seen))

        return {LOGS: logs}


def _number(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise InvalidRequest("`lines` must be a number", param="lines")
    return int(text)


def _cut(lines: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The newest of them, as many as fit into an answer."""
    size, kept = 0, 0
    for instance, line in reversed(lines[-_MOST_LINES:]):
        size += len(instance) + len(line) + 8
        if size > _MOST_BYTES:
            break
        kept += 1
    return lines[len(lines) - kept :]


def _rendered(lines: list[tuple[str, str]], *, sse: bool, named: bool) -> bytes:
    if sse:
        events = [msgspec.json.encode({"instance": instance, "line": line}) for instance, line in lines]
        return b"".join(b"data: %b\n\n" % event for event in events)
    return "".join(f"[{instance}] {line}\n" if named else f"{line}\n" for instance, line in lines).encode()
