"""The whole of placement on a model: requests come in bursts and in loops, and must be spread as well as
the best split would, with news that is old, nodes that differ, and several entries that don't
know of each other's requests. The model is in nodes.py.
"""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamesh.core.cost import Features, Outlook
from llamesh.core.routing import route
from tests.core.nodes import Entry, Node, World, best_p95, p95

CLIENTS = 64
NORMAL: dict[str, Any] = {}
FAST: dict[str, Any] = {"service": 25.0}
SLOW: dict[str, Any] = {"service": 400.0}

MESHES = {
    "equal": [NORMAL] * 4,
    "one slot each": [{"slots": 1}] * 4,
    "many slots": [{"slots": 8}] * 4,
    "long requests": [{"service": 2000.0}] * 4,
    "a fast peer": [NORMAL, NORMAL, NORMAL, FAST],
    "fast here": [FAST, NORMAL, NORMAL, NORMAL],
    "slow here": [SLOW, NORMAL, NORMAL, NORMAL],
    "all different": [NORMAL, {"slots": 1}, {"slots": 8, "service": 50.0}, {"slots": 2, "service": 200.0}],
}


def build(mesh: list[dict[str, Any]], entries: int = 1, **more: Any) -> tuple[World, list[Node], list[Entry]]:
    world = World()
    nodes = [Node(world, f"node-{place}", **one) for place, one in enumerate(mesh)]
    hot = [Entry(world, node, [n for n in nodes if n is not node], **more) for node in nodes[:entries]]
    return world, nodes, hot


def run(
    mesh: list[dict[str, Any]],
    *,
    entries: int = 1,
    stagger: float = 0.0,
    skip: float = 0.0,
    **more: Any,
) -> float:
    """p95 of all answers, those begun before `skip` left out, as a multiple of the best split's."""
    world, nodes, hot = build(mesh, entries, **more)
    for client in range(CLIENTS):
        world.after(client * stagger, hot[client % entries].keep_asking)
    best = best_p95(nodes, CLIENTS)
    world.run(skip + 20 * best)
    times = [took for entry in hot for begun, took in entry.times if begun >= skip]
    assert len(times) > 15 * CLIENTS
    return p95(times) / best


@pytest.mark.parametrize("link", [1.0, 10.0])
@pytest.mark.parametrize("stagger", [0.0, 1.7])
@pytest.mark.parametrize("mesh", MESHES)
def test_one_hot_entry_and_three_idle_peers(mesh: str, stagger: float, link: float) -> None:
    assert run(MESHES[mesh], stagger=stagger, link=link) <= 1.15


@pytest.mark.parametrize("mesh", ["equal", "a fast peer", "slow here"])
def test_services_that_vary_a_little(mesh: str) -> None:
    assert run([{**one, "jitter": 0.1} for one in MESHES[mesh]]) <= 1.15


@pytest.mark.parametrize("mesh", ["equal", "a fast peer", "slow here", "all different"])
def test_speeds_are_learned_on_the_way(mesh: str) -> None:
    """At the beginning nobody knows anything."""
    assert run([{**one, "known": False} for one in MESHES[mesh]], skip=3000.0) <= 1.15


@pytest.mark.parametrize("probe_every", [100.0, 400.0, 1000.0])
@pytest.mark.parametrize(("entries", "replies_tell"), [(2, True), (2, False), (3, True)])
@pytest.mark.parametrize("mesh", ["equal", "one slot each", "a fast peer", "slow here"])
def test_hot_entries_that_know_of_each_other_from_old_news(
    mesh: str, entries: int, probe_every: float, replies_tell: bool
) -> None:
    ratio = run(
        [{**one, "jitter": 0.02} for one in MESHES[mesh]],
        entries=entries,
        stagger=1.7,
        probe_every=probe_every,
        replies_tell=replies_tell,
    )
    assert ratio <= 1.3


@pytest.mark.parametrize("mesh", ["equal", "a fast peer", "all different"])
def test_every_node_is_an_entry(mesh: str) -> None:
    assert run([{**one, "jitter": 0.02} for one in MESHES[mesh]], entries=4, stagger=1.7) <= 1.3


def test_cold_peers_are_started_for_a_line_that_is_longer_than_their_load() -> None:
    mesh = [NORMAL, *[{"load_ms": 500.0}] * 3]
    assert run(mesh, skip=2000.0) <= 1.25
    # In the meantime nobody waits for longer than with this node alone, which would need 1,600 ms.
    world, nodes, [entry] = build(mesh)
    for _ in range(CLIENTS):
        entry.keep_asking()
    world.run(2000.0)
    assert max(took for _, took in entry.times) < 1000.0
    assert all(node.ready for node in nodes)


def test_cold_peers_stay_cold_while_waiting_here_is_shorter() -> None:
    world, nodes, [entry] = build([NORMAL, *[{"load_ms": 5000.0}] * 3])
    for _ in range(CLIENTS):
        entry.keep_asking()
    world.run(10_000.0)
    assert [node.ready for node in nodes] == [True, False, False, False]


def test_a_load_on_its_way_isn_t_given_more_than_it_can_serve_in_time() -> None:
    """A burst at a cold mesh: everybody loads, and then all are served in equal parts."""
    world, nodes, [entry] = build([{"load_ms": 500.0}] * 4)
    times: list[float] = []
    for _ in range(CLIENTS):
        entry.ask(lambda: times.append(world.now))
    world.run(10_000.0)
    assert [node.served for node in nodes] == [16] * 4
    assert max(times) <= 500 + 4 * 100 + 1


def test_few_clients_stay_here() -> None:
    world, nodes, [entry] = build(MESHES["equal"])
    entry.keep_asking()
    world.run(2000.0)
    assert [node.served for node in nodes] == [20, 0, 0, 0]


speed = st.sampled_from([20.0, 50.0, 100.0, 130.0, 400.0, 1000.0])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 8), speed), min_size=1, max_size=5), st.integers(1, 80))
def test_a_burst_ends_nearly_as_early_as_the_best_split(mesh: list[tuple[int, float]], burst: int) -> None:
    """Requests that come at once, before any news: the last of them is done when it could be, plus the
    tolerance that keeps some here, plus one service time of the slowest that took part. (For equal
    requests the best split is known: each goes where it ends first.)
    """
    sent = Counter[str]()
    for number in range(burst):
        here, *peers = (
            Outlook(
                node=f"n{place}" if place else "",
                link_ms=1.0 if place else 0.0,
                ready_slots=slots,
                sent=sent[f"n{place}" if place else ""],
                slots_per_instance=slots,
                service_ms=service,
                sharing=0.0,
            )
            for place, (slots, service) in enumerate(mesh)
        )
        node = route(here, peers, Features(number=number)).node
        assert node is not None
        sent[node] += 1
    names = ["", *(f"n{place}" for place in range(1, len(mesh)))]
    took = [
        -(-sent[name] // slots) * service
        for name, (slots, service) in zip(names, mesh, strict=True)
        if sent[name]
    ]
    ends: list[tuple[float, float]] = [(service, service) for slots, service in mesh for _ in range(slots)]
    heapq.heapify(ends)
    last = 0.0
    for _ in range(burst):
        last, service = ends[0]
        heapq.heapreplace(ends, (last + service, service))
    used = [service for name, (_, service) in zip(names, mesh, strict=True) if sent[name]]
    assert max(took) <= 1.05 * last + max(used) + 10.0


def spread(burst: int, nodes: int, slots: int, **more: Any) -> list[int]:
    """How many of a burst each of some equal nodes gets, before any news; the first is the entry."""
    counts = [0] * nodes
    for number in range(burst):
        here, *peers = (
            Outlook(
                node=f"n{place}" if place else "",
                link_ms=1.0 if place else 0.0,
                ready_slots=slots,
                sent=counts[place],
                slots_per_instance=slots,
                service_ms=1000.0,
                **more,
            )
            for place in range(nodes)
        )
        node = route(here, peers, Features(number=number, output_tokens=50)).node
        assert node is not None
        counts[int(node[1:] or 0)] += 1
    return counts


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 100))
def test_a_burst_over_equal_nodes_is_even(slots: int, nodes: int, burst: int) -> None:
    """Where neighbours are known to slow each other down, from the beginning."""
    here, *peers = spread(burst, nodes, slots, decode_ms_per_token=20.0, sharing=0.2)
    assert max(peers) - min(peers) <= 1
    assert max(peers) <= here <= min(peers) + 1


@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 100))
def test_where_neighbours_cost_nothing_slots_here_are_filled_first(
    slots: int, nodes: int, burst: int
) -> None:
    here, *peers = spread(burst, nodes, slots, decode_ms_per_token=20.0, sharing=0.0)
    assert max(peers) - min(peers) <= 1
    if burst <= slots:
        assert here == burst
    if burst >= slots * nodes:
        assert max(peers) <= here <= min(peers) + 1
