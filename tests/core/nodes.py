"""A model of a few nodes and their clients, without I/O: events in the order of time, nothing else.

Nodes serve first come, first served, on slots with a fixed service time, so the best split is
known. An entry chooses with the real `route`; it sees itself as it is, and a peer as the peer's news
told it: how many requests of others were there (those of the entry it knows itself). News comes
with probes and, unless a test says otherwise, with replies.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Sequence

from llamesh.core.cost import Features, Outlook
from llamesh.core.routing import Choice, route
from llamesh.core.speeds import Speeds, note

Action = Callable[[], None]


class World:
    """Time in milliseconds, and what is going to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Action]] = []

    def after(self, delay: float, action: Action) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._order), action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()


class Node:
    """One node with one instance of the profile. `load_ms`: it is cold, and takes that long to start."""

    def __init__(
        self,
        world: World,
        name: str,
        *,
        slots: int = 4,
        service: float = 100.0,
        load_ms: float | None = None,
        known: bool = True,
        jitter: float = 0.0,
    ) -> None:
        self.world, self.name, self.slots, self.service, self.load_ms = world, name, slots, service, load_ms
        self.speeds = note(Speeds(), service_ms=service) if known else Speeds()
        self.served = 0
        self.here: Counter[str] = Counter()  # requests by entry, waiting or served
        self._ready_at = 0.0 if load_ms is None else None
        self._busy = 0
        self._line: deque[tuple[str, Action]] = deque()
        self._jitter = jitter
        self._chance = random.Random(name)

    @property
    def ready(self) -> bool:
        return self._ready_at is not None and self.world.now >= self._ready_at

    def take(self, entry: str, done: Action) -> None:
        """A request comes; `done` is called when it has been served."""
        self.here[entry] += 1
        self._line.append((entry, done))
        if self._ready_at is None:
            assert self.load_ms is not None
            self._ready_at = self.world.now + self.load_ms
            self.world.after(self.load_ms, self._serve)
        self._serve()

    def outlook(self, entry: str, *, here: bool = False) -> Outlook:
        """What it tells an entry about itself: everything but the entry's own requests."""
        others = self.here.total() - (0 if here else self.here[entry])
        loading = self._ready_at is not None and not self.ready
        return Outlook(
            node="" if here else self.name,
            ready_slots=self.slots if self.ready else 0,
            busy=others,
            loading_left_ms=self._ready_at - self.world.now
            if loading and self._ready_at is not None
            else None,
            loading_slots=self.slots if loading else 0,
            load_ms=self.load_ms if self._ready_at is None else None,
            slots_per_instance=self.slots,
            service_ms=self.speeds.service_ms,
        )

    def _serve(self) -> None:
        while self.ready and self._line and self._busy < self.slots:
            entry, done = self._line.popleft()
            self._busy += 1
            took = self.service * (1 + self._chance.uniform(-self._jitter, self._jitter))
            self.world.after(took, lambda e=entry, d=done, t=took: self._finish(e, d, t))  # type: ignore[misc]

    def _finish(self, entry: str, done: Action, took: float) -> None:
        self._busy -= 1
        self.served += 1
        self.here[entry] -= 1
        self.speeds = note(self.speeds, service_ms=took)
        self._serve()
        done()


class Entry:
    """A node that clients ask. `times`: begin and duration of each answered request."""

    def __init__(
        self,
        world: World,
        node: Node,
        peers: Sequence[Node],
        *,
        link: float = 1.0,
        probe_every: float = 1000.0,
        replies_tell: bool = True,
    ) -> None:
        self.world, self.node, self.link, self.probe_every = world, node, link, probe_every
        self.replies_tell = replies_tell
        self.times: list[tuple[float, float]] = []
        self.choices: list[Choice] = []
        self._peers = {peer.name: peer for peer in peers}
        self._news = {peer.name: (0.0, peer.outlook(node.name)) for peer in peers}
        self._sent: Counter[str] = Counter()
        self._numbers = itertools.count()
        for place, peer in enumerate(peers):
            self._probe(peer, probe_every * (place + 1) / len(peers))

    def keep_asking(self) -> None:
        """One client in a closed loop: it asks again as soon as it has its answer."""
        begun = self.world.now

        def answered() -> None:
            self.times.append((begun, self.world.now - begun))
            self.keep_asking()

        self.ask(answered)

    def ask(self, done: Action) -> None:
        choice = route(
            self.node.outlook(self.node.name, here=True),
            [self._outlook(name) for name in self._peers],
            Features(number=next(self._numbers)),
        )
        self.choices.append(choice)
        if not choice.node:
            assert choice.node == ""
            self.node.take(self.node.name, done)
            return
        peer = self._peers[choice.node]
        self._sent[peer.name] += 1

        def served() -> None:
            news = peer.outlook(self.node.name)

            def back() -> None:
                self._sent[peer.name] -= 1
                if self.replies_tell:
                    self._news[peer.name] = (self.world.now, news)
                done()

            self.world.after(self.link / 2, back)

        self.world.after(self.link / 2, lambda: peer.take(self.node.name, served))

    def _outlook(self, name: str) -> Outlook:
        came, news = self._news[name]
        left = news.loading_left_ms
        return Outlook(
            node=name,
            link_ms=self.link,
            ready_slots=news.ready_slots,
            busy=news.busy,
            sent=self._sent[name],
            loading_left_ms=None if left is None else max(0.0, left - (self.world.now - came)),
            loading_slots=news.loading_slots,
            load_ms=news.load_ms,
            slots_per_instance=news.slots_per_instance,
            service_ms=news.service_ms,
        )

    def _probe(self, peer: Node, first: float) -> None:
        def look() -> None:
            news = peer.outlook(self.node.name)

            def back() -> None:
                self._news[peer.name] = (self.world.now, news)

            self.world.after(self.link / 2, back)
            self.world.after(self.probe_every, look)

        self.world.after(first, look)


def best_p95(nodes: Sequence[Node], clients: int) -> float:
    """p95 of the split that is best for clients in closed loops: n of them on a node with s slots and
    service time S are answered in max(S, n S / s) each.
    """

    def took(node: Node, n: int) -> float:
        return max(node.service, n * node.service / node.slots)

    counts = [0] * len(nodes)
    for _ in range(clients):
        cheapest = min(range(len(nodes)), key=lambda i: took(nodes[i], counts[i] + 1))
        counts[cheapest] += 1
    return p95([took(node, n) for node, n in zip(nodes, counts, strict=True) for _ in range(n)])


def p95(values: Sequence[float]) -> float:
    return sorted(values)[int(len(values) * 0.95)]
