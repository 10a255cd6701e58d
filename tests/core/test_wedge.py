"""Telling a process that hangs from one that works silently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.wedge import Flat, is_wedged, look

Sample = tuple[float, bool, float | None, float | None]


def run(*samples: Sample) -> Flat | None:
    """Samples are (time, busy, CPU seconds since the start, share of the GPU)."""
    flat: Flat | None = None
    for now, busy, cpu_seconds, gpu in samples:
        flat = look(flat, now=now, busy=busy, cpu_seconds=cpu_seconds, gpu=gpu)
    return flat


def test_flat_for_the_whole_window() -> None:
    flat = run((0, True, 7.0, 0.0), (5, True, 7.0, 0.0), (10, True, 7.01, 0.0))
    assert flat == Flat(0, 10, 7.01)
    assert is_wedged(flat, window=10)
    assert not is_wedged(flat, window=10.1)


@pytest.mark.parametrize(
    "between",
    [
        (5, False, 7.0, 0.0),
        (5, True, None, 0.0),
        (5, True, 7.0, 0.5),
        (5, True, 7.1, 0.0),
    ],
    ids=["idle", "unknown", "the GPU works", "the CPU works"],
)
def test_any_work_begins_the_window_anew(between: Sample) -> None:
    cpu_seconds = between[2] or 7.0
    flat = run((0, True, 7.0, 0.0), between, (10, True, cpu_seconds, 0.0), (14, True, cpu_seconds, 0.0))
    assert flat is not None
    assert flat.since >= 5
    assert not is_wedged(flat, window=10)


def test_without_a_gpu_figure_the_cpu_decides() -> None:
    assert is_wedged(run((0, True, 1.0, None), (9, True, 1.0, None)), window=9)


def test_timers_and_health_checks_are_flat() -> None:
    # 2 ms of CPU each 5 s.
    flat = run(*((5.0 * n, True, 1.0 + 0.002 * n, 0.0) for n in range(121)))
    assert is_wedged(flat, window=600)


def test_two_looks_at_one_moment() -> None:
    assert run((3, True, 1.0, None), (3, True, 1.0, None)) == Flat(3, 3, 1.0)


def test_nothing_known_isnt_wedged() -> None:
    assert not is_wedged(None, window=0)


@given(st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 2), st.none() | st.floats(0, 1))))
def test_a_window_is_never_longer_than_what_was_seen(
    steps: list[tuple[bool, float | None, float | None]],
) -> None:
    flat: Flat | None = None
    cpu_seconds, quiet = 0.0, 0.0
    for now, (busy, more, gpu) in enumerate(steps):
        cpu_seconds += more or 0.0
        told = None if more is None else cpu_seconds
        flat = look(flat, now=float(now), busy=busy, cpu_seconds=told, gpu=gpu)
        works = told is None or not busy or (gpu or 0) > 0.01
        quiet = now + 1.0 if works else quiet
        if flat is not None:
            assert flat.at == now
            assert flat.since >= quiet
        else:
            assert works
