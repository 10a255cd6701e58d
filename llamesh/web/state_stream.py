"""`GET /api/v1/state/stream`: the state as server-sent events, for many viewers at the price of one.

    event: snapshot     the whole document
    event: change       {"time": ..., section: its new value, ...} for the sections that changed
    event: beat         {"time": ...}, each ten seconds

While there is a viewer, one task makes the document once a second, compares it section by section with the
one before, and encodes what changed, once. A viewer is a place in the list of the last frames and writes what
it hasn't written yet; one that was away for a short while goes on where it was (`Last-Event-ID`), one that
fell behind gets a new snapshot, one that doesn't read is dropped.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import trio
from msgspec.structs import replace

from llamesh.errors import Overloaded
from llamesh.net.exchange import Headers
from llamesh.telemetry.logs import get_logger
from llamesh.web.sink import Sink
from llamesh.web.state_schema import SECTIONS, Document, Instance, Memory, Node, Request

log = get_logger("state")

# Viewers at once. Five hundred were tried; each costs a connection, and a write a second.
MOST_VIEWERS = 512

INTERVAL = 1.0
BEAT_SECONDS = 10.0

# What a viewer may have missed without needing a snapshot.
_KEPT_FRAMES = 120

# A viewer whose connection takes nothing for so long is dropped.
_STALLED_SECONDS = 20.0

# Values that always move a little (used memory, the last sign of life) are told only this often.
_DRIFT_SECONDS = 3.0

STREAM_HEADERS: Headers = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]


class TooManyViewers(Overloaded):
    """As many look at the state already as may."""

    status, type, retry_after = 503, "too_many_viewers", 30


class _Viewer:
    """One open stream. position: the number of the next frame; stalled_since: when its present write
    began.
    """

    __slots__ = ("cut", "position", "stalled_since")

    def __init__(self, cut: Callable[[], None]) -> None:
        self.cut = cut
        self.position = 0
        self.stalled_since: float | None = None


class _Section:
    """One section as it was told last."""

    __slots__ = ("encoded", "exact", "rough", "told")

    def __init__(self) -> None:
        self.rough: object = None
        self.exact: object = None
        self.encoded = b"null"
        self.told = float("-inf")

    def take(self, value: Any, rough: object, now: float) -> bool:
        """Whether it is to be told now."""
        if rough == self.rough and (value == self.exact or now - self.told < _DRIFT_SECONDS):
            return False
        self.rough, self.exact, self.told = rough, value, now
        self.encoded = msgspec.json.encode(value)
        return True


class StateStream:
    """See the module. `make()` makes the document; it is called by one task at a time."""

    def __init__(
        self,
        make: Callable[[], Awaitable[Document]],
        *,
        interval: float = INTERVAL,
        most_viewers: int = MOST_VIEWERS,
        stalled_seconds: float = _STALLED_SECONDS,
    ) -> None:
        self._make = make
        self._interval = interval
        self._most_viewers = most_viewers
        self._stalled_seconds = stalled_seconds
        self._viewers: set[_Viewer] = set()
        self._epoch = secrets.token_hex(4)
        self._first = 0  # the number of the oldest frame that is kept
        self._frames: deque[bytes] = deque()
        self._head = b""  # of a snapshot: what isn't a section
        self._sections = {name: _Section() for name in SECTIONS}
        self._looked = float("-inf")
        self._beat = float("-inf")
        self._busy = trio.Lock()
        self._wanted = trio.Event()
        self._news = trio.Event()

    @property
    def viewers(self) -> int:
        """How many look now."""
        return len(self._viewers)

    async def run(self) -> None:
        """Look once a second while there is a viewer; for ever."""
        while True:
            await self._wanted.wait()
            while self._viewers:
                began = trio.current_time()
                try:
                    await self._look()
                except Exception:
                    # The border of the state: a defect in it must not end the node.
                    log.exception("defect", during="state")
                self._drop_stalled()
                await trio.sleep_until(began + self._interval)
            self._wanted = trio.Event()

    async def serve(self, sink: Sink, last_event: str, cut: Callable[[], None], headers: Headers) -> None:
        """Show it to one viewer until it leaves. `cut` breaks its connection. Raises TooManyViewers, and
        OSError when it is gone.
        """
        if len(self._viewers) >= self._most_viewers:
            raise TooManyViewers(
                f"{self._most_viewers} streams of the state are open, as many as there may be; "
                "GET /api/v1/state answers still"
            )
        viewer = _Viewer(cut)
        self._viewers.add(viewer)
        try:
            await self._look(unless_within=2 * self._interval)
            self._wanted.set()
            viewer.position = self._place_of(last_event)
            sink.start(200, [*STREAM_HEADERS, *headers], length=None)
            while True:
                data = self._next(viewer)
                if data:
                    viewer.stalled_since = trio.current_time()
                    await sink.write(data)
                    viewer.stalled_since = None
                else:
                    await self._news.wait()
        finally:
            self._viewers.discard(viewer)

    # Frames.

    @property
    def _end(self) -> int:
        """The number of the frame that comes next."""
        return self._first + len(self._frames)

    def _place_of(self, last_event: str) -> int:
        """Where a viewer goes on that had this event last; -1: it needs a snapshot."""
        epoch, _, number = last_event.partition("-")
        if epoch == self._epoch and number.isdigit() and len(number) < 16:
            place = int(number) + 1
            if self._first <= place <= self._end:
                return place
        return -1

    def _next(self, viewer: _Viewer) -> bytes:
        """What the viewer hasn't had yet, b"" when it is up to date."""
        place = viewer.position
        viewer.position = self._end
        if place < self._first:
            return self._snapshot()
        return b"".join(self._frames[number - self._first] for number in range(place, self._end))

    def _snapshot(self) -> bytes:
        sections = b",".join(
            b'"%b":%b' % (name.encode(), section.encoded) for name, section in self._sections.items()
        )
        # Its number is that of the last frame: whoever comes back with it goes on behind that.
        return self._frame(b"snapshot", b"{%b,%b}" % (self._head, sections), self._end - 1)

    def _frame(self, event: bytes, data: bytes, number: int) -> bytes:
        return b"id: %b-%d\nevent: %b\ndata: %b\n\n" % (self._epoch.encode(), max(0, number), event, data)

    def _add(self, event: bytes, data: bytes) -> None:
        self._frames.append(self._frame(event, data, self._end))
        if len(self._frames) > _KEPT_FRAMES:
            self._frames.popleft()
            self._first += 1
        self._news.set()
        self._news = trio.Event()

    async def _look(self, *, unless_within: float = 0.0) -> None:
        """Make the document, and a frame of what changed; not, if somebody did it so few seconds ago.

        When many viewers come at once, one looks for all.
        """
        async with self._busy:
            if trio.current_time() - self._looked < unless_within:
                return
            document = await self._make()
            now = self._looked = trio.current_time()
            head = {
                "schema": document.schema,
                "node_id": document.node_id,
                "time": document.time,
                "version": document.version,
            }
            self._head = msgspec.json.encode(head)[1:-1]
            changed = []
            for name, section in self._sections.items():
                value = getattr(document, name)
                if section.take(value, _ROUGHLY.get(name, _same)(value), now):
                    changed.append(b'"%b":%b' % (name.encode(), section.encoded))
            stamp = b'"time":%b' % msgspec.json.encode(document.time)
            if changed:
                self._add(b"change", b"{%b}" % b",".join([stamp, *changed]))
            if now - self._beat >= BEAT_SECONDS:
                self._beat = now
                self._add(b"beat", b"{%b}" % stamp)

    def _drop_stalled(self) -> None:
        now = trio.current_time()
        for viewer in list(self._viewers):
            if viewer.stalled_since is not None and now - viewer.stalled_since > self._stalled_seconds:
                log.info("a viewer of the state doesn't read, and is dropped")
                self._viewers.discard(viewer)
                viewer.cut()


# Sections without what moves all the time and can be reckoned from the rest.


def _same(value: object) -> object:
    return value


def _rough_nodes(nodes: list[Node]) -> object:
    return [
        (
            replace(one, last_seen=None, link=None, memory=_NO_MEMORY, devices=[]),
            one.link is not None and (one.link.direct, one.link.breaker, one.link.problem),
        )
        for one in nodes
    ]


def _rough_instances(instances: list[Instance]) -> object:
    return [replace(one, age=0.0, last_used=None, vram=None, ram=None) for one in instances]


def _rough_requests(requests: list[Request]) -> object:
    return [replace(one, ms=None) for one in requests]


_NO_MEMORY = Memory()
_ROUGHLY: dict[str, Callable[[Any], object]] = {
    "nodes": _rough_nodes,
    "instances": _rough_instances,
    "requests": _rough_requests,
}
