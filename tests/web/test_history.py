"""The last hour of a node, and of several."""

from __future__ import annotations

from llamesh.web.history import Now, Ring, Sample, sum_up
from llamesh.web.state_schema import STEP, STEPS

START = 1_700_000_000.0


class Machine:
    """What a ring looks at."""

    def __init__(self) -> None:
        self.now = Now(0, 0, None, 100, 0)

    def __call__(self) -> Now:
        return self.now


def test_a_step_holds_what_was_written_in_it_and_how_it_was_at_its_end() -> None:
    machine = Machine()
    ring = Ring(machine)
    machine.now = Now(50, 2, 300, 400, 3)
    ring.take(START)
    machine.now = Now(150, 0, 300, 400, 0)
    ring.take(START + STEP)
    history = sum_up([ring.samples], START + STEP)
    assert history.series.tokens_per_second[-2:] == [5.0, 10.0]
    assert history.series.queue[-2:] == [2, 0]
    assert history.series.vram[-3:] == [None, 300, 300]
    assert history.end == START + STEP


def test_what_is_not_known_stays_unknown() -> None:
    ring = Ring(Machine())
    ring.take(START)
    series = sum_up([ring.samples], START).series
    assert series.vram[-1] is None
    assert series.ram[-1] == 100


def test_a_clock_that_is_set_back_or_wakes_twice_makes_no_second_sample() -> None:
    ring = Ring(Machine())
    for moment in (START, START + 0.01, START - 50, START + 4):
        ring.take(moment)
    assert len(ring.samples) == 1


def test_a_counter_that_shrinks_was_nothing_written() -> None:
    machine = Machine()
    ring = Ring(machine)
    machine.now = Now(100, 0, None, None, 0)
    ring.take(START)
    machine.now = Now(90, 0, None, None, 0)
    ring.take(START + STEP)
    assert [sample.tokens for sample in ring.samples] == [100, 0]


def test_nodes_are_added_up_and_an_hour_is_all() -> None:
    last = int(START // STEP)
    ours = [
        Sample(last - STEPS, 999, 9, 9, 9, 9),
        Sample(last - 1, 10, 1, 5, 7, 1),
        Sample(last, 10, 1, 5, 7, 1),
    ]
    theirs = [Sample(last, 30, 0, None, 1, 2), Sample(last + 3, 999, 9, 9, 9, 9)]
    series = sum_up([ours, theirs], START).series
    assert series.tokens_per_second[-2:] == [1.0, 4.0]
    assert series.requests[-2:] == [1, 3]
    assert series.vram[-1] == 5
    assert {len(column) for column in (series.queue, series.ram)} == {STEPS}
    assert series.queue[0] is None
