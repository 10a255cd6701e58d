"""Waking a machine: packets until it is there, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import trio
from trio.testing import MockClock

from llamesh.mesh.waking import PACKET_SECONDS, WAKE_SECONDS, Waker
from llamesh.net.exchange import UpstreamBroken
from tests.mesh.test_parking import peer

MAC = "aa:bb:cc:dd:ee:ff"


class Card:
    """A network card: the packets that it got. It fails while `error` is set."""

    def __init__(self) -> None:
        self.packets: list[float] = []
        self.error: OSError | None = None

    async def send(self, mac: str, interfaces: Sequence[str]) -> None:
        assert (mac, tuple(interfaces)) == (MAC, ("all",))
        if self.error is not None:
            raise self.error
        self.packets.append(trio.current_time())


async def test_it_is_sent_packets_until_it_is_there(autojump_clock: MockClock) -> None:
    card, sleeper = Card(), peer("sleeper")
    sleeper.wake_mac = MAC
    waker = Waker(["all"], card.send)
    woken: list[float] = []

    async def wait() -> None:
        await waker.wake(sleeper)
        woken.append(trio.current_time())

    start = trio.current_time()
    async with trio.open_nursery() as nursery:
        for _ in range(20):  # many requests wait for it, and one of them leaves
            nursery.start_soon(wait)
        leaving = trio.CancelScope()

        async def leave() -> None:
            with leaving:
                await waker.wake(sleeper)

        nursery.start_soon(leave)
        await trio.sleep(7)
        leaving.cancel()
        await trio.sleep(10)
        assert woken == []
        sleeper.alive = True
    assert len(woken) == 20
    assert max(woken) - start < 18
    assert len(card.packets) == 4
    assert min(b - a for a, b in zip(card.packets, card.packets[1:], strict=False)) >= PACKET_SECONDS


async def test_who_is_awake_gets_none() -> None:
    card, there = Card(), peer("there")
    there.alive, there.wake_mac = True, MAC
    await Waker(["all"], card.send).wake(there)
    assert card.packets == []


async def test_who_does_not_come_is_given_up(autojump_clock: MockClock) -> None:
    card, sleeper = Card(), peer("sleeper")
    sleeper.wake_mac = MAC
    start = trio.current_time()
    with pytest.raises(UpstreamBroken, match="didn't come within 90 s") as broken:
        await Waker(["all"], card.send).wake(sleeper)
    assert not broken.value.started  # others may be asked
    assert trio.current_time() - start == pytest.approx(WAKE_SECONDS, abs=1)


async def test_what_cannot_be_sent_is_said(autojump_clock: MockClock) -> None:
    card, sleeper = Card(), peer("sleeper")
    waker = Waker(["all"], card.send)
    with pytest.raises(UpstreamBroken, match="no wake_mac"):
        await waker.wake(sleeper)
    sleeper.wake_mac = MAC
    card.error = OSError("the network is down")
    with pytest.raises(UpstreamBroken, match="sleeper can't be woken: the network is down"):
        await waker.wake(sleeper)
