"""What a request is expected to cost on a node: each term by itself, and what holds for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.cost import (
    DEFAULT_DECODE_MS_PER_TOKEN,
    DEFAULT_LOAD_MS,
    DEFAULT_OUTPUT_TOKENS,
    DEFAULT_PREFILL_MS_PER_TOKEN,
    DEFAULT_SHARING,
    Features,
    Outlook,
    Terms,
    Typical,
    expected,
    impossible,
    loading_left,
    typical,
)

PARTS = ("link", "wake", "download", "room", "start", "queue", "prefill", "decode")


def outlook(**more: Any) -> Outlook:
    """Two ready slots whose requests take a second, alone or not."""
    values: dict[str, Any] = {
        "node": "b", "ready_slots": 2, "slots_per_instance": 2, "service_ms": 1000.0, "sharing": 0.0,
    }  # fmt: skip
    return Outlook(**{**values, **more})


def cold(**more: Any) -> Outlook:
    return outlook(ready_slots=0, load_ms=3000.0, **more)


def parts(terms: Terms) -> dict[str, float]:
    """Those that aren't 0."""
    return {part: value for part in PARTS if (value := getattr(terms, part))}


NONE = Features()


@pytest.mark.parametrize(
    ("where", "expectation"),
    [
        # A free slot.
        (outlook(), {"decode": 1000}),
        (outlook(link_ms=3.0), {"link": 3, "decode": 1000}),
        (outlook(busy=1), {"decode": 1000}),
        # A line: the round in which it is our turn, on average over the places of a round.
        (outlook(busy=2), {"queue": 750, "decode": 1000}),
        (outlook(busy=2, queued=1), {"queue": 1250, "decode": 1000}),
        (outlook(busy=2, queued=2), {"queue": 1750, "decode": 1000}),
        (outlook(busy=1, sent=1), {"queue": 750, "decode": 1000}),
        (outlook(ready_slots=1, slots_per_instance=1, busy=1), {"queue": 1000, "decode": 1000}),
        (outlook(ready_slots=1, slots_per_instance=1, busy=1, queued=3), {"queue": 4000, "decode": 1000}),
        # More was taken back than was there: news and counting can disagree for a moment.
        (outlook(busy=1, sent=-3), {"decode": 1000}),
        # Nothing is ready.
        (cold(), {"start": 3000, "decode": 1000}),
        (
            cold(wake_ms=9000.0, download_ms=50_000.0, room_ms=100.0),
            {"wake": 9000, "download": 50_000, "room": 100, "start": 3000, "decode": 1000},
        ),
        (cold(queued=1), {"start": 3000, "decode": 1000}),
        (cold(queued=2), {"start": 3000, "queue": 1000, "decode": 1000}),
        (cold(queued=3, sent=2), {"start": 3000, "queue": 2000, "decode": 1000}),
        # Something loads already: what is left counts, and nothing is started beside it.
        (cold(loading_left_ms=200.0, loading_slots=2, room_ms=100.0), {"start": 200, "decode": 1000}),
        (cold(loading_left_ms=0.0, loading_slots=2), {"decode": 1000}),
        (
            cold(loading_left_ms=200.0, loading_slots=1, queued=2),
            {"start": 200, "queue": 2000, "decode": 1000},
        ),
        (cold(loading_left_ms=200.0, queued=2), {"start": 200, "queue": 1000, "decode": 1000}),
        # Busy, and another instance would be ready before a slot gets free, or not.
        (outlook(busy=2, load_ms=500.0), {"start": 500, "decode": 1000}),
        (outlook(busy=2, load_ms=500.0, room_ms=300.0), {"queue": 750, "decode": 1000}),
        (outlook(busy=2, loading_left_ms=100.0, loading_slots=2), {"start": 100, "decode": 1000}),
        # Ten wait; after a second two of them are served, two more begin, and six are left for 4 slots.
        (
            outlook(busy=2, queued=9, load_ms=1000.0),
            {"start": 1000, "queue": (10 - 2 - 2) * 250, "decode": 1000},
        ),
        # It failed to start: what is ready or loads still counts.
        (outlook(failing=True), {"decode": 1000}),
        (outlook(busy=2, load_ms=500.0, failing=True), {"queue": 750, "decode": 1000}),
        (cold(loading_left_ms=200.0, failing=True), {"start": 200, "decode": 1000}),
    ],
)
def test_the_wait(where: Outlook, expectation: dict[str, float]) -> None:
    terms = expected(where, NONE)
    assert parts(terms) == pytest.approx(expectation)
    assert terms.total == pytest.approx(sum(expectation.values()))
    work = sum(expectation.get(part, 0) for part in ("link", "prefill", "decode"))
    assert terms.wait == pytest.approx(terms.total - work)
    assert terms.why_not == ""


@pytest.mark.parametrize(
    ("where", "why_not"),
    [
        (outlook(ready_slots=0), "it can't start there"),
        (cold(failing=True), "it failed to start there a moment ago"),
    ],
)
def test_who_can_t_serve(where: Outlook, why_not: str) -> None:
    terms = expected(where, NONE)
    assert terms == impossible("b", why_not)
    assert terms.total == terms.wait == math.inf
    assert terms.text() == f"b: no, {why_not}"


LEARNED: dict[str, Any] = {"prefill_ms_per_token": 0.5, "decode_ms_per_token": 20.0}
CHAT = Features(prompt_tokens=400, output_tokens=100)


@pytest.mark.parametrize(
    ("where", "features", "prefill", "decode"),
    [
        (outlook(**LEARNED), CHAT, 200, 2000),
        # What is in the cache isn't read again; a node that isn't mentioned has nothing.
        (outlook(**LEARNED), Features(prompt_tokens=400, cached={"b": 300}), 50, 950),
        (outlook(**LEARNED), Features(prompt_tokens=400, cached={"c": 300}), 200, 800),
        (outlook(**LEARNED), Features(prompt_tokens=400, cached={"b": 999}), 0, 1000),
        # How much it will write isn't known: as much as usual there.
        (outlook(**LEARNED), Features(prompt_tokens=400), 200, 800),
        (outlook(**LEARNED), Features(prompt_tokens=9000), 4500, 0),
        # Speeds aren't known: the mean request there.
        (outlook(), CHAT, 0, 1000),
        # Nothing is known at all.
        (
            outlook(service_ms=0.0),
            CHAT,
            400 * DEFAULT_PREFILL_MS_PER_TOKEN,
            100 * DEFAULT_DECODE_MS_PER_TOKEN,
        ),
        (outlook(service_ms=0.0), NONE, 0, DEFAULT_OUTPUT_TOKENS * DEFAULT_DECODE_MS_PER_TOKEN),
        (outlook(service_ms=0.0, decode_ms_per_token=10.0), NONE, 0, DEFAULT_OUTPUT_TOKENS * 10),
    ],
)
def test_the_work(where: Outlook, features: Features, prefill: float, decode: float) -> None:
    terms = expected(where, features)
    assert (terms.prefill, terms.decode) == (pytest.approx(prefill), pytest.approx(decode))


@pytest.mark.parametrize(
    ("where", "factor"),
    [
        ({"busy": 0}, 1.0),
        ({"busy": 1}, 1.1),
        ({"busy": 2}, 1.2),
        # Two instances: requests go to the less busy one.
        ({"ready_slots": 8, "busy": 4}, 1.2),
        # Never more than the other slots of one instance.
        ({"busy": 4}, 1.3),
        ({"busy": 9}, 1.3),
        ({"busy": 2, "sharing": -1.0}, 1 + 2 * DEFAULT_SHARING),
        ({"busy": 3, "slots_per_instance": 1}, 1.0),
        ({"ready_slots": 0, "load_ms": 100.0, "queued": 2}, 1.2),
        ({"ready_slots": 0, "load_ms": 100.0, "queued": 11}, 1.3),
    ],
)
def test_neighbours_slow_decode_down(where: dict[str, Any], factor: float) -> None:
    node = outlook(**{"ready_slots": 4, "slots_per_instance": 4, "sharing": 0.1, **LEARNED, **where})
    assert expected(node, CHAT).decode == pytest.approx(2000 * factor)


def test_a_mean_request_contains_its_neighbours_already() -> None:
    assert expected(outlook(busy=1, sharing=0.5), NONE).decode == 1000


def test_what_a_node_doesn_t_know_is_taken_from_the_others() -> None:
    knows = outlook(load_ms=4000.0, **LEARNED)
    knows_less = outlook(node="c", service_ms=3000.0)
    others = typical([knows, knows_less, Outlook(node="d")])
    assert others == Typical(2000.0, 0.5, 20.0, 4000.0, 1000.0, 0.5, 20.0)
    terms = expected(Outlook(node="d", load_ms=0.0), CHAT, others)
    assert parts(terms) == {"start": 4000, "prefill": 200, "decode": 2000}
    assert typical([]) == Typical()


def test_a_load_that_nobody_has_seen() -> None:
    assert expected(cold(), NONE).start == 3000
    assert expected(outlook(ready_slots=0, load_ms=0.0), NONE).start == DEFAULT_LOAD_MS


@pytest.mark.parametrize(
    ("load_ms", "elapsed", "left"),
    [(1000, 0, 1000), (1000, 600, 400), (1000, 1000, 250), (1000, 4000, 1000), (0, 0, DEFAULT_LOAD_MS)],
)
def test_what_is_left_of_a_load(load_ms: float, elapsed: float, left: float) -> None:
    assert loading_left(load_ms, elapsed) == left


@pytest.mark.parametrize(
    ("terms", "text"),
    [
        (Terms("b", 41.0, 1.04, queue=30.0, prefill=9.96), "b: 41 ms = link 1 + queue 30 + prefill 10"),
        (Terms("", 0.14, 0.14), "here: 0.1 ms = link 0.1"),
        (Terms("", 0.0), "here: 0 ms = 0"),
        (Terms("b", 12345.6, decode=12345.6), "b: 12346 ms = decode 12346"),
    ],
)
def test_in_one_line(terms: Terms, text: str) -> None:
    assert terms.text() == text


time = st.floats(0, 1e6)
few = st.integers(0, 50)
outlooks = st.builds(
    Outlook,
    node=st.just("b"),
    link_ms=time,
    ready_slots=few,
    busy=few,
    queued=few,
    sent=st.integers(-50, 50),
    loading_left_ms=st.none() | time,
    loading_slots=few,
    load_ms=st.none() | time,
    room_ms=time,
    download_ms=time,
    wake_ms=time,
    slots_per_instance=few,
    service_ms=time,
    prefill_ms_per_token=st.floats(0, 100),
    decode_ms_per_token=st.floats(0, 1000),
    sharing=st.floats(-1, 1),
    failing=st.booleans(),
)
requests = st.builds(
    Features,
    prompt_tokens=st.integers(0, 200_000),
    output_tokens=st.integers(0, 10_000),
    cached=st.dictionaries(st.sampled_from(["", "b"]), st.integers(0, 200_000)),
)


@given(outlooks, requests)
def test_a_total_is_the_sum_of_its_parts_and_none_is_negative(where: Outlook, features: Features) -> None:
    terms = expected(where, features)
    if terms.why_not:
        assert terms.total == math.inf
        assert not where.ready_slots
        return
    values = [getattr(terms, part) for part in PARTS]
    assert all(0 <= value < math.inf for value in values)
    assert terms.total == pytest.approx(sum(values))
    assert terms.text()


@given(outlooks, requests)
def test_one_more_ahead_never_makes_it_cheaper(where: Outlook, features: Features) -> None:
    fields = {name: getattr(where, name) for name in Outlook.__struct_fields__}
    before = expected(where, features).total
    for field in ("busy", "queued", "sent"):
        after = expected(Outlook(**{**fields, field: fields[field] + 1}), features).total
        assert after >= before or after == pytest.approx(before)


@given(outlooks, requests)
def test_a_free_slot_means_no_wait_but_waking(where: Outlook, features: Features) -> None:
    if where.busy + where.queued + where.sent < where.ready_slots:
        assert expected(where, features).wait == where.wake_ms
