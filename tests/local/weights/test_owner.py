"""Requests that wait for weights: on a virtual clock, with a hub that the test plays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio
from trio.testing import MockClock

from llamesh.config.cookbook import HubFile, Profile
from llamesh.config.current import Current
from llamesh.errors import QueueTimeout, SpawnFailed
from llamesh.local.weights import Weights, find_cache
from llamesh.local.weights.cache import Record, Stored
from llamesh.local.weights.errors import NotAllowed, Unreachable, WeightsError
from llamesh.local.weights.fetch import Fetcher
from llamesh.local.weights.progress import Progress
from llamesh.local.weights.wanted import Wanted
from tests.support.scripted import Play, get, profile, world


class Played(Fetcher):
    """Takes `seconds` for a model of 100 bytes; `moves`: whether bytes come meanwhile."""

    def __init__(self) -> None:
        super().__init__(find_cache({}))
        self.seconds = 100.0
        self.moves = True
        self.error: WeightsError | None = None
        self.here: set[Wanted] = set()
        self.began: list[str] = []
        self.stopped = 0

    async def look(self, wanted: Wanted) -> Record | None:
        await trio.lowlevel.checkpoint()
        return record(wanted) if wanted in self.here else None

    async def obtain(self, wanted: Wanted, progress: Progress, *, fresh: bool = False) -> Record:
        self.began.append(wanted.name)
        progress.doing, progress.total = "downloading", 100
        begun = trio.current_time()
        try:
            while (passed := trio.current_time() - begun) < self.seconds:
                progress.sample(trio.current_time(), int(100 * passed / self.seconds) if self.moves else 1)
                await trio.sleep(min(1.0, self.seconds - passed))
        except trio.Cancelled:
            self.stopped += 1
            raise
        if self.error is not None:
            raise self.error
        self.here.add(wanted)
        return record(wanted)


def record(wanted: Wanted) -> Record:
    stored = Stored("m.gguf", "/cache/m.gguf", "/cache/blob", 100, "0" * 64, ours=True)
    return Record(wanted.key, wanted.name, "o/n", "0" * 40, (stored,))


def of_hub(name: str = "m", repo: str = "o/n:Q8_0", **more: object) -> Profile:
    return replace(profile(name, **more), source=HubFile(repo, None), arguments=())


@pytest.fixture
def played() -> Played:
    return Played()


@pytest.fixture
def weights(played: Played) -> Callable[[Current], Weights]:
    return lambda current: Weights(current, find_cache({}), played)


Make = Callable[[Current], Weights]


async def test_a_request_waits_for_the_download_and_its_clock_stands_still(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    wanted = of_hub(max_wait_in_queue_ms=10_000)
    async with world({"m": [Play(load=3)]}, weights=weights) as here:
        [client] = await here.clients(1, wanted)
        await trio.sleep(50)
        assert client.waits
        assert here.pool.weights.told(wanted, "n") == {
            "model": "m",
            "state": "downloading",
            "node": "n",
            "progress": pytest.approx(0.5, abs=0.02),
            "eta_seconds": pytest.approx(50, abs=5),
        }
        await trio.sleep(100)
        assert client.lease is not None
        assert 102 < client.after < 106
        instance = here.instance(wanted)
        assert instance.launch.arguments[:2] == ("-m", "/cache/m.gguf")
        client.lease.release()


async def test_a_download_that_doesnt_move_uses_up_the_wait(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    played.moves = False
    async with world(weights=weights) as here:
        [client] = await here.clients(1, of_hub(max_wait_in_queue_ms=10_000))
        await trio.sleep(30)
        assert isinstance(client.error, QueueTimeout)
        assert 14 < client.after < 17  # 5 s in which the first byte counts as progress
        assert client.error.extra["loading"]["state"] == "downloading"
        assert "downloading o/n:Q8_0" in client.error.message


async def test_many_profiles_and_requests_share_a_download(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    one, two = of_hub("one"), of_hub("two")
    async with world(weights=weights, cookbook=[one, two]) as here:
        clients = [*await here.clients(3, one), *await here.clients(3, two)]
        await trio.sleep(103)
        assert played.began == ["o/n:Q8_0"]
        assert len([client for client in clients if client.lease is not None]) == 2  # each has one slot
        for client in clients:
            while client.lease is None:
                await trio.sleep(1)
            client.lease.release()


async def test_what_is_there_is_served_at_once(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    wanted = of_hub()
    async with world({"m": [Play(load=1)]}, weights=weights, cookbook=[wanted]) as here:
        await trio.sleep(10)
        assert not here.pool.weights.is_here(wanted)
        played.here.add(Wanted(HubFile("o/n:Q8_0", None), projector=True))  # `llamesh pull` elsewhere
        await trio.sleep(10)
        assert here.pool.weights.is_here(wanted)
        lease = await get(here.dispatch, wanted)
        lease.release()
        assert played.began == []
        played.here.clear()
        await trio.sleep(10)
        assert not here.pool.weights.is_here(wanted)


async def test_what_cant_be_had_is_said_at_once_until_it_is_tried_again(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    played.error, played.seconds = NotAllowed("o/n is gated"), 1.0
    wanted = of_hub()
    async with world(weights=weights) as here:
        for _ in range(3):
            with pytest.raises(SpawnFailed, match=r"on node node-a: its weights can't be had: o/n is gated"):
                await get(here.dispatch, wanted)
        assert len(played.began) == 1
        assert str(here.pool.weights.failure(wanted)) == "o/n is gated"
        await trio.sleep(61)
        played.error = None
        (await get(here.dispatch, wanted)).release()
        assert here.pool.weights.failure(wanted) is None


async def test_what_may_pass_is_tried_again_sooner(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    played.error, played.seconds = Unreachable("the hub is down"), 1.0
    async with world(weights=weights) as here:
        with pytest.raises(SpawnFailed, match="the hub is down"):
            await get(here.dispatch, of_hub())
        played.error = None
        await trio.sleep(11)
        (await get(here.dispatch, of_hub())).release()


async def test_download_timeout_seconds(autojump_clock: MockClock, played: Played, weights: Make) -> None:
    wanted = of_hub(download_timeout_seconds=30.0)
    async with world(weights=weights) as here:
        [client] = await here.clients(1, wanted)
        await trio.sleep(40)
        assert isinstance(client.error, SpawnFailed)
        assert "after 30 s (download_timeout_seconds)" in client.error.message
        assert 29 < client.after < 32
        assert played.stopped == 1


@pytest.mark.parametrize("keep", [True, False])
async def test_when_nobody_waits_any_more(
    autojump_clock: MockClock, played: Played, weights: Make, *, keep: bool
) -> None:
    async with world(weights=weights, keep_downloading=keep) as here:
        [client] = await here.clients(1, of_hub())
        await trio.sleep(20)
        client.scope.cancel()
        await trio.sleep(30)
        assert played.stopped == (0 if keep else 1)
        assert (here.pool.weights.progress(of_hub()) is not None) == keep
        await trio.sleep(100)


async def test_a_model_that_is_kept_warm_is_fetched_and_wanted(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    wanted = of_hub(min_instances=1)
    async with world(weights=weights, cookbook=[wanted], keep_downloading=False) as here:
        await trio.sleep(150)
        assert played.began == ["o/n:Q8_0"]
        assert len(here.pool.staying(wanted.key)) == 1


async def test_one_that_is_only_listed_isnt_fetched(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    async with world(weights=weights) as here:
        [client] = await here.clients(1, of_hub(max_instances=0))
        await trio.sleep(1)
        assert client.error is not None
        assert "max_instances is 0" in client.error.message
        assert played.began == []


async def test_a_start_that_fails_has_the_disk_looked_at_again(
    autojump_clock: MockClock, played: Played, weights: Make
) -> None:
    wanted = of_hub()
    plays = {"m": [Play(load=1, fails=True), Play(load=1)]}
    async with world(plays, weights=weights, cookbook=[wanted]) as here:
        [client] = await here.clients(1, wanted)
        await trio.sleep(250)
        assert client.lease is not None
        assert len(played.began) == 1 or played.began == ["o/n:Q8_0"] * 2
        client.lease.release()


async def test_the_node_ends_in_the_middle(autojump_clock: MockClock, played: Played, weights: Make) -> None:
    async with world(weights=weights) as here:
        [client] = await here.clients(1, of_hub())
        await trio.sleep(20)
        client.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
    assert played.stopped == 1


def test_progress_in_words() -> None:
    progress = Progress("o/n:Q8_0")
    assert str(progress) == "looking for o/n:Q8_0"
    assert progress.document() == {}
    progress.doing, progress.total = "downloading", 4_700_000_000
    progress.sample(10.0, 0)
    assert str(progress) == "downloading o/n:Q8_0, 0 % of 4.7 GB"
    for second in range(11, 60):
        progress.sample(second, (second - 10) * 10_000_000)
    assert str(progress) == "downloading o/n:Q8_0, 10 % of 4.7 GB, 10.0 MB/s, 7 min left"
    assert progress.moved == 59
    progress.sample(80.0, progress.have)
    assert progress.moved == 59
    assert progress.eta_seconds is not None
    progress.sample(2000.0, progress.have)
    assert progress.eta_seconds is None
    progress.sample(2000.0, progress.have)  # the same moment
    assert progress.fraction == pytest.approx(0.104, abs=0.001)
    assert Progress("x").moved == -math.inf
