"""Counting: buckets, speeds, sums over profiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.telemetry.stats import Histogram, NodeStats, ProfileStats, Usage


def test_upper_bounds_are_inclusive() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.1):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 4.0), ("+Inf", 5.0)]
    assert histogram.total == pytest.approx(6.6)


@given(st.lists(st.floats(0, 1000)))
def test_every_value_is_in_one_bucket(values: list[float]) -> None:
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    rows = histogram.cumulative()
    assert rows[-1] == ("+Inf", float(len(values)))
    for bound, count in rows[:-1]:
        assert count == sum(value <= float(bound) for value in values)


def test_tokens_add_up_and_speed_follows_the_newest() -> None:
    stats = ProfileStats()
    stats.add_usage(Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=100, predicted_ms=1000))
    assert stats.tokens_per_second == 100.0
    stats.add_usage(Usage(prompt_tokens=1, completion_tokens=200, predicted_ms=1000))
    assert stats.tokens_per_second == pytest.approx(120)
    assert (stats.prompt_tokens_total, stats.cached_tokens_total, stats.tokens_generated_total) == (
        11,
        4,
        300,
    )


@pytest.mark.parametrize("usage", [Usage(), Usage(completion_tokens=7, predicted_ms=1), Usage(0, 0, 90, 0)])
def test_a_speed_that_says_nothing_isnt_learned(usage: Usage) -> None:
    stats = ProfileStats()
    stats.add_usage(usage)
    assert stats.tokens_per_second == 0


def test_the_node_is_the_sum_of_its_profiles_and_what_was_refused() -> None:
    stats = NodeStats()
    for key, requests, errors, running in (("a:d", 5, 1, 2), ("b:d", 7, 0, 3)):
        one = stats.profile(key)
        one.requests_total, one.errors_total, one.current_requests = requests, errors, running
    stats.rejected["model_not_found"] += 4
    assert (stats.requests_total, stats.errors_total, stats.current_requests) == (16, 5, 5)
    assert stats.profile("a:d") is stats.profile("a:d")
