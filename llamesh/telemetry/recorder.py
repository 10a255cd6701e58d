"""What happens on this node, for people: the requests, and the events around them.

Requests are kept without their content: who asked for what, how far it is, where it went and why, how long
each part took. Those that are under way are all there, of those that ended the last MOST_REQUESTS.

A record is a plain object that the gateway and the relay write to as the request goes: no lock, no clock, and
nothing at all for each token. What changes all the time (tokens so far, what it waits for) is read
from the objects that know it, when somebody looks.

Those that ended are packed, a few dozen at a time: as objects, ten thousand records would spread over all of
the memory from which the node allocates what the next requests need.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import msgspec

from llamesh.errors import LlameshError
from llamesh.telemetry.feed import describe

MOST_REQUESTS = 10_000
MOST_EVENTS = 1_000

# Records that are packed together: as objects, they fit into a cache.
_BLOCK = 64

# Of a large mesh, the candidates that cost least; the rest would fill the memory.
_MOST_CANDIDATES = 8

# The longest message, of an error or an event, that is kept.
_MOST_TEXT = 1000

Phase = Literal["queued", "forwarded", "prefill", "decode", "done"]
Level = Literal["info", "warning", "error"]


class Way(Protocol):
    """A request that is under way. `waiting_for()`: what for, for people."""

    @property
    def waiting_for(self) -> Callable[[], str]: ...


class Answer(Protocol):
    """Where its answer goes."""

    def cancel(self, error: LlameshError) -> None:
        """End the request: the client gets the error, or sees its answer cut."""


class Count(Protocol):
    """Counts an answer as it passes."""

    @property
    def events(self) -> int:
        """Events of a stream so far: about as many as tokens."""

    @property
    def first_token(self) -> float | None:
        """Seconds from the request to the first content of a stream; None = not yet."""


class Terms(Protocol):
    """What one candidate would have cost, see `core.cost`."""

    @property
    def total(self) -> float: ...


class Record(msgspec.Struct, gc=False, array_like=True):
    """One inference request.

    began: seconds of trio's clock; everything else that is a time: milliseconds, None = not yet. path: as
    it was asked; origin: the peer that sent it, "" = a client; via: the nodes before this one; key: the
    name of the client's key, "" without. model: "model:profile". phase: how far it is on this node.
    node: who served it, as the client is told; instance: of ours that serves it, "" while it is forwarded;
    peer: whom it was forwarded to. error: its type, "" for none; message: ours, for people. first_token_ms:
    until the first content of a stream, once it has ended. decision: what each candidate would have cost, at
    the last choice; tries: what was tried before, for people.

    way, answer, count: live objects, None once it has ended. The garbage collector doesn't look at records:
    nothing that they lead to may lead back to them.
    """

    id: str
    path: bytes
    began: float
    # A Way, an Answer and a Count; what is packed can't have types that only say how something behaves.
    way: Any = None
    answer: Any = None
    count: Any = None
    origin: str = ""
    via: tuple[str, ...] = ()
    streams: bool = False
    model: str = ""
    key: str = ""
    phase: Phase = "queued"
    node: str = ""
    instance: str = ""
    peer: str = ""
    status: int = 0
    error: str = ""
    message: str = ""
    ms: float | None = None
    queue_ms: float | None = None
    first_token_ms: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    decision: Sequence[Any] = ()
    tries: list[str] | None = None

    @property
    def tokens_so_far(self) -> int:
        """Tokens of the answer that have passed."""
        return self.tokens or (int(self.count.events) if self.count is not None else 0)

    @property
    def first_token_so_far(self) -> float | None:
        """Milliseconds until the first content of a stream, None as long as there is none."""
        if self.count is None or self.count.first_token is None:
            return self.first_token_ms
        return float(self.count.first_token) * 1000

    def note_try(self, text: str) -> None:
        """Something was tried and didn't work; the request goes on."""
        if self.tries is None:
            self.tries = []
        self.tries.append(text[:_MOST_TEXT])


class Happening(msgspec.Struct, frozen=True):
    """An event. `id` grows by one; `event` is a fixed word or two; `subject` whom it is about: a peer, an
    instance, a profile or ""; `text` says all of it, for people.
    """

    id: int
    time: float
    level: Level
    event: str
    text: str
    subject: str = ""


class Recorder:
    """See the module. `served_tokens`: all that instances of this node have written, ended requests only."""

    def __init__(self, *, most_requests: int = MOST_REQUESTS, most_events: int = MOST_EVENTS) -> None:
        self.live: dict[str, Record] = {}
        self.served_tokens = 0
        self._recent: list[Record] = []
        self._blocks: deque[bytes] = deque(maxlen=max(1, -(-most_requests // _BLOCK)))
        self._most = most_requests
        self._events: deque[Happening] = deque(maxlen=most_events)
        self._numbers = itertools.count(1)  # events may come from any thread

    # Requests.

    def begin(
        self,
        id: str,  # noqa: A002
        path: bytes,
        began: float,
        way: Way | None = None,
        answer: Answer | None = None,
    ) -> Record:
        """A request was read, at `began` of trio's clock."""
        live = self.live
        if id in live:
            # A client that uses one id twice at once: the second is another request all the same.
            id = _another(id, live)  # noqa: A001
        record = live[id] = Record(id, path, began, way, answer)
        return record

    def end(self, record: Record) -> None:
        """It is over; the record has all that will ever be known."""
        del self.live[record.id]
        record.phase = "done"
        if record.streams:
            record.first_token_ms = record.first_token_so_far
        record.way = record.answer = record.count = None
        if record.instance and record.tokens:
            self.served_tokens += record.tokens
        if len(record.decision) > _MOST_CANDIDATES:
            record.decision = sorted(record.decision, key=_total)[:_MOST_CANDIDATES]
        recent = self._recent
        recent.append(record)
        if len(recent) >= _BLOCK:
            self._blocks.append(_pack(recent))
            recent.clear()

    def find(self, id: str) -> Record | None:  # noqa: A002
        """One that is under way, or the last one of that id that ended."""
        found = self.live.get(id) or next((one for one in reversed(self._recent) if one.id == id), None)
        if found is not None:
            return found
        sought = id.encode("utf-8", "replace")
        for block in reversed(self._blocks):
            # Searching bytes is a hundred times as fast as unpacking them.
            if sought in block:
                for one in reversed(_unpack(block)):
                    if one.id == id:
                        return one
        return None

    def ended(self) -> Iterator[Record]:
        """Those that ended, the newest first. Records of requests that end meanwhile may come or not."""
        newest, blocks = self._recent[::-1], [*self._blocks]
        return itertools.islice(itertools.chain(newest, _unpacked(blocks)), self._most)

    def cancel(self, id: str, error: LlameshError) -> bool:  # noqa: A002
        """End one that is under way with `error`; False when there is none."""
        record = self.live.get(id)
        if record is None or record.answer is None:
            return False
        record.error, record.message = error.type, error.message
        record.answer.cancel(error)
        return True

    def tokens_now(self) -> int:
        """All tokens that instances of this node have written, those of answers under way included."""
        return self.served_tokens + sum(
            int(record.count.events)
            for record in self.live.values()
            if record.count is not None and record.instance
        )

    # Events.

    def event(self, level: Level, event: str, text: str, *, subject: str = "") -> None:
        """Something happened."""
        self._events.append(
            Happening(next(self._numbers), time.time(), level, event, text[:_MOST_TEXT], subject)
        )

    def hear(self, level: str, fields: Mapping[str, Any]) -> None:
        """A line of the log: those that an operator wants to know of are events. See `logs.listen`."""
        said = describe(level, fields)
        if said is not None:
            self.event(*said[:3], subject=said[3])

    def events(self, most: int = MOST_EVENTS, *, after: int = 0) -> list[Happening]:
        """The last ones, oldest first; only those after event number `after`."""
        found: list[Happening] = []
        for one in reversed(self._events.copy()):
            if one.id <= after or len(found) >= most:
                break
            found.append(one)
        return found[::-1]


_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(list[Record]).decode


def _unpacked(blocks: Sequence[bytes]) -> Iterator[Record]:
    for block in reversed(blocks):
        yield from reversed(_unpack(block))


def _another(id: str, taken: Container[str]) -> str:  # noqa: A002
    """The id with a number behind it that nobody has."""
    return next(name for n in itertools.count(2) if (name := f"{id}#{n}") not in taken)


def _total(terms: Terms) -> float:
    return terms.total
