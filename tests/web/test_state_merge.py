"""The parts of several nodes as one document."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from llamesh.core.offers import Offer
from llamesh.web.history import sum_up
from llamesh.web.state_merge import Other, joined, merge
from llamesh.web.state_schema import (
    MOST_EVENTS,
    Candidate,
    Cell,
    Concern,
    Event,
    Instance,
    Node,
    Part,
    Profile,
    Request,
)

HISTORY = sum_up([], 0.0)


def part(node: str, **members: Any) -> Part:
    empty: dict[str, Any] = {name: [] for name in ("models", "instances", "requests", "attention", "events")}
    return Part(node=Node(id=node, self=True, fresh=True, ready=True), **(empty | members))


def profile(key: str, state: Any = "fits", context: int | None = None) -> Profile:
    return Profile(key, key.removesuffix(":default"), "text", "", context, Cell(state))


def request(node: str, seen_by: str, **members: Any) -> Request:
    known: dict[str, Any] = {"id": "r", "path": "/v1/chat/completions", "phase": "prefill", "started": 1.0}
    return Request(node=node, seen_by=seen_by, **(known | members))


def other(
    node: str, told: Part | None, *, fresh: bool = True, offers: tuple[Offer, ...] = (), **entry: Any
) -> Other:
    known = {"status": "alive", "ready": True, "link": {"direct": True, "can_dial": True}}
    return Other(node, known | entry, offers, told, fresh)


def test_one_node_alone() -> None:
    document = merge(part("a", models=[profile("m:default")]), [], HISTORY, 5.0)
    assert (document.schema, document.node_id, document.time) == (1, "a", 5.0)
    assert [node.self for node in document.nodes] == [True]
    assert document.models[0].nodes == {"a": Cell("fits")}


def test_a_model_of_two_nodes_is_one_line_whatever_its_case() -> None:
    theirs = part("b", models=[profile("M:default", "loaded", 4096), profile("only:default")])
    document = merge(part("a", models=[profile("m:default")]), [other("b", theirs)], HISTORY, 0.0)
    assert [model.key for model in document.models] == ["m:default", "only:default"]
    assert {node: cell.state for node, cell in document.models[0].nodes.items()} == {
        "a": "fits",
        "b": "loaded",
    }
    assert document.models[0].context_length == 4096


def test_a_peer_does_not_speak_in_anothers_name() -> None:
    instance = Instance(
        node="a", id="m:default#1", model="m:default", state="ready", slots=1, busy=0, started=0, age=0
    )
    liar = part(
        "a",
        instances=[instance],
        events=[Event(1, 1.0, "info", "a", "e", "t")],
        attention=[Concern("error", "x", "a", "t", 1.0, "")],
        requests=[request("c", "a")],
    )
    document = merge(part("me"), [other("b", liar)], HISTORY, 0.0)
    assert [node.id for node in document.nodes] == ["me", "b"]
    assert [node.self for node in document.nodes] == [True, False]
    assert document.instances[0].node == "b"
    assert document.events[0].node == "b"
    assert document.attention[0].node == "b"
    assert document.requests[0].seen_by == "b"


def test_of_a_node_that_said_nothing_gossip_is_shown() -> None:
    offers = (Offer(model="m", status="loaded", tps=7.0), Offer(model="n", runs=False), Offer(model="o"))
    silent = other(
        "b", None, fresh=False, offers=offers, sysmem_total_mb=1000, total_queue_length=2, version="9"
    )
    document = merge(part("a"), [silent], HISTORY, 0.0)
    node = document.nodes[1]
    assert (node.fresh, node.memory.ram.total, node.memory.vram.total, node.queue) == (False, 1000, None, 2)
    assert node.version == "9"
    assert {model.name: model.nodes["b"].state for model in document.models} == {
        "m": "loaded",
        "n": "never",
        "o": "unknown",
    }


def test_a_machine_that_sleeps_has_no_instances_any_more() -> None:
    told = part("b", requests=[request("b", "b")], events=[Event(1, 1.0, "info", "b", "e", "t")])
    document = merge(part("a"), [other("b", told, status="asleep", ready=False)], HISTORY, 0.0)
    assert document.requests == []
    assert len(document.events) == 1
    assert document.nodes[1].status == "asleep"


def test_a_forwarded_request_is_one_line_with_what_each_node_knows() -> None:
    choice = Candidate("b", 1.0, {"link": 1.0})
    entry = request("a", "a", phase="forwarded", served_by="b", via=["a", "b"], decision=[choice], ms=9.0)
    far = request(
        "a", "b", phase="decode", served_by="b", via=["a", "b", "c"], instance="m#1", tokens=5, tries=["t"]
    )
    document = merge(part("a", requests=[entry]), [other("b", part("b", requests=[far]))], HISTORY, 0.0)
    [one] = document.requests
    assert (one.node, one.seen_by, one.phase, one.instance, one.tokens) == ("a", "a", "decode", "m#1", 5)
    assert (one.via, one.decision, one.tries, one.ms) == (["a", "b", "c"], [choice], ["t"], 9.0)


def test_the_node_that_serves_knows_more_than_the_entry_however_short_the_way() -> None:
    entry = request("a", "a", phase="decode", served_by="b", via=["a", "b"], tokens=2)
    far = request("a", "b", phase="decode", via=["a", "b"], instance="m#1", tokens=5)
    for records in ([entry, far], [far, entry]):
        one = joined(records)
        assert (one.seen_by, one.instance, one.tokens, one.via) == ("a", "m#1", 5, ["a", "b"])


def test_equal_ids_of_two_entry_nodes_are_two_requests() -> None:
    theirs = other("b", part("b", requests=[request("b", "b", started=0.5)]))
    document = merge(part("a", requests=[request("a", "a")]), [theirs], HISTORY, 0.0)
    assert [one.node for one in document.requests] == ["b", "a"]


def test_a_request_whose_entry_is_silent_is_shown_all_the_same() -> None:
    lonely = request("gone", "b", via=["gone", "b"])
    assert joined([lonely]) == lonely


@pytest.mark.parametrize("phase", ["queued", "decode"])
def test_what_did_not_leave_yet_is_where_it_is(phase: Any) -> None:
    entry, old = request("a", "a", phase=phase, via=["a"]), request("a", "b", phase="done", via=["a", "b"])
    assert joined([entry, old]).phase == phase


def test_what_all_see_is_said_once_and_the_worst_comes_first() -> None:
    def concern(level: Any, what: str, text: str, since: float = 1.0) -> Concern:
        return Concern(level, what, "x", text, since, "")

    own = part("a", attention=[concern("warning", "w", "w"), concern("error", "peer_lost", "c is lost")])
    theirs = part(
        "b",
        attention=[
            concern("error", "peer_lost", "c is lost"),
            concern("warning", "version_skew", "a is old"),
            concern("error", "config", "a mistake", since=0.5),
        ],
    )
    document = merge(own, [other("b", theirs)], HISTORY, 0.0)
    assert [one.what for one in document.attention] == ["config", "peer_lost", "w"]


def test_events_come_by_time_and_are_limited() -> None:
    def events(node: str, offset: float) -> list[Event]:
        return [Event(n, n + offset, "info", node, "e", "t") for n in range(MOST_EVENTS)]

    document = merge(
        part("a", events=events("a", 0.0)), [other("b", part("b", events=events("b", 0.5)))], HISTORY, 0.0
    )
    assert len(document.events) == MOST_EVENTS
    assert [one.time for one in document.events] == sorted(one.time for one in document.events)
    assert document.events[-1].node == "b"


def test_values_are_not_changed_by_being_merged() -> None:
    model = profile("m:default")
    own = part("a", models=[model])
    before = replace(own)
    merge(own, [other("b", part("b", models=[profile("m:default", context=1)]))], HISTORY, 0.0)
    assert own == before
