"""What a scraper reads about the mesh."""

from __future__ import annotations

from llamesh.telemetry.mesh_figures import MOST_PEERS, MeshFigures, PeerFigures
from llamesh.telemetry.prometheus import Gauges
from llamesh.telemetry.stats import OTHER_NODES, NodeStats
from tests.telemetry.test_prometheus import scrape

B = PeerFigures("b", True, 0.0025, "half_open", {"lost": 2, "ended": 7}, 3, {"idle": 1, "busy": 4})
NEW = PeerFigures("new", False, None, "closed", {"lost": 0, "ended": 0}, 0, {"idle": 0, "busy": 0})


def mesh_of(figures: MeshFigures) -> Gauges:
    return Gauges({}, {}, ready=True, mesh=figures)


def test_a_node_alone_says_nothing_of_it() -> None:
    names = {name for name, _ in scrape(NodeStats())}
    assert not [name for name in names if "peer" in name or "gossip" in name or "handshake" in name]


def test_peers_gossip_and_handshakes() -> None:
    figures = MeshFigures(
        {"alive": 1, "dead": 2},
        [B, NEW],
        {("in", "root"): (3, 450), ("out", "deltas"): (1, 9000)},
        {("dialler", "ok"): 4, ("acceptor", "token"): 1},
    )
    samples = scrape(NodeStats(), mesh_of(figures))
    by_status = {name: samples["llamesh_peers", (("status", name),)] for name in ("alive", "suspect", "dead")}
    assert by_status == {"alive": 1, "suspect": 0, "dead": 2}
    peer = (("peer", "b"),)
    assert samples["llamesh_peer_up", peer] == 1
    assert samples["llamesh_peer_up", (("peer", "new"),)] == 0
    assert samples["llamesh_peer_round_trip_seconds", peer] == 0.0025
    assert ("llamesh_peer_round_trip_seconds", (("peer", "new"),)) not in samples
    assert samples["llamesh_forwarded_requests_running", peer] == 3
    assert samples["llamesh_forwards_total", (("outcome", "lost"), ("peer", "b"))] == 2
    assert samples["llamesh_forwards_total", (("outcome", "ended"), ("peer", "b"))] == 7
    states = {
        s: samples["llamesh_breaker_state", (*peer, ("state", s))] for s in ("closed", "open", "half_open")
    }
    assert states == {"closed": 0, "open": 0, "half_open": 1}
    assert samples["llamesh_links", (*peer, ("state", "busy"))] == 4
    assert samples["llamesh_gossip_bytes_total", (("direction", "in"), ("kind", "root"))] == 450
    assert samples["llamesh_gossip_messages_total", (("direction", "out"), ("kind", "deltas"))] == 1
    assert samples["llamesh_handshakes_total", (("outcome", "token"), ("role", "acceptor"))] == 1


def test_there_are_never_too_many_lines() -> None:
    stats = NodeStats()
    for number in range(2000):
        stats.count_served(f"node-{number}")
    stats.count_served("node-3")
    many = [
        PeerFigures(f"p{n}", True, None, "closed", {"lost": 0, "ended": 0}, 0, {"idle": 0})
        for n in range(900)
    ]
    samples = scrape(stats, mesh_of(MeshFigures({"alive": 900}, many)))
    served = {where[0][1]: count for (name, where), count in samples.items() if "served" in name}
    assert len(served) == 257
    assert served["node-3"] == 2
    assert sum(served.values()) == 2001
    assert served[OTHER_NODES] == 2000 - 256
    assert sum(name == "llamesh_peer_up" for name, _ in samples) == MOST_PEERS


def test_retries_by_reason() -> None:
    stats = NodeStats()
    stats.forward_retries.update(queue_full=2, lost=1)
    samples = scrape(stats, mesh_of(MeshFigures()))
    assert samples["llamesh_forward_retries_total", (("reason", "queue_full"),)] == 2
    assert samples["llamesh_forward_retries_total", (("reason", "lost"),)] == 1
