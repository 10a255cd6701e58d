"""One timer for many deadlines."""

from __future__ import annotations

import math

import trio
from trio.testing import MockClock

from llamesh.net.sweep import Sweep


class Item:
    def __init__(self, deadline: float, *, stays: bool = False) -> None:
        self.deadline = deadline
        self.expired: list[float] = []
        self._stays = stays

    def expire(self) -> None:
        self.expired.append(trio.current_time())
        if not self._stays:
            self.deadline = math.inf


async def run_for(sweep: Sweep, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await sweep.run()


async def test_deadlines_are_at_most_an_interval_late(autojump_clock: MockClock) -> None:
    sweep, start = Sweep(), trio.current_time()
    items = [Item(start + after) for after in (0.5, 1.0, 3.2)]
    never = Item(math.inf)
    for item in (*items, never):
        sweep.add(item)
    assert len(sweep) == 4
    await run_for(sweep, 10.5)
    assert [[round(t - start) for t in item.expired] for item in items] == [[1], [1], [4]]
    assert never.expired == []


async def test_a_deadline_that_stays_in_the_past_is_told_again(autojump_clock: MockClock) -> None:
    sweep, item = Sweep(0.5), Item(trio.current_time(), stays=True)
    sweep.add(item)
    await run_for(sweep, 1.75)
    assert len(item.expired) == 3


async def test_moved_and_forgotten_deadlines(autojump_clock: MockClock) -> None:
    sweep, start = Sweep(), trio.current_time()
    moved, forgotten = Item(start + 0.5), Item(start + 0.5)
    sweep.add(moved)
    sweep.add(forgotten)
    moved.deadline = start + 5
    sweep.discard(forgotten)
    sweep.discard(forgotten)
    await run_for(sweep, 4.5)
    assert moved.expired == []
    await run_for(sweep, 2)
    assert len(moved.expired) == 1
    assert forgotten.expired == []


async def test_expiring_may_change_the_set(autojump_clock: MockClock) -> None:
    sweep = Sweep()

    class Leaving(Item):
        def expire(self) -> None:
            super().expire()
            sweep.discard(self)
            sweep.add(Item(math.inf))

    for _ in range(3):
        sweep.add(Leaving(trio.current_time()))
    await run_for(sweep, 1.5)
    assert len(sweep) == 3
