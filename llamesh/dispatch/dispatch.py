"""Every wait of a request before an upstream is chosen: the queue, the start of an instance, the turn.

    ask = Ask(profile, request_id=..., streams=True)
    lease = dispatch.take(ask)                   # a slot is free and nobody waits: no await at all
    if lease is None:
        with dispatch.join(ask) as ticket:       # a place in the queue; raises QueueFull, Draining, ...
            lease = await ticket.wait()          # raises QueueTimeout, SpawnFailed, NoCapacity
    ...
    lease.release()

A lease is a slot of an instance here, or a seat at a peer that will answer sooner: whoever asks needn't
know which. The peers are asked about (see `router`) when a request comes and whenever it is the head of
its queue and something changed, so who waits here may still be served there.

One queue per profile, first come, first served. Whenever something changes, `_settle` decides
for the head of the queue, carries that out and goes on with the next head: synchronous from the
look to the deed, so there is no state between them that anyone could see or be cancelled in.
A ticket that leaves its `with` block without having handed over its lease gives it back. Across
profiles, when room for instances is short, the queue whose head has waited longest is asked first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import trio

from llamesh.config.cookbook import Elsewhere, Profile
from llamesh.config.current import Current
from llamesh.core.lifecycle import State
from llamesh.core.placement import Refuse, Serve, Spawn, Wait, choose, place
from llamesh.dispatch.affinity import Affinity
from llamesh.dispatch.lease import AnyLease, Ask, Lease
from llamesh.dispatch.patience import Patience
from llamesh.dispatch.router import Router
from llamesh.dispatch.ticket import Line, Ticket
from llamesh.errors import (
    Draining,
    LlameshError,
    ModelNotFound,
    NoCapacity,
    QueueFull,
    SpawnFailed,
)
from llamesh.local.launch import BadArguments
from llamesh.local.pool import Pool
from llamesh.local.ports import NoFreePort
from llamesh.local.troubles import MAX_TRIES
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger

log = get_logger("dispatch")

# Of a queue whose first ones have to stay here. More than those are a burst of peers' requests, and its end
# is near.
_MOST_LOOKED_AT = 64


class Dispatch:
    """Owner of all queues of this node; see the module."""

    def __init__(self, current: Current, pool: Pool, learned: LearnedValues) -> None:
        # Three reasons to take nothing new, each with an owner of its own: they must not undo each other.
        self.shutting_down = False
        self.drained = False  # by an operator
        self.away: Callable[[], str] = lambda: ""  # see Keeper.away
        self.unwilling: Callable[[], str] = lambda: ""  # why nothing is done for peers now
        self.router: Router | None = None  # None: there are no peers
        self.patience = Patience(current, pool, learned)
        self.affinity = Affinity(pool)
        self._current = current
        self._pool = pool
        self._lines: dict[str, Line] = {}  # only those with someone in them
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

    def find(self, name: str) -> Profile | None:
        """The profile that `name` means, here or at a peer."""
        found = self._current.cookbook.find(name)
        if found is None and self.router is not None:
            return self.router.peers.find(name)
        return found

    def aliases_of(self, model: str, key: str) -> Iterable[str]:
        """Other names of a model, here and at peers; `key`: one of its profiles, "model:profile"."""
        yield from self._current.cookbook.aliases_of(model)
        if self.router is not None:
            yield from self.router.peers.aliases_of(key)

    def count_origin(self, origin: str, key: str, change: int) -> None:
        """One more (1) or less (-1) of a peer's requests is here."""
        if self.router is not None:
            requests = self.router.requests
            requests[origin, key] += change
            if not requests[origin, key]:
                del requests[origin, key]

    def take(self, ask: Ask) -> AnyLease | None:
        """A free slot, at once, when nobody waits for the profile; else None."""
        key = ask.profile.key
        if key in self._lines or self.shutting_down or self.drained:
            return None
        if ask.travel.origin and self.unwilling():
            return None
        instances = self._pool.instances(key)
        index = choose(instances, ask.shares_of(instances))
        if index < 0:
            if self.router is None or not isinstance(ask.profile.source, Elsewhere):
                return None
            # No queue, no ticket: there is nothing here to wait for.
            return self.router.forward(ask, here=False, since=trio.current_time())
        if self.router is not None:
            forward = self.router.forward(ask, here=True, since=trio.current_time())
            if forward is not None:
                return forward
        return Lease(ask, instances[index], 0.0)

    def join(self, ask: Ask, *, admitted: bool = False) -> Ticket:
        """A place at the end of the profile's queue. Raises Draining, QueueFull, SpawnFailed.

        `admitted`: it was taken before, maybe before a reload, and is tried again in spite of a drain.
        """
        profile = self._current.cookbook.find(ask.profile.key) or ask.profile
        ticket = Ticket(ask, self._lines.get(profile.key) or Line(profile), self)
        if not admitted:
            self._check_patience(ask)
        try:
            if (closed := self.closed) and not admitted:
                raise Draining(f"node {self._node} {closed}, and takes no new requests; try another node")
            if ask.travel.origin and (unwilling := self.unwilling()):
                raise Draining(f"node {self._node} takes no requests of others: {unwilling}")
            self._check_queue_limits(profile)
            if self._is_hopeless(profile.key):
                raise self._spawn_failed(profile)
        except LlameshError:
            # Somebody else may be able to.
            if not self._send_away(ticket, here=False):
                raise
            return ticket
        line = self._lines.setdefault(profile.key, ticket._line)
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

    def settle(self) -> None:
        """Peers have news: decide anew for who waits."""
        if self._lines:
            self._settle()

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
            profile = self.find(key)
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

    def _check_patience(self, ask: Ask) -> None:
        """Raises QueueFull when the peer that sent this would rather have it elsewhere than wait so long."""
        patience = ask.travel.max_wait_ms
        if patience is None or self.router is None:
            return
        expected = self.router.wait_here(ask)
        if expected > patience:
            raise QueueFull(
                f"{ask.profile.key} on node {self._node}: the wait would be {expected:.0f} ms, more than "
                f"the {patience:.0f} ms for which node {ask.travel.origin} prefers it"
            )

    def _send_away(self, ticket: Ticket, *, here: bool, ahead: int = 0) -> bool:
        """Give the request to a peer, if one will answer sooner (`here`: than this node, else: at all)."""
        if self.router is None:
            return False
        forward = self.router.forward(ticket.ask, here=here, since=ticket.since, ahead=ahead)
        if forward is None:
            return False
        ticket._grant(forward)
        return True

    def _send_away_or_refuse(self, line: Line, error: LlameshError) -> None:
        """This node can't serve the head of the queue: a peer does, or it is told why."""
        ticket = line.tickets.popleft()
        if not self._send_away(ticket, here=False):
            ticket._refuse(error)

    def _leave(self, ticket: Ticket) -> None:
        line = ticket._line
        line.spent.pop(ticket, None)
        if ticket in line.tickets:
            line.tickets.remove(ticket)
            self._forget_if_empty(line)
            self._settle()

    def _forget_if_empty(self, line: Line) -> None:
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

    def _serve(self, line: Line) -> None:
        """Give free slots to those who wait."""
        instances = self._pool.instances(line.profile.key)
        if away := self.away():
            message = f"node {self._node} leaves this machine to its owner: {away}; try another node"
            while line.tickets:
                self._send_away_or_refuse(line, Draining(message))
        while line.tickets and (index := choose(instances, line.tickets[0].ask.shares_of(instances))) >= 0:
            ticket = line.tickets.popleft()
            if self._send_away(ticket, here=True):
                continue
            ticket._grant(Lease(ticket.ask, instances[index], trio.current_time() - ticket.since))
        self._forget_if_empty(line)

    def _make_progress(self, line: Line) -> None:
        """Start what those need who wait, make room for it, or tell them why that can't be."""
        profile, pool, key = line.profile, self._pool, line.profile.key
        while line.tickets:
            if isinstance(profile.source, Elsewhere):
                self._await_peers(line)
                break
            if self._send_first_away(line):
                continue
            if self._is_hopeless(key):
                self._send_away_or_refuse(line, self._spawn_failed(profile))
                continue
            room = pool.room(profile, fetch=True)
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
                        self._send_away_or_refuse(line, SpawnFailed(message, param="model"))
                case Wait(reason):
                    line.reason = reason
                    if decision != Wait(getattr(room, "reason", "")) or not pool.is_making_room(key):
                        # It waits for something else now: whoever was to leave for it needn't.
                        pool.forgo(key)
                    break
                case Refuse(reason, failed):
                    message = f"{key} can't run on node {self._node}: {reason}"
                    refusal = (SpawnFailed if failed else NoCapacity)(message)
                    self._send_away_or_refuse(line, refusal)
        self._forget_if_empty(line)

    def _send_first_away(self, line: Line) -> bool:
        """Decide for the first in the queue, of those who may go at all: who has to stay holds up nobody."""
        if self.router is None:
            return False
        for ahead, ticket in enumerate(itertools.islice(line.tickets, _MOST_LOOKED_AT)):
            if self._send_away(ticket, here=True, ahead=ahead):
                line.tickets.remove(ticket)
                return True
            if self.router.has_choice(ticket.ask):
                return False
        return False

    def _await_peers(self, line: Line) -> None:
        """For a model that only peers have: send away whom they take, let wait who can, refuse the rest."""
        stuck = False
        for ticket in list(line.tickets):
            ask = ticket.ask
            ordinary = not ask.excluded and not ask.travel.origin
            if ordinary and stuck:
                continue  # as the one before it
            if self._send_away(ticket, here=False):
                line.tickets.remove(ticket)
                continue
            why = self.router.peers.explain(line.profile.key, ask.excluded) if self.router is not None else ""
            if ask.travel.hops >= self._current.settings.max_hops:
                ordinary, why = False, f"it has made {ask.travel.hops} hops, as many as max_hops allows"
            elif ordinary or (why and not ask.travel.origin):
                # Whoever has it may come back; until then, patience is the limit.
                line.reason = why or "no node of the mesh has it now"
                stuck = stuck or ordinary
                continue
            line.tickets.remove(ticket)
            why = why or "no other node of the mesh has it"
            ticket._refuse(NoCapacity(f"{line.profile.key} isn't on node {self._node}, and {why}"))

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
