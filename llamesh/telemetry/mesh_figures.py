"""What `GET /metrics` says of the mesh: plain figures in, metric families out.

Labels: `peer` is a node id, of at most `MOST_PEERS` nodes; all others are words of fixed sets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

# Each is about twelve lines of every scrape.
MOST_PEERS = 256

STATUSES = ("alive", "suspect", "asleep", "dead", "left")
BREAKER_STATES = ("closed", "open", "half_open")


@dataclass(frozen=True, slots=True)
class PeerFigures:
    """One peer. `round_trip`: seconds of a probe, None before the first; `breaker`: one of BREAKER_STATES;
    `forwards`: those that are over, by outcome; `running`: those that aren't; `links`: connections by state.
    """

    node: str
    up: bool
    round_trip: float | None
    breaker: str
    forwards: Mapping[str, int]
    running: int
    links: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class MeshFigures:
    """All of it. `statuses`: how many nodes are so, this one left out; `gossip`: messages and bytes by
    (direction, kind); `handshakes`: by (role, outcome)."""

    statuses: Mapping[str, int] = field(default_factory=dict)
    peers: Sequence[PeerFigures] = ()
    gossip: Mapping[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    handshakes: Mapping[tuple[str, str], int] = field(default_factory=dict)


def families(figures: MeshFigures) -> Iterator[Metric]:
    """The metric families of the mesh."""
    peers = figures.peers[:MOST_PEERS]
    nodes = GaugeMetricFamily("llamesh_peers", "Other nodes that are known", labels=("status",))
    for status in STATUSES:
        nodes.add_metric((status,), figures.statuses.get(status, 0))
    yield nodes
    yield _by_peer("llamesh_peer_up", "1 while a node is an unsuspected member", peers, lambda p: p.up)
    yield _by_peer(
        "llamesh_peer_round_trip_seconds",
        "A probe, there and back (moving mean)",
        peers,
        lambda p: p.round_trip,
    )
    yield _by_peer(
        "llamesh_forwarded_requests_running",
        "Requests that this node has forwarded and that aren't over",
        peers,
        lambda p: p.running,
    )
    forwards = CounterMetricFamily(
        "llamesh_forwards", "Requests forwarded, when they are over", labels=("peer", "outcome")
    )
    breakers = GaugeMetricFamily(
        "llamesh_breaker_state", "1 for the state that the circuit breaker is in", labels=("peer", "state")
    )
    links = GaugeMetricFamily(
        "llamesh_links", "Connections for requests to a peer, whoever dialled", labels=("peer", "state")
    )
    for peer in peers:
        for outcome, count in peer.forwards.items():
            forwards.add_metric((peer.node, outcome), count)
        for state in BREAKER_STATES:
            breakers.add_metric((peer.node, state), float(state == peer.breaker))
        for state, count in peer.links.items():
            links.add_metric((peer.node, state), count)
    yield from (forwards, breakers, links)
    yield from _gossip(figures.gossip)
    handshakes = CounterMetricFamily(
        "llamesh_handshakes", "Openings of encrypted connections", labels=("role", "outcome")
    )
    for labels, count in sorted(figures.handshakes.items()):
        handshakes.add_metric(labels, count)
    yield handshakes


def _gossip(counted: Mapping[tuple[str, str], tuple[int, int]]) -> Iterator[Metric]:
    messages = CounterMetricFamily(
        "llamesh_gossip_messages", "Messages of gossip", labels=("direction", "kind")
    )
    sizes = CounterMetricFamily("llamesh_gossip_bytes", "The same in bytes", labels=("direction", "kind"))
    for labels, (count, size) in sorted(counted.items()):
        messages.add_metric(labels, count)
        sizes.add_metric(labels, size)
    yield messages
    yield sizes


def _by_peer(
    name: str, text: str, peers: Sequence[PeerFigures], read: Callable[[PeerFigures], float | None]
) -> Metric:
    family = GaugeMetricFamily(name, text, labels=("peer",))
    for peer in peers:
        value = read(peer)
        if value is not None:
            family.add_metric((peer.node,), float(value))
    return family
