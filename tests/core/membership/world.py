"""Many memberships on a virtual clock, in a network that does what a test says. Deterministic for a seed.

One unit of time is one gossip interval. An exchange is a call and its answer, like the real one: a message
reaches the other side after a delay or not at all, and so does its reply. A probe has an answer within its
time limit or fails. What is cut, frozen or crashed doesn't answer.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from llamesh.core.membership import Event, Membership, Options, Status

PROBE_LIMIT = 0.5
LATENCY = (0.005, 0.02)


@dataclass
class Weather:
    """What the network does to each message."""

    loss: float = 0.0
    double: float = 0.0
    delay: tuple[float, float] = LATENCY


@dataclass
class Node:
    """One machine: a membership, and the process around it."""

    id: str
    membership: Membership
    phase: float  # within an interval, when its rounds begin
    skew: float = 0.0  # what its clock says more than the world's
    running: bool = True
    frozen: bool = False
    generation: int = 0  # of the process; what an earlier one was to get is lost
    thawed: list[Callable[[], None]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


class World:
    """Everybody, the time, and who can reach whom."""

    def __init__(self, seed: int = 1, options: Options | None = None, wall: int = 1_700_000_000_000) -> None:
        self.chance = random.Random(seed)
        self.options = options or Options()
        self.wall = wall
        self.now = 0.0
        self.weather = Weather()
        self.nodes: dict[str, Node] = {}
        self.left: set[str] = set()
        self.blocked: set[tuple[str, str]] = set()  # who can't call whom
        self.sent: Counter[str] = Counter()  # bytes of gossip, by sender
        self.probes: Counter[str] = Counter()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._number = itertools.count()

    # Time.

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._number), what))

    def run(self, rounds: float) -> None:
        """Let that many intervals pass."""
        until = self.now + rounds
        while self._queue and self._queue[0][0] <= until:
            self.now, _, what = heapq.heappop(self._queue)
            what()
        self.now = until

    def run_until(self, holds: Callable[[], bool], limit: float = 60, step: float = 0.25) -> float:
        """Rounds until something holds. Fails after `limit`."""
        began = self.now
        while not holds():
            assert self.now - began < limit, f"not after {limit} rounds:\n{self}"
            self.run(step)
        return self.now - began

    def clock(self, node: Node) -> float:
        return self.now + node.skew

    # Machines.

    def start(self, node_id: str, epoch: int | None = None) -> Node:
        """Start a process, again under the same id where there was one."""
        epoch = self.wall + int(self.now * 1000) if epoch is None else epoch
        chance = random.Random(self.chance.random())
        membership = Membership(node_id, epoch, self.options, chance)
        old = self.nodes.get(node_id)
        node = Node(node_id, membership, self.chance.random())
        if old is not None:
            node.generation = old.generation + 1
        self.nodes[node_id] = node
        self.left.discard(node_id)
        generation = node.generation
        self.at(self.now + node.phase, lambda: self._round(node_id, generation))
        return node

    def introduce(self, ids: Iterable[str]) -> None:
        """Everybody has a connection with the first."""
        first, *rest = ids
        for one in rest:
            self.nodes[one].membership.introduce(first)

    def crash(self, node_id: str) -> None:
        self.nodes[node_id].running = False

    def freeze(self, node_id: str) -> None:
        self.nodes[node_id].frozen = True

    def thaw(self, node_id: str) -> None:
        node = self.nodes[node_id]
        node.frozen = False
        waiting, node.thawed = node.thawed, []
        for what in waiting:
            what()

    def leave(self, node_id: str) -> None:
        """It tells whom it can reach, and ends."""
        node = self.nodes[node_id]
        message = node.membership.leave(self.clock(node))
        self.left.add(node_id)
        for peer, member in node.membership.members().items():
            if peer != node_id and member.status is Status.ALIVE:
                self._call(node, peer, message, lambda reply: None)
        node.running = False

    def cut(self, *groups: Iterable[str]) -> None:
        """Nobody reaches another group."""
        parts = [set(group) for group in groups]
        for here, there in itertools.permutations(parts, 2):
            self.blocked |= set(itertools.product(here, there))

    def heal(self) -> None:
        self.blocked.clear()

    # Rounds.

    def _round(self, node_id: str, generation: int) -> None:
        node = self.nodes[node_id]
        if node.generation != generation or not node.running:
            return
        if node.frozen:
            node.thawed.append(lambda: self._round(node_id, generation))
            return
        self.at(self.now + 1, lambda: self._round(node_id, generation))
        todo = node.membership.start_round(self.clock(node))
        for peer, message in todo.gossip:
            self._exchange(node, peer, message)
        for peer in todo.probes:
            self.probes[node.id] += 1
            self._probe(node, peer, lambda ok, peer=peer: self._probed(node, peer, ok))

    def _exchange(self, node: Node, peer: str, message: bytes) -> None:
        def replied(reply: bytes) -> None:
            following = node.membership.take_reply(peer, reply, self.clock(node))
            if following is not None:
                self._exchange(node, peer, following)

        self._call(node, peer, message, replied)

    def _call(self, node: Node, peer: str, message: bytes, replied: Callable[[bytes], None]) -> None:
        """A message to a peer, whose reply comes back if neither is lost."""
        self.sent[node.id] += len(message)
        once = [replied]

        def arrive() -> None:
            there = self.nodes[peer]
            reply = there.membership.answer(node.id, message, self.clock(there))
            self.sent[peer] += len(reply)
            self._deliver(peer, node.id, lambda: once.pop()(reply) if once else None)

        if (node.id, peer) not in self.blocked:
            self._deliver(node.id, peer, arrive)
            if self.chance.random() < self.weather.double:
                self._deliver(node.id, peer, arrive)

    def _deliver(self, sender: str, receiver: str, what: Callable[[], None]) -> None:
        """Over the network into a process, unless either is lost on the way."""
        there = self.nodes.get(receiver)
        # A call that was let through has its answer on the same connection: only a cut of both ways ends it.
        blocked = {(sender, receiver), (receiver, sender)} <= self.blocked
        if there is None or blocked or self.chance.random() < self.weather.loss:
            return
        generation = there.generation

        def arrived() -> None:
            now = self.nodes[receiver]
            if now.generation != generation or not now.running:
                return
            if now.frozen:
                now.thawed.append(arrived)
            else:
                what()

        self.at(self.now + self.chance.uniform(*self.weather.delay), arrived)

    # Probes.

    def _probe(self, node: Node, peer: str, done: Callable[[bool], None]) -> None:
        """`done` comes once: with True when the answer does, or with False at the time limit."""
        open_ = [done]
        generation = node.generation

        def finish(ok: bool) -> None:
            now = self.nodes[node.id]
            if open_ and now.generation == generation and now.running:
                if now.frozen:
                    now.thawed.append(lambda: finish(ok))
                else:
                    open_.pop()(ok)

        if (node.id, peer) not in self.blocked:
            self._deliver(node.id, peer, lambda: self._deliver(peer, node.id, lambda: finish(True)))
        self.at(self.now + PROBE_LIMIT, lambda: finish(False))

    def _probed(self, node: Node, peer: str, ok: bool) -> None:
        helpers = node.membership.probe_result(peer, ok, self.clock(node))
        if not helpers:
            return
        waiting = Counter({"open": len(helpers), "reached": 0})

        def said(reached: bool) -> None:
            waiting["open"] -= 1
            if reached and not waiting["reached"]:
                waiting["reached"] = 1
                node.membership.indirect_result(peer, True, self.clock(node))
            elif not waiting["open"] and not waiting["reached"]:
                node.membership.indirect_result(peer, False, self.clock(node))

        for helper in helpers:
            self._ask(node, helper, peer, said)

    def _ask(self, node: Node, helper: str, peer: str, said: Callable[[bool], None]) -> None:
        """An indirect probe: a call to the helper, which probes."""
        once = [said]

        def finish(ok: bool) -> None:
            if once and not node.frozen and node.running:
                once.pop()(ok)

        def arrive() -> None:
            there = self.nodes[helper]
            self._probe(there, peer, lambda ok: self._deliver(helper, node.id, lambda: finish(ok)))

        if (node.id, helper) not in self.blocked:
            self._deliver(node.id, helper, arrive)
        self.at(self.now + PROBE_LIMIT + 0.1, lambda: finish(False))

    # Looking.

    @property
    def up(self) -> list[Node]:
        """Processes that run and aren't frozen."""
        return [node for node in self.nodes.values() if node.running and not node.frozen]

    def events(self, node_id: str) -> list[Event]:
        """All that a node was told so far."""
        node = self.nodes[node_id]
        node.events += node.membership.take_events()
        return node.events

    def status(self, here: str, there: str) -> str:
        member = self.nodes[here].membership.members().get(there)
        return "unknown" if member is None else str(member.status)

    def agreed(self, ids: Iterable[str] | None = None) -> bool:
        """Whether these, or all that are up, see each other alive, nobody else, and the same state."""
        wanted = None if ids is None else set(ids)
        group = [node for node in self.up if wanted is None or node.id in wanted]
        if len({node.membership.root for node in group}) > 1:
            return False
        truth = {node.id: view(node.membership)[node.id] for node in group}
        return all(view(node.membership) == truth for node in group)

    def __str__(self) -> str:
        lines = [f"at {self.now:g}"]
        for node in self.nodes.values():
            how = "" if node.running else " (down)"
            lines.append(f"  {node.membership!r}{' (frozen)' if node.frozen else how}")
        return "\n".join(lines)


def view(membership: Membership) -> dict[str, tuple[int, int, dict[str, bytes]]]:
    """The living as a node sees them: epoch, incarnation and state."""
    return {
        one.id: (one.epoch, one.incarnation, dict(one.state))
        for one in membership.members().values()
        if one.status in (Status.ALIVE, Status.SUSPECT)
    }
