"""Which node serves a request: the rules one by one, and what holds whatever the outlooks are."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.cost import Features, Outlook, Terms
from llamesh.core.routing import Choice, max_wait_ms, route
from tests.core.test_cost import outlooks, requests

NONE = Features()


def node(name: str = "", **more: Any) -> Outlook:
    """Two free slots whose requests take 100 ms; a peer is a millisecond away."""
    values: dict[str, Any] = {
        "node": name, "link_ms": 1.0 if name else 0.0, "ready_slots": 2, "slots_per_instance": 2,
        "service_ms": 100.0,
    }  # fmt: skip
    return Outlook(**{**values, **more})


FULL: dict[str, Any] = {"busy": 2}
COLD: dict[str, Any] = {"ready_slots": 0, "load_ms": 3000.0}
UNABLE: dict[str, Any] = {"ready_slots": 0}


@pytest.mark.parametrize(
    ("here", "peers", "chosen"),
    [
        (node(), [], ""),
        (node(), [node("b")], ""),
        # A near-tie stays here: 5 ms, or a twentieth of the work.
        (node(service_ms=104.0), [node("b")], ""),
        (node(service_ms=112.0), [node("b")], "b"),
        (node(service_ms=1040.0), [node("b", service_ms=1000.0)], ""),
        (node(service_ms=1060.0), [node("b", service_ms=1000.0)], "b"),
        # A wait adds no tolerance.
        (node(busy=60), [node("b", busy=59)], "b"),
        # Full here, cold here, unable here, not here.
        (node(**FULL), [node("b")], "b"),
        (node(**COLD), [node("b")], "b"),
        (node(**COLD), [node("b", **FULL)], "b"),
        (node(**COLD), [node("b", busy=60, queued=60)], ""),
        (node(**COLD), [node("b", **COLD)], ""),
        (node(**UNABLE), [node("b", **COLD, wake_ms=20_000.0)], "b"),
        (None, [node("b", **COLD)], "b"),
        # The best of several.
        (None, [node("b", **FULL), node("c"), node("d", busy=4)], "c"),
        (None, [node("b", link_ms=90.0), node("c", link_ms=20.0)], "c"),
        (None, [node("b", sent=2), node("c")], "c"),
        # A sleeping machine, once everything else is worse.
        (None, [node("b", wake_ms=20_000.0, **COLD), node("c", **COLD)], "c"),
        (None, [node("b", wake_ms=20_000.0, **COLD), node("c", busy=900)], "b"),
        # Nobody.
        (None, [], None),
        (node(**UNABLE), [node("b", **UNABLE)], None),
        (node(failing=True, **COLD), [], None),
    ],
)
def test_the_lowest_total_wins(here: Outlook | None, peers: list[Outlook], chosen: str | None) -> None:
    choice = route(here, peers, NONE)
    assert choice.node == chosen
    assert choice.none is (chosen is None)
    order = [one.node for one in ([] if here is None else [here]) + peers]
    assert [terms.node for terms in choice.considered] == order


def test_tolerances_are_the_caller_s() -> None:
    here, peers = node(service_ms=150.0), [node("b")]
    assert route(here, peers, NONE, tie_ms=60.0).node == ""
    assert route(here, peers, NONE, tie_share=0.6).node == ""
    assert route(node(service_ms=104.0), peers, NONE, tie_ms=0.0, tie_share=0.0).node == "b"


def test_cached_tokens_draw_a_follow_up_until_waiting_costs_more() -> None:
    learned: dict[str, Any] = {"prefill_ms_per_token": 0.5, "decode_ms_per_token": 2.0}
    features = Features(prompt_tokens=4000, output_tokens=50, cached={"b": 3900})
    assert route(node(**learned), [node("b", **learned)], features).node == "b"
    assert route(node(**learned), [node("b", busy=1, **learned)], features).node == "b"
    assert route(node(**learned), [node("b", busy=60, **learned)], features).node == ""


class TestExcluded:
    def test_a_peer(self) -> None:
        choice = route(None, [node("b"), node("c", **FULL)], NONE, excluded={"b"})
        assert choice.node == "c"
        assert choice.reasons() == "b: it was excluded"

    def test_with_a_reason(self) -> None:
        choice = route(None, [node("b")], NONE, excluded={"b": "it was tried already"})
        assert choice == Choice(None, None, (Terms("b", math.inf, why_not="it was tried already"),))
        assert choice.reasons() == "b: it was tried already"

    def test_this_node(self) -> None:
        assert route(node(), [node("b", **FULL)], NONE, excluded=("",)).node == "b"
        assert route(node(), [], NONE, excluded=("",)).none


class TestContext:
    LONG = Features(prompt_tokens=5000)

    def test_a_peer_whose_context_is_too_short_is_out(self) -> None:
        choice = route(None, [node("b", n_ctx=4096), node("c", n_ctx=8192, **FULL)], self.LONG)
        assert choice.node == "c"
        assert choice.reasons() == "b: its context of 4096 tokens is below the prompt's 5000 or so"

    def test_an_unknown_one_is_taken_for_long_enough(self) -> None:
        assert route(None, [node("b", n_ctx=0)], self.LONG).node == "b"

    def test_a_peer_is_better_than_a_context_here_that_is_too_short(self) -> None:
        assert route(node(n_ctx=4096), [node("b", n_ctx=8192, **COLD)], self.LONG).node == "b"

    def test_too_long_for_everybody_is_told_by_the_engine_here(self) -> None:
        choice = route(node(n_ctx=4096), [node("b", n_ctx=4096)], self.LONG)
        assert choice.node == ""
        assert choice.terms is choice.considered[0]
        assert route(node(n_ctx=4096, **UNABLE), [node("b", n_ctx=4096)], self.LONG).none
        assert route(node(n_ctx=4096), [], self.LONG, excluded=("",)).none

    def test_too_long_for_all_peers(self) -> None:
        assert route(None, [node("b", n_ctx=4096)], self.LONG).none


class TestEqualPeers:
    def test_the_one_with_the_fewest_of_our_forwards(self) -> None:
        peers = [node("b", sent=1), node("c", busy=1), node("d", sent=1)]
        assert route(None, peers, NONE).node == "c"

    def test_else_they_take_turns(self) -> None:
        peers = [node(name) for name in ("b", "c", "d")]
        chosen = Counter(route(None, peers, Features(number=number)).node for number in range(900))
        assert set(chosen) == {"b", "c", "d"}
        assert min(chosen.values()) > 200

    def test_the_same_question_has_the_same_answer(self) -> None:
        """In each process and in any order: str's own hash wouldn't do."""
        peers = [node(name) for name in ("b", "c", "d")]
        answers = [route(None, peers, Features(number=number)).node for number in range(12)]
        assert answers == [route(None, peers[::-1], Features(number=number)).node for number in range(12)]
        assert "".join(answer or "" for answer in answers) == "dccbddbdbdcd"

    def test_a_peer_that_is_clearly_cheaper_is_taken_in_spite_of_our_forwards(self) -> None:
        assert route(None, [node("b", service_ms=80.0, sent=1), node("c")], NONE).node == "b"


class TestNewNodes:
    def test_who_knows_nothing_yet_is_taken_for_average(self) -> None:
        learned: dict[str, Any] = {
            "service_ms": 5000.0,
            "prefill_ms_per_token": 1.0,
            "decode_ms_per_token": 50.0,
        }
        features = Features(prompt_tokens=100, output_tokens=100)
        fresh = node("c", service_ms=0.0)
        assert route(node(**learned), [fresh], features).node == ""
        assert route(node(**learned, busy=2), [fresh], features).node == "c"
        terms = route(None, [node("b", **learned), fresh], features).considered
        assert [one.total for one in terms] == [pytest.approx(5101)] * 2


class TestMaxWait:
    def test_nobody_else(self) -> None:
        assert max_wait_ms(route(node(), [], NONE)) is None
        assert max_wait_ms(route(None, [node("b"), node("c", **UNABLE)], NONE)) is None
        assert max_wait_ms(route(None, [], NONE)) is None

    def test_until_the_second_best_would_have_been_better(self) -> None:
        # b: 1 + 100; here: 3000 + 100. With half as much again for what isn't known.
        assert max_wait_ms(route(node(**COLD), [node("b")], NONE)) == 3100 * 1.5 - 101

    def test_this_node_s_limit_is_the_best_peer(self) -> None:
        assert max_wait_ms(route(node(), [node("b", service_ms=1000.0)], NONE)) == 1402

    def test_not_for_a_trifle(self) -> None:
        assert max_wait_ms(route(None, [node("b"), node("c")], NONE)) == 100

    def test_more_than_what_is_expected(self) -> None:
        """Here a little worse than the peer, where one has to wait."""
        choice = route(node(**COLD), [node("b", **COLD), node("c", **COLD)], NONE, tie_ms=0, tie_share=0)
        assert choice.terms is not None
        wait = max_wait_ms(choice)
        assert wait is not None
        assert wait > choice.terms.wait == 3000


def test_in_one_line() -> None:
    choice = route(node(**COLD), [node("b"), node("c", **UNABLE)], NONE)
    assert choice.text() == (
        "b | b: 101 ms = link 1 + decode 100 | here: 3100 ms = start 3000 + decode 100 | "
        "c: no, it can't start there"
    )
    assert route(node(), [], NONE).text() == "here | here: 100 ms = decode 100"
    assert route(None, [], NONE).text() == "nobody"


@given(
    st.none() | outlooks,
    st.lists(outlooks, max_size=4),
    requests,
    st.sets(st.sampled_from(["", "n0", "n1", "n2"])),
    st.integers(0, 1000),
)
def test_the_chosen_one_is_possible_and_nearly_the_best(
    here: Outlook | None, peers: list[Outlook], features: Features, excluded: set[str], number: int
) -> None:
    def named(one: Outlook, name: str) -> Outlook:
        values = {field: getattr(one, field) for field in Outlook.__struct_fields__}
        return Outlook(**{**values, "node": name})

    here = None if here is None else named(here, "")
    peers = [named(one, f"n{place}") for place, one in enumerate(peers)]
    features = Features(
        prompt_tokens=features.prompt_tokens, output_tokens=features.output_tokens, number=number
    )
    choice = route(here, peers, features, excluded=excluded)
    assert choice == route(here, peers, features, excluded=excluded)
    possible = [terms for terms in choice.considered if not terms.why_not]
    if choice.none:
        assert not possible
        assert choice.terms is None
        assert max_wait_ms(choice) is None
        return
    assert choice.node not in excluded
    assert choice.terms in possible
    assert choice.terms is not None
    assert choice.terms.node == choice.node
    best = min(terms.total for terms in possible)
    assert choice.terms.total <= best * 1.05 + 5.0
    assert max_wait_ms(choice) is None or len(possible) > 1
    assert choice.text()
