"""Limits of keys, by tables and properties; one node or many, with their clocks as arguments."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.limits import (
    BUCKET_SECONDS,
    BUCKETS,
    DAY_SECONDS,
    Bucket,
    Limits,
    Meter,
    Refusal,
    Tally,
    decode_tally,
)

NOON = 20_000 * DAY_SECONDS + 43_200.0
MINUTE = st.floats(0, 200, allow_nan=False)
STEPS = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 50)), max_size=60)


def admitted(meter: Meter, now: float, tokens: int = 0) -> bool:
    """One request that begins and ends at once."""
    if meter.take(now) is not None:
        return False
    meter.end(now, tokens)
    return True


def test_without_limits_everything_passes_and_is_counted() -> None:
    meter = Meter()
    assert all(admitted(meter, NOON, 5) for _ in range(1000))
    assert meter.used(NOON) == (1000, 1000, 5000, 5000, 0)
    assert meter.room(NOON) == (None, None)


@pytest.mark.parametrize(
    ("limits", "kind", "seconds"),
    [
        (Limits(requests_per_minute=2), "requests_per_minute", 65),
        (Limits(requests_per_day=2), "requests_per_day", 43_200),
        (Limits(tokens_per_minute=20), "tokens_per_minute", 65),
        (Limits(tokens_per_day=11), "tokens_per_day", 43_200),
        # Of several the one that stands longest.
        (Limits(1, 1, 1, 1, 5), "requests_per_day", 43_200),
    ],
)
def test_a_limit_that_is_reached_refuses_the_next(limits: Limits, kind: str, seconds: int) -> None:
    meter = Meter(limits)
    while admitted(meter, NOON, 10):
        pass
    used = meter.used(NOON)
    refusal = meter.refusal(NOON)
    assert refusal is not None
    assert (refusal.kind, refusal.seconds) == (kind, seconds)
    assert meter.used(NOON) == used, "what is refused isn't counted"
    assert not admitted(meter, NOON + seconds - 0.1)
    assert admitted(meter, NOON + seconds)


def test_so_many_at_once() -> None:
    meter = Meter(Limits(max_concurrent_requests=2))
    assert meter.take(NOON) is meter.take(NOON) is None
    assert meter.take(NOON) == Refusal("max_concurrent_requests", 2, None)
    meter.end(NOON, 0)
    assert meter.take(NOON + 1) is None


def test_what_is_under_way_overshoots_tokens_and_then_nothing_passes() -> None:
    meter = Meter(Limits(tokens_per_minute=10))
    assert meter.take(NOON) is meter.take(NOON) is None
    meter.end(NOON + 1, 1000)
    assert meter.take(NOON + 2) is not None
    meter.end(NOON + 50, 1000)
    assert meter.refusal(NOON + 66) is not None  # the second answer is younger
    assert meter.refusal(NOON + 50 + 65) is None


def test_what_is_left_is_told_of_the_tightest() -> None:
    meter = Meter(Limits(requests_per_minute=10, requests_per_day=5, tokens_per_minute=100))
    assert admitted(meter, NOON, 30)
    assert meter.room(NOON + 2) == ((5, 4, 43_198), (100, 70, 63))
    assert admitted(meter, NOON, 300)
    assert meter.room(NOON)[1] == (100, 0, 65)
    # Both are overshot, the day's by more: it is what clients have to wait for.
    meter = Meter(Limits(tokens_per_minute=100, tokens_per_day=50))
    assert admitted(meter, NOON, 300)
    assert meter.room(NOON)[1] == (50, 0, 43_200)


@given(STEPS, st.integers(1, 10))
def test_never_more_than_the_limit_in_any_minute(steps: list[tuple[float, int]], limit: int) -> None:
    meter, now, passed = Meter(Limits(requests_per_minute=limit)), NOON, list[float]()
    for pause, _ in steps:
        now += pause
        if admitted(meter, now):
            passed.append(now)
    for first, later in zip(passed, passed[limit:], strict=False):
        assert later - first >= 60


@given(STEPS, st.integers(1, 300), st.sampled_from(["requests_per_minute", "tokens_per_minute"]))
def test_who_waits_as_long_as_it_was_told_passes(
    steps: list[tuple[float, int]], limit: int, kind: str
) -> None:
    meter, now = Meter(Limits()._replace(**{kind: limit})), NOON
    for pause, tokens in steps:
        now += pause
        refusal = meter.refusal(now)
        if refusal is not None:
            assert refusal.seconds is not None
            assert 0 < refusal.seconds <= BUCKETS * BUCKET_SECONDS
            assert meter.refusal(now + refusal.seconds - 0.01) is not None
            now += math.ceil(refusal.seconds)
            assert meter.refusal(now) is None
        assert admitted(meter, now, tokens)


@given(
    st.lists(st.tuples(st.floats(0, 20), st.integers(0, 2), st.integers(0, 50)), max_size=60),
    st.integers(1, 20),
)
def test_nodes_that_tell_each_other_at_once_hold_the_limit_together(
    steps: list[tuple[float, int, int]], limit: int
) -> None:
    limits = Limits(requests_per_minute=limit, tokens_per_day=300)
    meters, now = [Meter(limits) for _ in range(3)], NOON
    passed = list[float]()
    spent = 0
    for pause, who, tokens in steps:
        now += pause
        if admitted(meters[who], now, tokens):
            assert spent < 300
            spent += tokens
            passed.append(now)
        told = decode_tally(msgspec.json.encode(meters[who].told(now)))
        assert told is not None
        for meter in meters:
            if meter is not meters[who]:
                meter.hear(f"node-{who}", told, now)
        assert len({meter.used(now) for meter in meters}) == 1
    for first, later in zip(passed, passed[limit:], strict=False):
        assert later - first >= 60


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(0, 50)), min_size=1, max_size=20), st.randoms())
def test_tellings_that_come_late_or_twice_do_no_harm(steps: list[tuple[float, int]], chance: object) -> None:
    """The sum is that of the newest telling, whatever else comes besides."""
    there, here, plain = Meter(), Meter(), Meter()
    now, tellings = NOON, list[Tally]()
    for pause, tokens in steps:
        now += pause
        admitted(there, now, tokens)
        tellings.append(there.told(now))
    chance.shuffle(tellings)  # type: ignore[attr-defined]
    for one in tellings:
        here.hear("there", one, now)
        here.hear("there", one, now)
    plain.hear("there", there.told(now), now)
    assert here.used(now)[:4] == plain.used(now)[:4] == there.used(now)[:4]


def test_a_node_that_is_gone_runs_nothing_and_has_used_what_it_used() -> None:
    there, here = Meter(), Meter(Limits(max_concurrent_requests=1))
    assert there.take(NOON) is None
    here.hear("there", there.told(NOON), NOON)
    assert here.take(NOON) == Refusal("max_concurrent_requests", 1, None)
    here.gone("there", NOON + 1)
    here.gone("somebody", NOON + 1)
    assert here.used(NOON + 1) == (1, 1, 0, 0, 0)
    assert here.used(NOON + 64) == (1, 1, 0, 0, 0)
    assert here.used(NOON + 65) == (0, 1, 0, 0, 0)
    assert here.used(NOON + 43_200) == (0, 0, 0, 0, 0)


def test_a_new_life_goes_on_from_the_old_one_but_runs_nothing() -> None:
    meter = Meter()
    for second in range(0, 100, 10):
        assert admitted(meter, NOON + second, 3)
    assert meter.take(NOON + 100) is None
    kept = meter.told(NOON + 100)
    for later, expected in (
        (101, (7, 11, 18, 30, 0)),
        (170, (0, 11, 0, 30, 0)),
        (43_201, (0, 0, 0, 0, 0)),
    ):
        again = Meter()
        again.resume(kept, NOON + later)
        assert again.changed
        assert again.used(NOON + later) == expected, later


def test_news_is_only_what_was_counted_since() -> None:
    meter = Meter()
    assert not meter.changed
    assert meter.take(NOON) is None
    assert meter.changed
    meter.told(NOON)
    meter.hear("x", Tally(running=1), NOON)
    meter.used(NOON + 100)
    assert not meter.changed
    meter.end(NOON, 0)
    assert meter.changed


def test_clocks_that_are_wrong() -> None:
    meter = Meter(Limits(requests_per_minute=100, requests_per_day=100))
    today, bucket = int(NOON) // DAY_SECONDS, int(NOON) // BUCKET_SECONDS
    # A little ahead counts now and until it is over; far ahead isn't believed.
    meter.hear("soon", Tally((Bucket(bucket + 5, 2, 0),), today + 1, 2, 0), NOON)
    meter.hear(
        "never", Tally((Bucket(bucket + 1000, 3, 0), Bucket(bucket - 100, 5, 0)), today + 5, 7, 0), NOON
    )
    assert meter.used(NOON)[:2] == (2, 0)
    assert meter.used(NOON + 100)[:2] == (0, 0)
    assert meter.used(NOON + DAY_SECONDS)[:2] == (0, 2)
    # Our own is set back: by a little nothing is lost, by an hour the minute begins anew, by a month the day.
    meter = Meter(Limits(requests_per_minute=100))
    assert admitted(meter, NOON)
    assert admitted(meter, NOON - 20)
    assert meter.used(NOON - 20)[:2] == (2, 2)
    assert meter.used(NOON - 3600)[:2] == (0, 2)
    assert admitted(meter, NOON - 3600)
    assert meter.used(NOON - 3600)[:2] == (1, 3)
    assert meter.used(NOON - 30 * DAY_SECONDS)[:2] == (0, 0)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"nonsense",
        b'{"running": -1}',
        b'{"running": 1e400}',
        b'{"day_tokens": 9007199254740993}',
        b'{"minute": [[1, -2, 3]]}',
        b'{"minute": [["1", 2, 3]]}',
        b'{"minute": [' + b"[1,1,1]," * 64 + b"[1,1,1]]}",
    ],
)
def test_nonsense_of_a_peer_is_nothing(data: bytes) -> None:
    assert decode_tally(data) is None


def test_members_of_later_versions_are_ignored() -> None:
    assert decode_tally(b'{"running": 2, "hour": [1], "minute": [[7, 1, 2, 3]]}') == Tally(
        (Bucket(7, 1, 2),), running=2
    )


@given(st.lists(st.tuples(MINUTE, st.integers(0, 3), st.binary(max_size=3)), max_size=40))
def test_what_was_heard_adds_up_whatever_the_order(steps: list[tuple[float, int, bytes]]) -> None:
    """The running sum equals one made anew from all tallies."""
    meter, now = Meter(), NOON
    for ahead, who, noise in steps:
        now += len(noise) * 7
        bucket = int(now + ahead - 100) // BUCKET_SECONDS
        tally = Tally((Bucket(bucket, who + 1, 2),), int(now) // DAY_SECONDS, who, 1, who)
        meter.hear(f"node-{who}", tally, now)
        fresh = Meter()
        for node, heard in meter._heard.items():
            fresh.hear(node, heard, now)
        assert meter.used(now) == fresh.used(now)
