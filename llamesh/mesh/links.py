"""The connections to one peer on which this node sends requests, kept for the next one.

They come from two sides: we dial, or the peer parks some with us because we can't reach it. Which
doesn't matter once they are open: one request at a time goes over each, and closing one is how the
peer learns that its answer isn't wanted any more.
"""

from __future__ import annotations

import math
import random
import secrets
import socket
from collections.abc import Awaitable, Callable

import trio

from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.net.exchange import UpstreamBroken, UpstreamConnection

# Unused connections that stay for good; those beyond go when nothing needed them for a while.
KEPT = 2
_SPARE_SECONDS = 60.0

# More than requests that anyone has in flight to one peer; the rest are closed after use.
_MOST_IDLE = 128

# How long a request waits for the peer to park one more connection.
_PARK_PATIENCE = 2.0

# After a failed dial: the first pause and the longest, in seconds. Each is cut by up to a half at random, so
# that a restarted node isn't dialled by all others in the same moment.
FIRST_PAUSE = 0.25
LONGEST_PAUSE = 30.0

_random = random.Random(secrets.token_bytes(16))  # noqa: S311


def pause_after(failures: int) -> float:
    """Seconds until the next try after so many failures in a row."""
    longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 20))
    return longest * _random.uniform(0.5, 1.0)


class Links:
    """See the module. `dial` opens one connection; it raises OSError saying why it couldn't."""

    def __init__(self, node: str, dial: Callable[[], Awaitable[NoiseTransport]], session_ttl: float) -> None:
        self.node = node
        self.can_dial: bool | None = None  # None: not tried yet
        self.problem = ""  # of the last failed dial, for people
        self._dial = dial
        self._ttl = session_ttl
        self._idle: list[UpstreamConnection] = []  # the one used last is at the end
        self._streams: dict[UpstreamConnection, NoiseTransport] = {}  # all of them, idle or not
        self._fresh: set[UpstreamConnection] = set()  # parked ones that were never used
        self._parked = trio.Event()
        self._failures = 0
        self._not_before = -math.inf

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def idle(self) -> int:
        """How many wait for a request."""
        return len(self._idle)

    @property
    def reachable(self) -> bool:
        """Whether a request has a way to the peer, as far as it is known."""
        return bool(self._streams) or self.can_dial is not False

    async def take(self, *, fresh: bool = False) -> UpstreamConnection:
        """A connection for one request. Raises UpstreamBroken.

        `fresh`: one that was kept turned out to be closed, so don't try another of them.
        """
        if fresh:
            self._drop_idle()
        connection = self._take_idle()
        if connection is not None:
            return connection
        if self.can_dial is not False:
            try:
                return await self._open()
            except UpstreamBroken:
                if not self._streams:
                    raise
        elif trio.current_time() >= self._not_before:
            return await self._open_or_await_parked()
        return await self._await_parked()

    def keep(self, connection: UpstreamConnection) -> None:
        """Take one back after a whole answer."""
        stream = self._streams.get(connection)
        if (
            stream is None
            or not connection.reusable
            or len(self._idle) >= _MOST_IDLE
            or trio.current_time() - stream.opened_at > self._ttl
        ):
            self.close(connection)
            return
        connection.idle_since = trio.current_time()
        self._idle.append(connection)
        self._tell_waiters()

    def close(self, connection: UpstreamConnection) -> None:
        """Close one, whatever state it is in."""
        self._streams.pop(connection, None)
        self._fresh.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        connection.close()

    def lend(self, connection: UpstreamConnection) -> NoiseTransport:
        """The stream of one that was taken, which is the caller's from now on. Raises UpstreamBroken."""
        stream = self._streams.pop(connection, None)
        if stream is None or stream.closed:
            raise UpstreamBroken(f"the connection to node {self.node} was closed", started=False)
        return stream

    def keep_unused(self, connection: UpstreamConnection) -> None:
        """Take one back that nothing was sent on."""
        if connection not in self._streams:
            return  # all were closed meanwhile
        connection.idle_since = trio.current_time()
        self._idle.append(connection)
        self._tell_waiters()

    def add(self, stream: NoiseTransport, *, parked: bool = False) -> None:
        """Take over a connection that was opened elsewhere, by the peer itself if `parked`."""
        if len(self._idle) >= _MOST_IDLE:
            stream.close()
            return
        connection = UpstreamConnection(stream, parked=True)
        connection.idle_since = trio.current_time()
        self._streams[connection] = stream
        if parked:
            # Used last: the peer replaces each at its first use, so the ones in use are to be used again.
            self._fresh.add(connection)
            self._idle.insert(0, connection)
        else:
            self._idle.append(connection)
            self._dialled()
        self._tell_waiters()

    def close_all(self) -> None:
        """The peer is gone: whoever waits on one of them is told at once."""
        self._idle.clear()
        self._fresh.clear()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.close()

    def sweep(self) -> None:
        """Close what is too old, isn't needed or was closed by the peer; called now and then."""
        now = trio.current_time()
        self._forget_closed()
        for spare, connection in enumerate(reversed(self._idle[:])):
            stream = self._streams[connection]
            unused = now - connection.idle_since
            old = now - stream.opened_at > self._ttl
            # The peer keeps so many ready on purpose, and would only dial again.
            is_spare = spare >= KEPT and unused > _SPARE_SECONDS and connection not in self._fresh
            if old or is_spare or _is_closed(stream):
                self.close(connection)

    def try_again(self) -> None:
        """Something changed (an address, the peer showed up): dial at the next need."""
        self._not_before = -math.inf
        if self.can_dial is False:
            self.can_dial = None

    def _tell_waiters(self) -> None:
        parked, self._parked = self._parked, trio.Event()
        parked.set()

    def _take_idle(self) -> UpstreamConnection | None:
        now = trio.current_time()
        while self._idle:
            connection = self._idle.pop()
            stream = self._streams[connection]
            # Looking costs a microsecond; a request on a closed one costs the request a round trip.
            if now - stream.opened_at <= self._ttl and not _is_closed(stream):
                self._fresh.discard(connection)
                return connection
            self.close(connection)
        return None

    def _drop_idle(self) -> None:
        for connection in self._idle[:]:
            self.close(connection)
        self._forget_closed()

    def _forget_closed(self) -> None:
        """Whoever uses a connection may have closed it without a word."""
        for connection in [one for one, stream in self._streams.items() if stream.closed]:
            self.close(connection)

    async def _open(self) -> UpstreamConnection:
        now = trio.current_time()
        if now < self._not_before:
            raise UpstreamBroken(
                f"node {self.node} isn't dialled again for {self._not_before - now:.1f} s: {self.problem}",
                started=False,
            )
        try:
            stream = await self._dial()
        except OSError as error:
            self._failures += 1
            self.problem = str(error)
            self._not_before = trio.current_time() + pause_after(self._failures)
            self.can_dial = False
            raise UpstreamBroken(f"node {self.node} can't be reached: {error}", started=False) from error
        self._dialled()
        connection = UpstreamConnection(stream)
        self._streams[connection] = stream
        return connection

    async def _open_or_await_parked(self) -> UpstreamConnection:
        """A peer that couldn't be dialled is tried again; meanwhile it may park one, or never answer."""
        found: list[UpstreamConnection] = []
        problems: list[UpstreamBroken] = []

        async def attempt(open_one: Callable[[], Awaitable[UpstreamConnection]]) -> None:
            try:
                found.append(await open_one())
            except UpstreamBroken as error:
                problems.append(error)
            if found or not self._streams:
                nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(attempt, self._await_parked)
                nursery.start_soon(attempt, self._open)
            if not found:
                raise problems[-1]
            return found.pop()
        finally:
            # One too many, or the request left while they came.
            for spare in found:
                self.keep_unused(spare)

    def _dialled(self) -> None:
        self.can_dial, self.problem, self._failures, self._not_before = True, "", 0, -math.inf

    async def _await_parked(self) -> UpstreamConnection:
        with trio.move_on_after(_PARK_PATIENCE):
            while True:
                connection = self._take_idle()
                if connection is not None:
                    return connection
                await self._parked.wait()
        raise UpstreamBroken(
            f"node {self.node} can't be dialled ({self.problem}), and keeps too few connections ready here",
            started=False,
        )


def _is_closed(stream: NoiseTransport) -> bool:
    """Whether the other side closed it, or said something that nobody asked for."""
    if stream.closed:
        return True
    try:
        stream.sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
