"""Which slots are busy, against a model of what llama-server really does."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.local.slots import Slots, Task, tasks_at_work


class Engine:
    """A llama-server with `count` slots, where each lease's request works until it is told to end."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.slots = Slots()
        self.leases: dict[int, Task] = {}  # lease -> its task, while it works
        self.lost: set[Task] = set()  # abandoned and still at work
        self._tasks = 0

    def begin(self) -> int:
        lease = self.slots.occupy()
        used = {slot for slot, _ in self.work}
        self._tasks += 1
        self.leases[lease] = (min(set(range(self.count)) - used), self._tasks)
        return lease

    @property
    def work(self) -> set[Task]:
        return set(self.leases.values()) | self.lost

    def finish(self, lease: int) -> None:
        del self.leases[lease]
        self.slots.vacate(lease)

    def abandon(self, lease: int) -> Task:
        task = self.leases.pop(lease)
        self.lost.add(task)
        self.slots.abandon(lease)
        return task

    def look(self, old: frozenset[int] | None = None) -> bool:
        return self.slots.look(self.work, frozenset(self.slots.leased) if old is None else old)


def test_alone() -> None:
    engine = Engine(2)
    task = engine.abandon(engine.begin())
    assert not engine.look()
    assert engine.slots.busy == 1
    engine.lost.remove(task)
    assert engine.look()
    assert engine.slots.busy == 0


def test_beside_a_long_stream() -> None:
    engine = Engine(2)
    stream, lost = engine.begin(), engine.begin()
    task = engine.abandon(lost)
    assert not engine.look()
    engine.lost.remove(task)
    assert engine.look()
    assert engine.slots.busy == 1
    engine.finish(stream)


def test_beside_many_short_ones() -> None:
    """Every look finds as many at work as there are slots, but never the same."""
    engine = Engine(3)
    task = engine.abandon(engine.begin())
    short = [engine.begin(), engine.begin()]
    for _ in range(3):
        assert not engine.look(frozenset())
        for lease in short:
            engine.finish(lease)
        short = [engine.begin(), engine.begin()]
    engine.lost.remove(task)
    assert engine.look(frozenset())
    assert engine.slots.busy == 2


def test_a_lease_that_isnt_at_work_yet_doesnt_pass_for_the_abandoned_one() -> None:
    engine = Engine(2)
    engine.abandon(engine.begin())
    old = frozenset(engine.slots.leased)
    engine.slots.occupy()  # its request is still on the way
    assert not engine.look(old)
    assert engine.slots.abandoned == 1


def test_a_second_one_abandoned_between_two_looks() -> None:
    engine = Engine(3)
    engine.abandon(engine.begin())
    assert not engine.look()
    second = engine.begin()
    old = frozenset(engine.slots.leased)
    engine.abandon(second)
    assert not engine.look(old)
    assert engine.slots.abandoned == 2


@given(st.data(), st.integers(1, 4))
def test_never_given_away_early_and_never_kept_for_ever(data: st.DataObject, count: int) -> None:
    engine = Engine(count)
    old: frozenset[int] = frozenset()
    for _ in range(data.draw(st.integers(1, 25))):
        leased, lost = sorted(engine.slots.leased), sorted(engine.lost)
        steps = ["look"] + ["begin"] * (engine.slots.busy < count) * 2
        steps += ["finish", "abandon"] * bool(leased) + ["end"] * bool(lost)
        match data.draw(st.sampled_from(steps)):
            case "begin":
                engine.begin()
            case "finish":
                engine.finish(data.draw(st.sampled_from(leased)))
            case "abandon":
                engine.abandon(data.draw(st.sampled_from(leased)))
            case "end":
                engine.lost.remove(data.draw(st.sampled_from(lost)))
            case "look":
                engine.look(old)
                old = frozenset(engine.slots.leased)
        # Enough room for what really runs: nobody is sent into a full llama-server.
        assert len(engine.lost) <= engine.slots.abandoned
        assert len(engine.work) <= count
    engine.lost.clear()
    for lease in sorted(engine.slots.leased):
        engine.finish(lease)
    engine.look(frozenset())
    assert engine.slots.busy == 0


@pytest.mark.parametrize(
    ("reply", "tasks"),
    [
        ([], set()),
        ([{"is_processing": True, "id_task": 7}, {"is_processing": False, "id_task": 3}], {(0, 7)}),
        ([{}, {"is_processing": True}], {(1, -1)}),
        ([{"is_processing": True, "id_task": "x"}], {(0, -1)}),
        ({"error": {}}, None),
        ([1], None),
        (None, None),
    ],
)
def test_reading_the_reply(reply: Any, tasks: set[Task] | None) -> None:
    assert tasks_at_work(reply) == tasks
