"""One file that several have: peers of the mesh, and behind them the web.

    sources = Sources(peers, web)
    while (source := sources.next()) is not None:
        ... download from it; when its hash is wrong: sources.blame(source) ...

Peers come first, the one with the fewest connections of ours before the others. One that fails rests for a
while, and what it was sending goes on from the byte where it stopped: from another peer, else from the web.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from llamesh.local.weights.errors import Unreachable, WeightsError
from llamesh.local.weights.source import Body, Channel, Source
from llamesh.telemetry.logs import get_logger

log = get_logger("weights")

# A peer that failed isn't asked for so long (seconds), twice as long each time; after so many failures in a
# row never again for this file.
_REST_SECONDS = 2.0
_MOST_FAILURES = 4


class Several:
    """See the module: a `Source`. `gave`: the peers that bytes came from."""

    def __init__(self, peers: Sequence[Source], web: Source | None) -> None:
        """At least one of the two."""
        self.name = ", ".join(source.name for source in (*peers, *([web] if web is not None else [])))
        self.gave: set[str] = set()
        self._peers = list(peers)
        self._web = web
        self._lock = threading.Lock()
        self._busy = Counter[str]()
        self._failures = Counter[str]()
        self._not_before: dict[str, float] = {}
        self._problem = ""

    @property
    def connections(self) -> int:
        """How many are of use: one to each peer fills a LAN, and costs the peer least."""
        return len(self._peers)

    @property
    def ranges(self) -> bool:
        # Where the web behind them can't do parts, all is asked for as a whole: anyone may have to go on.
        return self._web is None or self._web.ranges

    def channel(self) -> SeveralChannel:
        return SeveralChannel(self)

    # For the channels, in their threads.

    def take(self) -> tuple[Source, bool]:
        """Whom to ask next, and whether that is a peer. Raises Unreachable when nobody can be asked now."""
        now = time.monotonic()
        with self._lock:
            able = [one for one in self._peers if self._failures[one.name] < _MOST_FAILURES]
            ready = [one for one in able if self._not_before.get(one.name, 0.0) <= now]
            if ready:
                chosen = min(ready, key=lambda one: self._busy[one.name])
                self._busy[chosen.name] += 1
                return chosen, True
            if self._web is not None:
                return self._web, False
            wait = min((self._not_before[one.name] - now for one in able), default=0.0)
            raise Unreachable(f"no peer gives it any more: {self._problem}", retry_after=max(0.0, wait))

    def leave(self, source: Source) -> None:
        """A peer that was taken isn't used any more."""
        with self._lock:
            self._busy[source.name] -= 1

    def note(self, source: Source) -> None:
        """Bytes came from a peer."""
        with self._lock:
            self.gave.add(source.name)

    def note_whole(self, source: Source) -> None:
        """A peer sent all that it was asked for."""
        with self._lock:
            self._failures.pop(source.name, None)

    def note_failure(self, source: Source, error: WeightsError) -> None:
        """A peer failed."""
        with self._lock:
            failures = self._failures[source.name] + 1
            self._failures[source.name] = failures if error.transient else _MOST_FAILURES
            rest = _REST_SECONDS * 2.0 ** (failures - 1)
            if isinstance(error, Unreachable):
                rest = max(rest, error.retry_after)
            self._not_before[source.name] = time.monotonic() + rest
            self._problem = str(error)
        log.info("a peer gives no weights now; others go on", problem=str(error))


class SeveralChannel:
    """Connections to whoever was asked so far; one of them is used at a time."""

    def __init__(self, several: Several) -> None:
        self._several = several
        self._lock = threading.Lock()
        self._channels: dict[str, Channel] = {}
        self._current: Channel | None = None
        self._cut = False

    def open(self, start: int, end: int) -> SeveralBody:
        return SeveralBody(self, self._several, start, end)

    def begin(self, start: int, end: int) -> tuple[Body, Source, bool]:
        """A body of whoever can give these bytes; a peer has to be left again. Raises WeightsError."""
        several = self._several
        while True:
            source, is_peer = several.take()
            try:
                return self._of(source).open(start, end), source, is_peer
            except BaseException as error:
                if not is_peer:
                    raise
                several.leave(source)
                if not isinstance(error, WeightsError) or self.is_cut:
                    raise
                several.note_failure(source, error)

    @property
    def is_cut(self) -> bool:
        with self._lock:
            return self._cut

    def cut(self) -> None:
        with self._lock:
            self._cut = True
            current = self._current
        if current is not None:
            current.cut()

    def close(self) -> None:
        with self._lock:
            channels, self._channels, self._current = self._channels, {}, None
        for channel in channels.values():
            channel.close()

    def _of(self, source: Source) -> Channel:
        with self._lock:
            channel = self._channels.get(source.name)
            if channel is None:
                channel = self._channels[source.name] = source.channel()
            self._current = channel
            cut = self._cut
        if cut:
            channel.cut()
        return channel


class SeveralBody:
    """The bytes of one range, from one peer after the other if need be."""

    def __init__(self, channel: SeveralChannel, several: Several, start: int, end: int) -> None:
        self._channel = channel
        self._several = several
        self._at, self._end = start, end
        self._body, self._source, self._is_peer = channel.begin(start, end)
        self._noted = False
        self._closed = False

    def readinto(self, buffer: memoryview) -> int:
        while True:
            try:
                count = self._body.readinto(buffer)
            except WeightsError as error:
                if not self._is_peer or self._channel.is_cut:
                    raise
                self._several.note_failure(self._source, error)
                self._go_on()
                continue
            if self._is_peer and count and not self._noted:
                self._noted = True
                self._several.note(self._source)
            self._at += count
            if self._is_peer and self._at == self._end:
                self._several.note_whole(self._source)
            return count

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._body.close()
            if self._is_peer:
                self._several.leave(self._source)

    def _go_on(self) -> None:
        """Where it stopped, with somebody else."""
        self.close()
        self._body, self._source, self._is_peer = self._channel.begin(self._at, self._end)
        self._closed = self._noted = False


class Sources:
    """Who is asked for a file, try by try. Each try that ends with a wrong hash leaves out who gave it."""

    def __init__(self, peers: Sequence[Source], web: Callable[[], Source] | None) -> None:
        self._peers = list(peers)
        self._web = web
        self._alone: list[Source] = []  # one of several gave wrong bytes: which one shows when they are alone

    def next(self) -> Source | None:
        """The next to try, None when all were."""
        web = self._web() if self._web is not None else None
        if self._peers:
            return Several(self._peers, web)
        if web is not None or not self._alone:
            return web
        return Several([self._alone.pop()], None)

    def blame(self, source: Source) -> set[str]:
        """What came from `source` was wrong: the peers that gave some of it. None: it wasn't theirs."""
        if not isinstance(source, Several) or not source.gave:
            return set()
        wrong = [one for one in self._peers if one.name in source.gave]
        self._peers = [one for one in self._peers if one.name not in source.gave]
        if len(wrong) > 1:
            self._alone.extend(wrong)
        return source.gave

    @property
    def left(self) -> bool:
        """Whether there is somebody to ask yet."""
        return bool(self._peers or self._alone or self._web is not None)
