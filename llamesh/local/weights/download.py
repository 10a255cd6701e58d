"""One file from a source to the disk: in pieces, over several connections, hashed on the way.

    download = Download(source, part, sha256, expected=...)
    download.run()        # blocks; in a thread. `download.stop()` from any other ends it

Threads: each connection takes the next piece of what is missing, in order, and writes it where it belongs;
one hashes the unbroken beginning as it grows (out of the page cache, where it was a moment ago); the one
that called `run` notes every few seconds what is safely on the disk. They are threads since all of them
spend their time in calls that leave Python to the others.

A piece that fails is tried again, by whoever is free, with growing pauses. Only when nothing has come for
several tries in a row is it over.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from llamesh.core.ranges import pieces
from llamesh.local.weights.digest import Digest
from llamesh.local.weights.errors import Stopped, Unreachable, WeightsError, WholeOnly, WrongContent
from llamesh.local.weights.part import Part
from llamesh.local.weights.source import Channel, Source

CONNECTIONS = 4
# Below this, one connection is as fast: setting up others takes longer than they save.
PARALLEL_BYTES = 256 << 20
# A piece is one request: long enough that the round trip between two doesn't count, short enough that
# connections stay close together and the hash close behind them.
PIECE_BYTES = 64 << 20

# After so many failures in a row, each without a byte in between, it is over.
TRIES = 6
FIRST_PAUSE = 0.5
_MOST_PAUSE = 15.0

# Another connection joins when those that there are bring less than this (bytes a second) after so long.
# Where one is fast (this machine, a LAN), several would only take each other's time.
_FAST_RATE = 200e6
_JOIN_AFTER_SECONDS = 0.3

_JOURNAL_SECONDS = 2.0
_JOIN_SECONDS = 5.0
# Small enough to stay in the processor's cache between one copy and the next: twice as fast as 4 MiB.
_HASH_BYTES = 1 << 20
_SMALLEST_READ, _LARGEST_READ = 32 << 10, 256 << 10
_QUICK, _SLOW = 0.05, 0.5


class Download:
    """See the module. `have`: bytes that are there; a plain number that any thread may read."""

    def __init__(
        self,
        source: Source,
        part: Part,
        make_digest: Callable[[str | None], Digest],
        *,
        expected: str,
        what: str,
        connections: int = CONNECTIONS,
        piece: int = PIECE_BYTES,
        first_pause: float = FIRST_PAUSE,
        join_after: float = _JOIN_AFTER_SECONDS,
    ) -> None:
        """`make_digest`: a new digest, or one from a saved state; `expected`: what it must come to.
        `what` names the file in messages. The part is the caller's to close. The rest is for tests.
        """
        self.have = self._saved = part.ranges.total
        self._source = source
        self._part = part
        self._make_digest = make_digest
        self._expected = expected
        self._what = what
        self._connections = connections if part.size >= min(PARALLEL_BYTES, 4 * piece) else 1
        self._piece = piece
        self._first_pause = first_pause
        self._join_after = join_after
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._hash_lock = threading.Lock()
        self._halt = threading.Event()
        self._over = threading.Event()  # halted, or all of it is hashed
        self._pieces: deque[tuple[int, int]] = deque()
        self._channels: list[Channel] = []
        self._working = 0
        self._failures = 0
        self._error: BaseException | None = None
        self._digest = self._first_digest()

    def run(self) -> None:
        """Fetch what is missing, check the whole and give it its name. Blocks.

        Raises WeightsError, and Stopped after `stop`. What came stays for the next time, unless it is wrong.
        """
        part = self._part
        self._pieces.extend(pieces(part.ranges.gaps(part.size), self._piece))
        self._connections = min(self._connections, max(1, len(self._pieces)))
        self._start(self._hash)
        self._start(self._fetch_pieces)
        try:
            self._look_after()
        finally:
            self.stop()
            for thread in self._threads:
                thread.join(_JOIN_SECONDS)
        if isinstance(self._error, WrongContent):
            part.discard()
        if self._error is not None:
            raise self._error
        if self.have < part.size or self._digest.size < part.size:
            raise Stopped
        found = self._digest.hexdigest()
        if found != self._expected:
            part.discard()
            raise WrongContent(
                f"{self._what} isn't what it should be: its hash is {found}, not {self._expected}; "
                "nothing is kept"
            )
        part.finish()

    def stop(self) -> None:
        """End `run` soon; from any thread, more than once."""
        self._halt.set()
        self._over.set()
        with self._changed:
            channels = list(self._channels)
            self._changed.notify_all()
        for channel in channels:
            channel.cut()

    # The thread of `run`.

    def _look_after(self) -> None:
        """Note what is there now and then, and add connections, until it is over."""
        due = time.monotonic() + _JOURNAL_SECONDS
        try:
            self._add_connections()
            while not self._halt.is_set() and not self._is_whole():
                self._over.wait(max(0.0, due - time.monotonic()))
                if time.monotonic() >= due:
                    if self.have != self._saved:
                        self._save()
                    due = time.monotonic() + _JOURNAL_SECONDS
        except WeightsError as error:
            self._fail(error)
        finally:
            if self.have != self._saved and not self._is_whole():
                with suppress(WeightsError):
                    self._save()

    def _add_connections(self) -> None:
        for _ in range(1, self._connections):
            had, began = self.have, time.monotonic()
            if self._over.wait(self._join_after) or not self._pieces or not self._source.ranges:
                return
            if self.have - had > _FAST_RATE * (time.monotonic() - began):
                return
            self._start(self._fetch_pieces)

    def _save(self) -> None:
        # First what is hashed, then what is there: never more hash than bytes.
        with self._hash_lock:
            hashed, state = self._digest.size, self._digest.save()
        with self._changed:
            ranges, self._saved = list(self._part.ranges), self.have
        self._part.save(ranges, hashed, state)

    def _is_whole(self) -> bool:
        return self._digest.size >= self._part.size

    # The threads of the connections.

    def _fetch_pieces(self) -> None:
        channel = self._source.channel()
        with self._changed:
            self._channels.append(channel)
        try:
            self._fetch_on(channel)
        finally:
            channel.close()

    def _fetch_on(self, channel: Channel) -> None:
        buffer = memoryview(bytearray(_LARGEST_READ))
        while (piece := self._next_piece()) is not None:
            at = piece[0]
            try:
                at = self._fetch(channel, buffer, *piece)
            except WholeOnly:
                self._take_the_whole()
            except WeightsError as error:
                if self._halt.is_set():
                    return
                if not error.transient or not self._pause(error):
                    raise
            finally:
                self._give_back(at, piece[1])

    def _next_piece(self) -> tuple[int, int] | None:
        """The next piece; None when there is none left, nor will be. Waits while another one may come
        back.
        """
        with self._changed:
            # Where parts can't be had, one at a time takes the whole.
            while self._working and not (self._pieces and self._source.ranges) and not self._halt.is_set():
                self._changed.wait()
            if not self._pieces or self._halt.is_set():
                return None
            self._working += 1
            start, end = self._pieces.popleft()
            # Another connection may have been there meanwhile, if it took the whole.
            return self._part.ranges.covered_from(start), end

    def _give_back(self, at: int, end: int) -> None:
        with self._changed:
            self._working -= 1
            at = self._part.ranges.covered_from(at)
            if at < end:
                self._pieces.appendleft((at, end))
            self._changed.notify_all()

    def _take_the_whole(self) -> None:
        """The source can't do parts: one request for everything, whatever is there already."""
        with self._changed:
            self._pieces.clear()

    def _fetch(self, channel: Channel, buffer: memoryview, start: int, end: int) -> int:
        """Bytes from `start` to `end`; how far it came, which is `end`. Raises WeightsError."""
        if start >= end:
            return end
        if not self._source.ranges:
            start, end = 0, self._part.size
        body = channel.open(start, end)
        length = _SMALLEST_READ
        try:
            while start < end and not self._halt.is_set():
                began = time.monotonic()
                count = body.readinto(buffer[:length])
                took = time.monotonic() - began
                # In large gulps where it is fast; where it is slow, so that progress is seen.
                length = min(length * 2, _LARGEST_READ) if took < _QUICK else length
                length = _SMALLEST_READ if took > _SLOW else length
                self._part.write(buffer[:count], start)
                with self._changed:
                    self._part.ranges.add(start, start + count)
                    have, self.have = self.have, self._part.ranges.total
                    if self.have > have:
                        self._failures = 0
                    if self._hashable(self._digest.size):
                        self._changed.notify_all()
                start += count
        finally:
            body.close()
        return start

    def _pause(self, error: WeightsError) -> bool:
        """Wait before the next try; False when there is none."""
        with self._changed:
            self._failures += 1
            failures = self._failures
        if failures >= TRIES * self._connections:
            return False
        pause = min(_MOST_PAUSE, self._first_pause * 2 ** ((failures - 1) // self._connections))
        if isinstance(error, Unreachable):
            pause = max(pause, error.retry_after)
        self._halt.wait(pause)
        return True

    # The thread of the hash.

    def _hash(self) -> None:
        buffer, size = memoryview(bytearray(_HASH_BYTES)), self._part.size
        while (at := self._digest.size) < size:
            with self._changed:
                self._changed.wait_for(partial(self._may_hash, at))
                end = self._part.ranges.covered_from(at)
            if self._halt.is_set():
                return
            count = self._part.read(buffer[: min(end - at, _HASH_BYTES)], at)
            if not count:
                raise WrongContent(f"{self._what}: {self._part.path} was cut while it was written")
            with self._hash_lock:
                self._digest.update(buffer[:count])
        self._over.set()

    def _may_hash(self, at: int) -> bool:
        return self._halt.is_set() or self._hashable(at)

    def _hashable(self, at: int) -> bool:
        there = self._part.ranges.covered_from(at)
        # In whole blocks, so that it can be saved in between.
        return there == self._part.size or there - at >= _HASH_BYTES

    def _first_digest(self) -> Digest:
        part = self._part
        if part.state is not None:
            with suppress(ValueError):
                return self._make_digest(part.state)
        return self._make_digest(None)

    def _start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:
                self._fail(error)

        # A daemon: a disk that hangs must not keep the program from ending.
        thread = threading.Thread(target=guarded, name=f"llamesh-{work.__name__}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _fail(self, error: BaseException) -> None:
        if self._error is None:
            self._error = error
        self.stop()
