"""Every wait of a request before an upstream is chosen: the queue, the start of an instance, the turn.

    ask = Ask(profile, request_id=..., streams=True)
    lease = dispatch.take(ask)                   # a slot is free and nobody waits: no await at all
    if lease is None:
        with dispatch.join(ask) as ticket:       # a place in the queue; raises QueueFull, Draining, ...
            lease = await ticket.wait()          # raises QueueTimeout, SpawnFailed, NoCapacity
    ...
    lease.release()

One queue per profile, first come, first served. Whenever something changes, `_settle` decides
for the head of the queue, carries that out and goes on with the next head: synchronous from the
look to the deed, so there is no state between them that anyone could see or be cancelled in.
A ticket that leaves its `with` block without having handed over its lease gives it back. Across
profiles, when room for instances is short, the queue whose head has waited longest is asked first.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable
from types import TracebackType

import trio

from llamesh.config.cookbook import Profile
from llamesh.config.current import Current
from llamesh.core.lifecycle import State
from llamesh.core.placement import Refuse, Serve, Spawn, Wait, choose, place
from llamesh.errors import (
    Draining,
    LlameshError,
    ModelNotFound,
    NoCapacity,
    QueueFull,
    QueueTimeout,
    SpawnFailed,
)
from llamesh.lease import Ask, Lease, loading_info
from llamesh.local.instance import Instance
from llamesh.local.launch import BadArguments
from llamesh.local.pool import Pool
from llamesh.local.ports import NoFreePort
from llamesh.local.troubles import MAX_TRIES
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger

log = get_logger("dispatch")

# While the awaited model loads, its progress stands for this long before the waiter's clock goes on.
_PROGRESS_HOLDS = 5.0

# A waiter looks at its budget this often (seconds); being late by this much is fine for a queue.
_SLICE = 0.5
_SHORTEST = 0.005


class Ticket:
    """A place in a queue. Leaving the `with` block frees it, or the lease that nobody took over."""

    def __init__(self, ask: Ask, line: _Line, dispatch: Dispatch) -> None:
        self.ask = ask
        self.since = trio.current_time()
        self.number = next(dispatch._numbers)  # the order of coming, over all queues
        self._line = line
        self._dispatch = dispatch
        self._turn = trio.Event()
        self._lease: Lease | None = None
        self._error: LlameshError | None = None

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            lease, self._lease = self._lease, None
            lease.release()
        self._dispatch._leave(self)

    @property
    def waiting_for(self) -> str:
        """What this waits for, for people: "loading tiny:default for 3 s"."""
        return self._dispatch._describe(self)

    async def wait(self, at_most: float = math.inf) -> Lease | None:
        """The lease, which is the caller's from now on; None when `at_most` seconds passed first.

        Raises QueueTimeout when the profile's `max_wait_in_queue_ms` is used up, and whatever the
        queue was refused for; the place is given up then. Time in which the awaited model makes
        progress isn't counted.
        """
        until = trio.current_time() + at_most
        while not self._turn.is_set():
            now = trio.current_time()
            if now >= until:
                return None
            try:
                left = self._dispatch._charge(self, now)
            except QueueTimeout:
                self._dispatch._leave(self)
                raise
            with trio.move_on_after(min(left, until - now)):
                await self._turn.wait()
        if self._error is not None:
            raise self._error
        lease, self._lease = self._lease, None
        assert lease is not None  # noqa: S101
        return lease

    def _grant(self, lease: Lease) -> None:
        self._lease = lease
        self._turn.set()

    def _refuse(self, error: LlameshError) -> None:
        self._error = error
        self._turn.set()


class _Line:
    """One profile's queue."""

    __slots__ = ("profile", "reason", "spent", "tickets")

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.tickets: deque[Ticket] = deque()
        self.reason = ""
        self.spent: dict[Ticket, tuple[float, float]] = {}  # ticket -> (seconds counted, last look)


class Dispatch:
    """Owner of all queues of this node; see the module."""

    def __init__(self, current: Current, pool: Pool, learned: LearnedValues) -> None:
        # Three reasons to take nothing new, each with an owner of its own: they must not undo each other.
        self.shutting_down = False
        self.drained = False  # by an operator
        self.away: Callable[[], str] = lambda: ""  # see Keeper.away
        self._current = current
        self._pool = pool
        self._learned = learned
        self._lines: dict[str, _Line] = {}  # only those with someone in them
        self._numbers = itertools.count()
        self._settling = False
        self._again = False
        pool.on_change = self._on_change
        pool.queue_length = self.queue_length

    @property
    def closed(self) -> str:
        """Why no new request is taken, for people; "" when they are."""
        if self.shutting_down:
            return "is shutting down"
        if self.drained:
            return "is draining"
        away = self.away()
        return f"leaves this machine to its owner: {away}" if away else ""

    # For requests.

    def take(self, ask: Ask) -> Lease | None:
        """A free slot, at once, when nobody waits for the profile; else None."""
        key = ask.profile.key
        if key in self._lines or self.shutting_down or self.drained:
            return None
        instances = self._pool.instances(key)
        index = choose(instances)
        if index < 0:
            return None
        return Lease(ask, instances[index], 0.0)

    def join(self, ask: Ask, *, admitted: bool = False) -> Ticket:
        """A place at the end of the profile's queue. Raises Draining, QueueFull, SpawnFailed.

        `admitted`: it was taken before, maybe before a reload, and is tried again in spite of a drain.
        """
        profile = self._current.cookbook.find(ask.profile.key) or ask.profile
        if (closed := self.closed) and not admitted:
            raise Draining(f"node {self._node} {closed}, and takes no new requests; try another node")
        self._check_queue_limits(profile)
        if self._is_hopeless(profile.key):
            raise self._spawn_failed(profile)
        line = self._lines.get(profile.key)
        if line is None:
            line = self._lines[profile.key] = _Line(profile)
        ticket = Ticket(ask, line, self)
        line.tickets.append(ticket)
        self._settle()
        return ticket

    # For the operator's view.

    def queue_length(self, key: str | None = None) -> int:
        """How many wait for "model:profile", or for anything."""
        if key is not None:
            line = self._lines.get(key)
            return len(line.tickets) if line else 0
        return sum(len(line.tickets) for line in self._lines.values())

    def refuse_all(self, make: Callable[[Profile], LlameshError]) -> None:
        """Send everyone who waits away; at shutdown, when the grace is over."""
        lines, self._lines = self._lines, {}
        for key, line in lines.items():
            for ticket in line.tickets:
                ticket._refuse(make(line.profile))
            self._pool.forgo(key)

    def apply_cookbook(self) -> None:
        """The cookbook has changed: who waits, waits for the profile as it is now, or is told."""
        for key, line in list(self._lines.items()):
            profile = self._current.cookbook.find(key)
            if profile is not None and profile.key == key:
                line.profile = profile
                continue
            error = ModelNotFound(f"{key} was removed from the cookbook of node {self._node}", param="model")
            while line.tickets:
                line.tickets.popleft()._refuse(error)
            self._forget_if_empty(line)
        self._settle()

    # Inside.

    @property
    def _node(self) -> str:
        return self._current.settings.node_id

    def _check_queue_limits(self, profile: Profile) -> None:
        limit = profile.max_queue_size
        if limit is None:
            limit = self._current.settings.model_defaults.max_queue_size_per_model
        length = self.queue_length(profile.key)
        if limit and length >= limit:
            raise QueueFull(f"the queue of {profile.key} on node {self._node} is full ({length} wait)")
        total = self._current.settings.max_total_queue_entries
        if total and self.queue_length() >= total:
            raise QueueFull(f"node {self._node} has {total} requests waiting, as many as it may have")

    def _leave(self, ticket: Ticket) -> None:
        line = ticket._line
        line.spent.pop(ticket, None)
        if ticket in line.tickets:
            line.tickets.remove(ticket)
            self._forget_if_empty(line)
            self._settle()

    def _forget_if_empty(self, line: _Line) -> None:
        if not line.tickets and self._lines.get(line.profile.key) is line:
            del self._lines[line.profile.key]
            self._pool.forgo(line.profile.key)

    def _on_change(self, key: str) -> None:
        if self._lines:
            self._settle()

    def _settle(self) -> None:
        """Decide for all queues until nothing moves. Called from within itself (a spawn or a drain
        reports a change), it only notes that another round is due.
        """
        self._again = True
        if self._settling:
            return
        self._settling = True
        try:
            while self._again:
                self._again = False
                lines = sorted(self._lines.values(), key=lambda line: line.tickets[0].number)
                # Free slots first, of all queues: who was loaded for somebody isn't idle.
                for line in lines:
                    self._serve(line)
                for line in lines:
                    self._make_progress(line)
        finally:
            self._settling = False

    def _serve(self, line: _Line) -> None:
        """Give free slots to those who wait."""
        instances = self._pool.instances(line.profile.key)
        if away := self.away():
            message = f"node {self._node} leaves this machine to its owner: {away}; try another node"
            while line.tickets:
                line.tickets.popleft()._refuse(Draining(message))
        while line.tickets and (index := choose(instances)) >= 0:
            ticket = line.tickets.popleft()
            ticket._grant(Lease(ticket.ask, instances[index], trio.current_time() - ticket.since))
        self._forget_if_empty(line)

    def _make_progress(self, line: _Line) -> None:
        """Start what those need who wait, make room for it, or tell them why that can't be."""
        profile, pool, key = line.profile, self._pool, line.profile.key
        while line.tickets:
            if self._is_hopeless(key):
                line.tickets.popleft()._refuse(self._spawn_failed(profile))
                continue
            room = pool.room(profile)
            decision = place(
                pool.instances(key),
                waiting=len(line.tickets),
                slots_expected=pool.slots_expected(key),
                max_instances=pool.max_instances(profile),
                room=room,
                resting=pool.resting(key),
            )
            match decision:
                case Serve():
                    self._again = True  # it became free just now
                    break
                case Spawn(evict, on_cpu) if evict:
                    line.reason = f"waiting for {evict[0]} to leave"
                    pool.make_room(profile, evict, on_cpu=on_cpu)
                    break
                case Spawn(on_cpu=on_cpu):
                    try:
                        pool.spawn(profile, on_cpu=on_cpu)
                    except (NoFreePort, OSError) as error:
                        line.reason = str(error)
                        pool.forgo(key)
                        break
                    except BadArguments as error:
                        message = f"{key} can't be started on node {self._node}: {error}"
                        line.tickets.popleft()._refuse(SpawnFailed(message, param="model"))
                case Wait(reason):
                    line.reason = reason
                    if decision != Wait(getattr(room, "reason", "")) or not pool.is_making_room(key):
                        # It waits for something else now: whoever was to leave for it needn't.
                        pool.forgo(key)
                    break
                case Refuse(reason, failed):
                    message = f"{key} can't run on node {self._node}: {reason}"
                    line.tickets.popleft()._refuse((SpawnFailed if failed else NoCapacity)(message))
        self._forget_if_empty(line)

    def _is_hopeless(self, key: str) -> bool:
        """Whether all tries to start it failed a moment ago, and no other instance is or will be there."""
        trouble = self._pool.trouble(key)
        if trouble is None or not trouble.exhausted or not self._pool.resting(key):
            return False
        return not any(i.state in (State.STARTING, State.READY) for i in self._pool.instances(key))

    def _spawn_failed(self, profile: Profile) -> SpawnFailed:
        trouble = self._pool.trouble(profile.key)
        why = str(trouble.last) if trouble is not None else "unknown"
        return SpawnFailed(
            f"{profile.key} failed to start {MAX_TRIES} times on node {self._node}: {why}",
            param="model",
        )

    def _loading(self, key: str) -> Instance | None:
        """The instance that loads, of several the one that moved last."""
        starting = [i for i in self._pool.instances(key) if i.state is State.STARTING]
        return max(starting, key=lambda i: i.last_progress) if starting else None

    def _charge(self, ticket: Ticket, now: float) -> float:
        """Count the time since the last look against the ticket's budget, unless a load progresses.

        When to look again, in seconds from now. Raises QueueTimeout.
        """
        line = ticket._line
        profile = line.profile
        limit = profile.max_wait_in_queue_ms
        if limit is None:
            limit = self._current.settings.model_defaults.max_wait_in_queue_ms
        if not limit:
            return math.inf
        spent, looked = line.spent.get(ticket, (0.0, now))
        loading = self._loading(profile.key)
        moved = self._pool.weights.moved(profile) if loading is None else loading.last_progress
        if now - moved > _PROGRESS_HOLDS:
            spent += now - looked
        line.spent[ticket] = (spent, now)
        if spent * 1000 >= limit:
            message = f"{profile.key} on node {self._node}: no slot within {limit} ms"
            coming = self.loading_info(loading) if loading else self._pool.weights.told(profile, self._node)
            extra = {"loading": coming} if coming else {}
            raise QueueTimeout(f"{message} ({self._describe(ticket)})", extra=extra)
        # Never at once: while the clock stands still, what is left doesn't shrink.
        return min(_SLICE, max(limit / 1000 - spent, _SHORTEST))

    def loading_info(self, instance: Instance) -> dict[str, object]:
        """The `loading` member of a refusal."""
        return loading_info(instance, self._node, self._learned.of(instance.profile.key).load_seconds)

    def _describe(self, ticket: Ticket) -> str:
        key = ticket.ask.profile.key
        loading = self._loading(key)
        if loading is not None:
            return f"loading {key} for {trio.current_time() - loading.created:.0f} s"
        if (download := self._pool.weights.progress(ticket.ask.profile)) is not None:
            return f"{download}, for {key}"
        line = ticket._line
        ahead = line.tickets.index(ticket) if ticket in line.tickets else 0
        if line.reason and line.reason != "queued":
            return f"{line.reason}; {ahead} ahead"
        return f"queued for {key}, {ahead} ahead"
