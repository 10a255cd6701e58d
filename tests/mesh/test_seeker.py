"""Whom the seeker dials and when, on a clock that jumps."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from llamesh.config.values import Address
from llamesh.mesh import seeker as module
from llamesh.mesh.dialler import CantReach, Dialler
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.seeker import Seeker


def at(number: int) -> Address:
    return Address("10.0.0.1", number)


class Found:
    """Just who answered."""

    def __init__(self, node: str) -> None:
        self.remote = type("Remote", (), {"node_id": node})
        self.address = "10.0.0.1:1"


class FakeDialler:
    """`there`: which node is at an address; `own`: addresses of this node. `dials`: (time, addresses)."""

    def __init__(self) -> None:
        self.there: dict[Address, str] = {}
        self.own: set[Address] = set()
        self.dials: list[tuple[float, tuple[Address, ...]]] = []
        self.under_way = self.most = 0

    async def dial(self, addresses: Iterable[Address], *, node: str | None = None) -> Found:
        addresses = tuple(addresses)
        self.dials.append((trio.current_time(), addresses))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await trio.sleep(0.01)
        finally:
            self.under_way -= 1
        for address in addresses:
            if node in (None, self.there.get(address)) and address in self.there:
                return Found(self.there[address])
        raise CantReach("nobody", its_me=tuple(a for a in addresses if a in self.own))


class Setting:
    """A seeker, whom it knows, and what it found."""

    def __init__(self) -> None:
        self.dialler = FakeDialler()
        self.alive: set[str] = set()
        self.found: list[str] = []
        self.seeker = Seeker(cast(Dialler, self.dialler), self.alive.__contains__, self.take)

    def take(self, stream: NoiseTransport) -> None:
        self.found.append(stream.remote.node_id)
        self.alive.add(stream.remote.node_id)

    def times(self) -> list[float]:
        return [when for when, _ in self.dialler.dials]


@pytest.fixture
async def setting(nursery: trio.Nursery) -> Setting:
    made = Setting()
    nursery.start_soon(made.seeker.run)
    return made


async def test_a_configured_address_is_dialled_until_somebody_is_there(
    setting: Setting, autojump_clock: MockClock
) -> None:
    setting.seeker.set_static([(at(1), None)])
    await trio.sleep(300)
    times = setting.times()
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    # Backoff, with chance in it, and never for long.
    assert max(pauses) <= 31
    assert pauses[-1] > 14 > pauses[0]
    assert len(set(pauses)) > len(pauses) // 2
    assert setting.seeker.problems() == ["nobody"]
    setting.dialler.there[at(1)] = "b"
    await trio.sleep(40)
    assert setting.found == ["b"]
    assert setting.seeker.problems() == []
    count = len(setting.dialler.dials)
    await trio.sleep(300)
    assert len(setting.dialler.dials) == count  # it is alive
    setting.alive.clear()
    await trio.sleep(40)
    assert setting.found == ["b", "b"]


async def test_an_address_of_our_own_is_dialled_once(setting: Setting, autojump_clock: MockClock) -> None:
    setting.dialler.own.add(at(1))
    setting.seeker.set_static([(at(1), None), (at(2), None)])
    await trio.sleep(100)
    assert sum(at(1) in addresses for _, addresses in setting.dialler.dials) == 1
    assert setting.seeker.problems() == ["nobody"]  # of the other one
    # Until this machine has other addresses.
    setting.seeker.forget_own()
    await trio.sleep(100)
    assert sum(at(1) in addresses for _, addresses in setting.dialler.dials) == 2


async def test_what_isnt_configured_any_more_is_not_dialled(
    setting: Setting, autojump_clock: MockClock
) -> None:
    setting.seeker.set_static([(at(1), None)])
    await trio.sleep(10)
    setting.seeker.set_static([(at(2), "b")])
    await trio.sleep(0.5)
    setting.dialler.dials.clear()
    await trio.sleep(100)
    assert {addresses for _, addresses in setting.dialler.dials} == {(at(2),)}


async def test_who_was_lost_is_sought_as_long_again_as_it_is_away(
    setting: Setting, autojump_clock: MockClock
) -> None:
    setting.seeker.lost("b", [at(1), at(2)])
    await trio.sleep(2 * 3600)
    times = setting.times()
    assert times[1] - times[0] < 1
    for earlier, later in itertools.pairwise(times):
        assert later - earlier <= max(31, min(301, earlier / 10 + 2))
    assert times[-1] - times[-2] > 200
    setting.dialler.there[at(2)] = "b"
    await trio.sleep(310)
    assert setting.found == ["b"]
    await trio.sleep(1)
    assert len(setting.seeker) == 0


async def test_who_stays_away_for_days_is_given_up(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    setting.seeker.lost("b", [at(1)])
    monkeypatch.setattr(module, "_LOST_SECONDS", 7200.0)
    await trio.sleep(7100)
    assert len(setting.seeker) == 1
    await trio.sleep(200)
    assert len(setting.seeker) == 0


async def test_who_left_is_not_sought(setting: Setting, autojump_clock: MockClock) -> None:
    setting.seeker.lost("b", [at(1)])
    setting.seeker.drop("b")
    setting.seeker.lost("nobody knows where", [])
    await trio.sleep(10)
    assert setting.dialler.dials == []
    assert len(setting.seeker) == 0


async def test_an_announcement_that_ends_forgets_nobody_who_was_a_member(
    setting: Setting, autojump_clock: MockClock
) -> None:
    setting.seeker.sighted("b", [at(1)])
    setting.seeker.sighted("c", [at(3)])
    setting.seeker.lost("b", [at(2)])
    await trio.sleep(1)
    # A lie about where it is doesn't hide it, either.
    assert (at(1), at(2)) in {addresses for _, addresses in setting.dialler.dials}
    setting.seeker.unsighted("b")
    setting.seeker.unsighted("c")
    setting.seeker.unsighted("unheard of")
    setting.dialler.dials.clear()
    await trio.sleep(60)
    assert {addresses for _, addresses in setting.dialler.dials} == {(at(2),)}


async def test_a_new_sighting_is_tried_at_once(setting: Setting, autojump_clock: MockClock) -> None:
    setting.seeker.sighted("b", [at(1)])
    await trio.sleep(200)
    setting.dialler.there[at(2)] = "b"
    setting.seeker.sighted("b", [at(2)])
    await trio.sleep(0.6)
    assert setting.found == ["b"]


async def test_it_is_bounded(
    setting: Setting, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MOST_TARGETS", 50)
    setting.seeker.set_static([(at(1), None)])
    for number in range(200):
        setting.seeker.sighted(f"n{number}", [at(100 + number)])
        await trio.sleep(0.001)
    assert len(setting.seeker) == 51
    setting.dialler.dials.clear()
    await trio.sleep(60)
    dialled = {address for _, addresses in setting.dialler.dials for address in addresses}
    assert dialled == {at(1), *(at(100 + number) for number in range(150, 200))}
    assert setting.dialler.most <= 16


async def test_a_defect_with_one_ends_nothing(
    setting: Setting, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("a defect")

    setting.dialler.there.update({at(1): "b", at(2): "c"})
    take, setting.seeker._on_found = setting.seeker._on_found, fail
    setting.seeker.sighted("b", [at(1)])
    await trio.sleep(1)
    setting.seeker._on_found = take
    setting.seeker.sighted("c", [at(2)])
    await trio.sleep(60)
    assert sorted(setting.found) == ["b", "c"]
    assert "a defect" in capsys.readouterr().err
