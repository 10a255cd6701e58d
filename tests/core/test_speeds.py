"""What is learned from requests: means that follow, a line through neighbours, news that seldom change."""

from __future__ import annotations

import math
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.cost import DEFAULT_SHARING
from llamesh.core.speeds import Speeds, Told, note, steady, told


def learned(*requests: dict[str, Any]) -> Speeds:
    speeds = Speeds()
    for request in requests:
        speeds = note(speeds, **{"service_ms": 1000.0, **request})
    return speeds


class TestMeans:
    def test_nothing_is_known_at_first(self) -> None:
        speeds = Speeds()
        known = (speeds.service_ms, speeds.prefill_ms, speeds.decode_ms, speeds.output_tokens)
        assert known == (0, 0, 0, 0)
        assert speeds.tokens_per_second == 0
        assert speeds.sharing == DEFAULT_SHARING

    def test_the_first_requests_count_alike(self) -> None:
        assert learned({"service_ms": 100.0}).service_ms == 100
        assert learned({"service_ms": 100.0}, {"service_ms": 300.0}).service_ms == 200
        assert learned(*({"service_ms": float(n)} for n in range(1, 20))).service_ms == pytest.approx(10)

    def test_later_they_follow_what_is_new(self) -> None:
        speeds = learned(*[{"service_ms": 1000.0}] * 1000)
        for _ in range(60):
            speeds = note(speeds, service_ms=100.0)
        assert 100 < speeds.service_ms < 150
        assert speeds.requests == 1060

    def test_a_short_prompt_hardly_counts(self) -> None:
        """It takes 20 ms, however short it is; long ones take half a millisecond per token."""
        long = {"prefill_tokens": 4000, "prefill_ms": 2000.0}
        short = {"prefill_tokens": 3, "prefill_ms": 20.0}
        assert learned(long, short, short, short).prefill_ms == pytest.approx(0.5, rel=0.05)

    def test_an_answer(self) -> None:
        speeds = learned(
            {"decode_tokens": 100, "decode_ms": 2000.0}, {"decode_tokens": 300, "decode_ms": 9000.0}
        )
        assert speeds.output_tokens == 200
        assert speeds.decode_ms == 25
        assert speeds.tokens_per_second == 40

    @pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
    def test_what_can_t_be_is_left_out(self, nonsense: float) -> None:
        speeds = learned({"prefill_tokens": 10, "prefill_ms": 5.0, "decode_tokens": 10, "decode_ms": 50.0})
        for more in (
            {"service_ms": nonsense},
            {"service_ms": nonsense, "prefill_tokens": 5, "prefill_ms": nonsense},
            {"service_ms": nonsense, "decode_tokens": 5, "decode_ms": nonsense},
            {"service_ms": nonsense, "prefill_tokens": 0, "prefill_ms": 5.0},
            {"service_ms": nonsense, "decode_tokens": -1, "decode_ms": 5.0},
            {"service_ms": nonsense, "decode_tokens": 1, "decode_ms": 5.0, "neighbours": -1.0},
            {"service_ms": nonsense, "decode_tokens": 1, "decode_ms": 5.0, "neighbours": math.nan},
        ):
            assert note(speeds, **more) is speeds  # type: ignore[arg-type]

    def test_the_old_value_stays_as_it_is(self) -> None:
        speeds = Speeds()
        note(speeds, service_ms=5.0)
        assert speeds == Speeds()

    def test_it_survives_being_stored(self) -> None:
        speeds = learned({"decode_tokens": 7, "decode_ms": 3.0, "neighbours": 2.0})
        assert msgspec.json.decode(msgspec.json.encode(speeds), type=Speeds) == speeds
        assert msgspec.json.decode(b"{}", type=Speeds) == Speeds()
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(b'{"x": -5.0}', type=Speeds)


def decoding(each_ms: float, neighbours: float) -> dict[str, Any]:
    return {"decode_tokens": 100, "decode_ms": 100 * each_ms, "neighbours": neighbours}


class TestSharing:
    def test_the_line_is_found(self) -> None:
        chance = random.Random(1)
        requests = []
        for _ in range(200):
            neighbours = chance.randrange(4)
            requests.append(decoding(20 * (1 + 0.3 * neighbours) * chance.uniform(0.95, 1.05), neighbours))
        speeds = learned(*requests)
        assert speeds.decode_ms == pytest.approx(20, rel=0.1)
        assert speeds.sharing == pytest.approx(0.3, abs=0.08)

    def test_without_variety_the_usual_share_is_assumed(self) -> None:
        alone = learned(*[decoding(20, 0)] * 30)
        assert (alone.decode_ms, alone.sharing) == (pytest.approx(20), DEFAULT_SHARING)
        full = learned(*[decoding(32, 3)] * 30)
        assert full.decode_ms == pytest.approx(32 / (1 + 3 * DEFAULT_SHARING))

    def test_neighbours_never_help(self) -> None:
        """Measured so by chance; the mean is what is left."""
        speeds = learned(*[decoding(30, 0), decoding(20, 3)] * 10)
        assert speeds.sharing == 0
        assert speeds.decode_ms == pytest.approx(25, rel=0.05)

    def test_it_never_costs_more_than_working_in_turns(self) -> None:
        speeds = learned(*[decoding(1, 0), decoding(100, 1)] * 10)
        assert speeds.sharing == 1
        assert speeds.decode_ms > 0


moderate = st.floats(0.01, 1e7)


@given(st.lists(st.tuples(moderate, st.integers(1, 100_000), moderate, st.floats(0, 64)), max_size=40))
def test_values_stay_within_what_was_seen(requests: list[tuple[float, int, float, float]]) -> None:
    speeds = Speeds()
    for service, tokens, each, neighbours in requests:
        speeds = note(
            speeds,
            service_ms=service,
            prefill_tokens=tokens,
            prefill_ms=tokens * each,
            decode_tokens=tokens,
            decode_ms=tokens * each,
            neighbours=neighbours,
        )
    if not requests:
        return
    services, counts, each_ms, _ = zip(*requests, strict=True)
    slack = 1.000001
    assert min(services) / slack <= speeds.service_ms <= max(services) * slack
    assert min(counts) / slack <= speeds.output_tokens <= max(counts) * slack
    assert min(each_ms) / slack <= speeds.prefill_ms <= max(each_ms) * slack
    assert 0 < speeds.decode_ms <= max(each_ms) * slack
    assert 0 <= speeds.sharing <= 1


class TestTold:
    @pytest.mark.parametrize(
        ("old", "new", "published"),
        [
            (0.0, 1234.5, 1200.0),  # known for the first time
            (1200.0, 1234.5, 1200.0),
            (1200.0, 1499.0, 1200.0),
            (1200.0, 1501.0, 1500.0),
            (1200.0, 901.0, 1200.0),
            (1200.0, 899.0, 900.0),
            (0.0, 0.012345, 0.012),
            (0.0, 99.9, 100.0),
            (5.0, 0.0, 5.0),  # what was known once isn't forgotten
            (0.0, 0.0, 0.0),
        ],
    )
    def test_steady(self, old: float, new: float, published: float) -> None:
        assert steady(old, new) == pytest.approx(published)

    def test_the_same_object_while_nothing_has_moved(self) -> None:
        speeds = learned(*[decoding(20, 0)] * 5)
        first = told(Told(), speeds)
        assert first == Told(1000.0, 0.0, 20.0, 100.0, DEFAULT_SHARING)
        assert told(first, note(speeds, service_ms=1300.0)) is first
        assert told(first, note(speeds, service_ms=9000.0)) == msgspec.structs.replace(
            first, service_ms=pytest.approx(2300.0)
        )

    def test_sharing(self) -> None:
        speeds = learned(*[decoding(20, 0), decoding(40, 2)] * 10)
        first = told(Told(), speeds)
        assert first.sharing == pytest.approx(0.5, abs=0.03)
        assert told(first, speeds) is first

    def test_noise_seldom_makes_news(self) -> None:
        """Answers of very different length: a handful of changes in a thousand requests at the most."""
        chance = random.Random(7)
        speeds, news, changes = Speeds(), Told(), 0
        for _ in range(1000):
            tokens = chance.randrange(50, 400)
            neighbours = chance.randrange(4)
            speeds = note(
                speeds,
                service_ms=tokens * 20.0,
                prefill_tokens=500,
                prefill_ms=250.0,
                decode_tokens=tokens,
                decode_ms=tokens * 20 * (1 + 0.2 * neighbours) * chance.uniform(0.9, 1.1),
                neighbours=neighbours,
            )
            new = told(news, speeds)
            changes += new is not news
            news = new
        assert changes <= 20

    @given(st.floats(0, 1e9), st.floats(0, 1e9))
    def test_what_is_told_is_near_the_truth(self, old: float, new: float) -> None:
        published = steady(old, new)
        if new > 0:
            assert abs(published - new) <= max(0.25 * old, 0.05 * new) + 1e-9
        assert steady(published, published) == published
