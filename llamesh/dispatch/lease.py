"""What a request asks for, and what it gets: a slot of an instance here or a seat at a peer, held until it
is released; or the news of an instance that is loading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import trio

from llamesh.config.cookbook import Profile
from llamesh.core.cost import Features
from llamesh.core.prefixes import NOTHING, Prefix
from llamesh.dispatch.affinity import COLD, Warmth
from llamesh.local.instance import Instance
from llamesh.net.exchange import UpstreamConnection
from llamesh.telemetry.recorder import Record


@dataclass(frozen=True, slots=True)
class Travel:
    """How a request came here through the mesh.

    `origin`: the peer that sent it, "" for a client of this node; `via`: all nodes before this one, the
    first is where the client is; `attempt`: instances that it broke already, anywhere. What the sender can
    bear, in milliseconds: `max_wait_ms` until it starts here, else it would rather go elsewhere;
    `deadline_ms` until it has ended, of the limit for all of it. `model`: which profile is meant, whatever
    the body says: names are the entry node's own; `fingerprint`: only just the same will do.
    """

    origin: str = ""
    hops: int = 0
    via: tuple[str, ...] = ()
    attempt: int = 0
    max_wait_ms: float | None = None
    deadline_ms: float | None = None
    model: str = ""
    fingerprint: str = ""


AT_HOME = Travel()
UNKNOWN = Features()


@dataclass(frozen=True, slots=True)
class Ask:
    """What a request wants. `streams`: it asked for a stream, so an abandoned slot is free at once.

    `features`: what is known of its size; `excluded`: peers that failed it or sent it back; `here_only`: no
    peer will do, because it is this node's own model that is to be loaded; `record`: where to write down what
    was decided, for people. `prefix`: how its prompt begins; `warmth`: where how much of that was
    read before.
    """

    profile: Profile
    request_id: str
    streams: bool = False
    travel: Travel = AT_HOME
    features: Features = UNKNOWN
    excluded: frozenset[str] = frozenset()
    here_only: bool = False
    record: Record | None = None
    prefix: Prefix = NOTHING
    warmth: Warmth = COLD

    def shares_of(self, instances: Sequence[Instance]) -> Sequence[float]:
        """What each of them has of the prompt, from 0 to 1; empty where none has any."""
        found = self.warmth.instances
        return [found.get(one.id, 0.0) for one in instances] if found else ()


class Lease:
    """A slot of an instance, held for one request. `release` exactly once; a second call does nothing."""

    __slots__ = ("_ask", "_number", "_released", "instance", "queued_seconds", "since")

    def __init__(self, ask: Ask, instance: Instance, queued_seconds: float) -> None:
        """Takes the slot: the caller has just seen that one is free."""
        self._number = instance.occupy()
        self.instance = instance
        self.queued_seconds = queued_seconds
        self.since = trio.current_time()
        self._ask = ask
        self._released = False

    @property
    def place(self) -> str:
        """Who serves, for logs."""
        return self.instance.id

    async def connect(self, *, fresh: bool = False) -> UpstreamConnection:
        """A connection to the instance. Raises UpstreamBroken."""
        kept = None if fresh else self.instance.idle_connection()
        return kept or await self.instance.connect()

    def release(
        self,
        connection: UpstreamConnection | None = None,
        *,
        complete: bool = False,
        working: bool = False,
    ) -> None:
        """Free the slot. `connection` goes back to the instance when the response was `complete`,
        else it is closed. `working`: llama-server was left in the middle of the request; a stream
        ends with its connection, anything else keeps the slot busy until llama-server says otherwise.
        """
        if self._released:
            return
        self._released = True
        if connection is not None:
            if complete:
                self.instance.keep(connection)
            else:
                connection.close()
        self.instance.vacate(self._number, abandoned=working and not complete and not self._ask.streams)


class Seat(Protocol):
    """A forward in flight, as the mesh counts it. `leave` exactly once."""

    @property
    def node(self) -> str:
        """The peer that is to serve."""

    @property
    def first_hop(self) -> str:
        """Where it is sent: the peer itself, or a node that leads to it."""

    @property
    def model(self) -> str:
        """The profile, as the peer calls it."""

    @property
    def asleep(self) -> bool:
        """Whether `connect` has to wake a machine first."""

    async def wake(self) -> None:
        """Wake it, and return when it has joined. Raises UpstreamBroken. May be cancelled and called anew."""

    async def connect(self, *, fresh: bool) -> UpstreamConnection:
        """A connection to the peer. Raises UpstreamBroken."""

    def hear(self, situation: bytes) -> None:
        """Take in what the peer says of itself in a reply's `X-Llamesh-Load`."""

    def leave(self, connection: UpstreamConnection | None, *, complete: bool, failed: bool) -> None:
        """The forward has ended. `complete`: the connection may be used again; `failed`: the peer didn't
        do its part (not: it said no)."""


class Forward:
    """A seat at a peer, held for one request; the same verbs as `Lease`."""

    __slots__ = (
        "_released", "ask", "fingerprint", "max_wait_ms", "queued_seconds", "seat", "sent", "since",
    )  # fmt: skip

    def __init__(
        self,
        ask: Ask,
        seat: Seat,
        queued_seconds: float,
        max_wait_ms: float | None,
        fingerprint: str | None = None,
    ) -> None:
        """`max_wait_ms`: when it would have to wait longer there, another place would have been better;
        `fingerprint`: what the peer has to run, None where that doesn't matter."""
        self.ask = ask
        self.seat = seat
        self.queued_seconds = queued_seconds
        self.max_wait_ms = max_wait_ms
        self.fingerprint = fingerprint or ""
        self.sent = False  # the peer may have had it in its hands
        self.since = trio.current_time()
        self._released = False

    @property
    def node(self) -> str:
        """The peer."""
        return self.seat.node

    @property
    def place(self) -> str:
        """Who serves, for logs."""
        return f"node {self.seat.node}"

    async def connect(self, *, fresh: bool = False) -> UpstreamConnection:
        """A connection to the peer. Raises UpstreamBroken."""
        return await self.seat.connect(fresh=fresh)

    def release(
        self,
        connection: UpstreamConnection | None = None,
        *,
        complete: bool = False,
        working: bool = False,
    ) -> None:
        """Give the seat back. A connection that isn't `complete` is closed, and that is how the peer learns
        that the client left. `working` is False when the peer itself broke off.
        """
        if self._released:
            return
        self._released = True
        self.seat.leave(connection, complete=complete, failed=not complete and not working)


AnyLease = Lease | Forward


def loading_info(instance: Instance, node: str, usual_seconds: float) -> dict[str, object]:
    """What is told to those who couldn't wait for a start: {model, state, node, progress?, eta_seconds?}.

    `usual_seconds`: how long it took before, 0 when unknown; a guess isn't made up then.
    """
    info: dict[str, object] = {"model": instance.profile.public_name, "state": "loading", "node": node}
    if usual_seconds:
        passed = trio.current_time() - instance.created
        info["progress"] = round(min(0.99, passed / usual_seconds), 2)
        info["eta_seconds"] = round(max(0.0, usual_seconds - passed), 1)
    return info
