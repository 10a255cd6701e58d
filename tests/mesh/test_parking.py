"""How many connections are kept parked with a peer, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from llamesh.config.sections import CircuitBreaker
from llamesh.mesh.dialler import CantReach
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.parking import MOST, READY, Parking
from llamesh.mesh.peer import Peer


class Stream:
    """A parked connection as the test sees it: `take` is its first request, `end` the holder's closing it."""

    def __init__(self) -> None:
        self.closed = False
        self.take: Callable[[], None] = lambda: None
        self.over = trio.Event()

    def close(self) -> None:
        self.closed = True

    def end(self) -> None:
        self.over.set()


class Lot:
    """A parking with one peer. `streams`: all that were ever dialled."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.failing = self.broken = False
        self.dials: list[float] = []
        self.peer = peer("holder")
        self.parking = Parking(self.dial, cast(Any, self.serve))

    async def dial(self, _: Peer) -> NoiseTransport:
        self.dials.append(trio.current_time())
        await trio.sleep(0.01)
        if self.failing:
            raise CantReach("nobody")
        self.streams.append(Stream())
        return cast(NoiseTransport, self.streams[-1])

    async def serve(self, stream: Stream, taken: Callable[[], None]) -> None:
        stream.take = taken
        if self.broken:
            raise RuntimeError("a defect")
        await stream.over.wait()

    @property
    def open(self) -> list[Stream]:
        return [stream for stream in self.streams if not stream.closed]


def peer(name: str) -> Peer:
    async def never(_: Peer) -> NoiseTransport:
        raise CantReach("nobody")

    return Peer(name, never, CircuitBreaker(), 3600.0)


@pytest.fixture
async def lot(nursery: trio.Nursery) -> Lot:
    made = Lot()
    await nursery.start(made.parking.run)
    return made


async def test_two_wait_and_a_taken_one_is_replaced(lot: Lot, autojump_clock: MockClock) -> None:
    lot.parking.want(lot.peer, None)
    await trio.sleep(1)
    assert lot.dials == []  # nobody said that it can't reach us
    lot.parking.want(lot.peer, False)
    await trio.sleep(1)
    assert len(lot.open) == READY == lot.parking.count("holder")
    lot.streams[0].take()
    lot.streams[0].take()  # its second request
    await trio.sleep(1)
    assert len(lot.open) == READY + 1
    lot.streams[0].end()
    await trio.sleep(1)
    assert len(lot.open) == READY
    lot.streams[1].end()  # a waiting one that the holder closed
    await trio.sleep(60)
    assert len(lot.open) == READY


async def test_there_are_never_more_than_so_many(lot: Lot, autojump_clock: MockClock) -> None:
    lot.parking.want(lot.peer, False)
    for _ in range(3 * MOST):
        await trio.sleep(1)
        for stream in lot.open:
            stream.take()
    assert len(lot.open) == MOST == lot.parking.count("holder")


async def test_news_that_say_nothing_change_nothing(lot: Lot, autojump_clock: MockClock) -> None:
    lot.parking.want(lot.peer, False)
    await trio.sleep(1)
    for _ in range(10):
        lot.parking.want(lot.peer, None)
        lot.parking.want(lot.peer, False)
        await trio.sleep(1)
    assert len(lot.streams) == READY


@pytest.mark.parametrize("why", ["reached", "gone"])
async def test_who_needs_them_no_more_keeps_what_it_uses(
    lot: Lot, autojump_clock: MockClock, why: str
) -> None:
    lot.parking.want(lot.peer, False)
    await trio.sleep(1)
    used = lot.streams[0]
    used.take()
    await trio.sleep(1)
    if why == "reached":
        lot.parking.want(lot.peer, True)
    else:
        lot.parking.end("holder")
    await trio.sleep(10)
    assert lot.open == [used]
    assert lot.parking.count("holder") == 0
    used.end()
    await trio.sleep(10)
    assert lot.open == []
    assert len(lot.streams) == READY + 1
    lot.parking.want(lot.peer, False)
    await trio.sleep(1)
    assert len(lot.open) == READY


@pytest.mark.parametrize("how", ["nobody there", "closed at once", "defect"])
async def test_failures_are_followed_by_growing_pauses(
    lot: Lot, autojump_clock: MockClock, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lot.failing, lot.broken = how == "nobody there", how == "defect"
    lot.parking.want(lot.peer, False)
    with trio.move_on_after(300):
        while True:
            for stream in lot.open if how == "closed at once" else ():
                stream.end()
            await trio.sleep(0.05)
    assert 8 < len(lot.dials) < 40
    assert ("a defect" in capsys.readouterr().err) is (how == "defect")
    lot.failing = lot.broken = False
    await trio.sleep(60)
    assert len(lot.open) == READY


async def test_at_the_end_all_are_closed(autojump_clock: MockClock) -> None:
    lot = Lot()
    async with trio.open_nursery() as nursery:
        await nursery.start(lot.parking.run)
        lot.parking.want(lot.peer, False)
        await trio.sleep(1)
        assert len(lot.open) == READY
        nursery.cancel_scope.cancel()
    assert lot.open == []
    lot.parking.want(peer("late"), False)  # nobody owns it any more
    assert lot.parking.count("late") == 0
