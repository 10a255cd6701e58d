"""The keeper's duties on real children: idle ones leave, warm ones stay, hung ones are ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.config.cookbook import Cookbook, ModelPath, Profile
from llamesh.config.current import Current
from llamesh.config.settings import Settings
from llamesh.core.lifecycle import State
from llamesh.core.readings import Device, Reading
from llamesh.local import keeper as module
from llamesh.local.instance import Instance
from llamesh.local.keeper import Keeper
from llamesh.local.launch import find_engine
from llamesh.local.memory import Memory
from llamesh.local.orphans import Ledger
from llamesh.local.pool import Pool
from llamesh.local.ports import Ports
from llamesh.local.sensors import Sensors
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.stats import NodeStats
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.node import clean_environment, wait_until

MIB = 1 << 20


class Blind(Sensors):
    """Sensors that see nothing."""

    def __init__(self) -> None:
        super().__init__(gpus=())

    def sample(self, pids: Any, *, now: float) -> Reading:
        return Reading(now)


@dataclasses.dataclass
class House:
    """A keeper with its surroundings; nothing ticks by itself."""

    directory: Path
    current: Current
    pool: Pool
    keeper: Keeper
    stats: NodeStats

    def profile(self, name: str = "m", *arguments: str, behaviour: Any = None, **more: Any) -> Profile:
        """A profile of the cookbook, on the fake llama-server."""
        source = ModelPath(str(fake_profile_file(self.directory, name, **(behaviour or {}))))
        made = Profile(name, "default", "", "", source, arguments, **more)
        others = tuple(p for p in self.current.cookbook.profiles if p.key != made.key)
        self.current.cookbook = Cookbook((*others, made), {})
        return made

    async def start(self, profile: Profile) -> Instance:
        """An instance that serves."""
        await self.pool.memory.look(profile)
        instance = self.pool.spawn(profile)
        await self.until(lambda: instance.state is State.READY, f"{instance} ready")
        return instance

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        await wait_until(condition, lambda: f"never: {what}; {list(self.pool.all())}")

    async def tick_until(self, condition: Callable[[], bool], what: str) -> None:
        """Tick until `condition` holds."""

        def tried() -> bool:
            self.keeper.tick()
            return condition()

        await self.until(tried, what)

    def states(self, profile: Profile) -> list[State]:
        return [instance.state for instance in self.pool.instances(profile.key)]


@asynccontextmanager
async def house(tmp_path: Path, **settings: Any) -> AsyncIterator[House]:
    engine = await find_engine(FAKE_LLAMA_SERVER, environ=clean_environment({}), ask_seconds=1)
    current = Current(Settings(node_id="a", **settings), Cookbook((), {}))
    stats, learned = NodeStats(), LearnedValues(tmp_path / "metrics.json")
    memory = Memory(current, engine, learned, Blind())
    pool = Pool(current, engine, Ports(None), Ledger(tmp_path / "children"), stats, learned, memory)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        with trio.fail_after(60):
            yield House(tmp_path, current, pool, Keeper(current, pool), stats)
        await pool.close()
        assert list(pool.all()) == []
        nursery.cancel_scope.cancel()


# Idle.


async def test_only_who_is_idle_for_long_leaves(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        idle = await here.start(here.profile("idle", idle_timeout_seconds=5))
        busy = await here.start(here.profile("busy", idle_timeout_seconds=5))
        young = await here.start(here.profile("young", idle_timeout_seconds=5))
        for_ever = await here.start(here.profile("ever", idle_timeout_seconds=0))
        busy.occupy()
        for instance in (idle, busy, for_ever):
            instance.last_used = trio.current_time() - 6
        young.last_used = trio.current_time()
        here.keeper.tick()
        assert idle.state is State.STOPPING
        assert idle.end_reason == "idle for 5 s"
        assert {busy.state, young.state, for_ever.state} == {State.READY}
        await idle.wait_gone()
        assert here.pool.evictions == {"idle": 1}


# Warm.


async def test_warm_ones_are_started_kept_and_restored(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        profile = here.profile(min_instances=2, idle_timeout_seconds=1)
        ready = [State.READY] * 2
        await here.tick_until(lambda: here.states(profile) == ready, "two of them")
        for instance in here.pool.instances(profile.key):
            instance.last_used = trio.current_time() - 99
        here.keeper.tick()
        assert here.states(profile) == ready
        first = here.pool.instances(profile.key)[0]
        assert first.child is not None
        first.child.kill()
        await first.wait_gone()
        await here.tick_until(lambda: here.states(profile) == ready, "two again")
        assert len(launches(tmp_path / "m.json")) == 3
        # One more than has to be warm may leave.
        extra = await here.start(profile)
        for instance in here.pool.instances(profile.key):
            instance.last_used = trio.current_time()
        extra.last_used = trio.current_time() - 99
        here.keeper.tick()
        await extra.wait_gone()
        assert here.states(profile) == ready


async def test_no_more_warm_ones_than_there_may_be(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        none = here.profile("none", min_instances=1, max_instances=0)
        one = here.profile("one", min_instances=3, max_instances=1)
        await here.tick_until(lambda: here.states(one) == [State.READY], "one")
        for _ in range(5):
            here.keeper.tick()
        assert len(here.states(one)) == 1
        assert here.states(none) == []


async def test_a_start_that_fails_is_not_tried_at_every_tick(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        profile = here.profile(min_instances=1, behaviour={"exit_at_start": {"code": 1}})
        key = profile.key
        await here.tick_until(lambda: here.pool.trouble(key) is not None and here.pool.resting(key), "a rest")
        tried = here.stats.profile(key).starts_total
        here.keeper.tick()
        assert here.stats.profile(key).starts_total == tried


async def test_keeping_warm_evicts_nobody(tmp_path: Path) -> None:
    async with house(tmp_path, max_sysmem_mb=100) as here:
        there = await here.start(here.profile("there", estimated_sysmem_mb=80))
        warm = here.profile("warm", min_instances=1, estimated_sysmem_mb=80)
        await here.pool.memory.look(warm)
        for _ in range(3):
            here.keeper.tick()
        assert here.states(warm) == []
        assert there.state is State.READY
        here.pool.drain((there.id,), "test", cause="test")
        await there.wait_gone()
        await here.tick_until(lambda: here.states(warm) == [State.READY], "warm")


# Strangers.


async def test_who_is_over_the_budget_leaves(tmp_path: Path) -> None:
    async with house(tmp_path, model_defaults={"min_eviction_tenure_secs": 0}) as here:
        first = await here.start(here.profile("first", estimated_vram_mb=4000))
        second = await here.start(here.profile("second", estimated_vram_mb=4000))
        first.occupy()
        device = Device(0, "GPU-0", "Fake", "nvidia", total_bytes=10_000 * MIB, used_bytes=0, processes=())
        memory = here.pool.memory
        pids = [i.child.pid for i in (first, second) if i.child is not None]

        async def strangers(size: int) -> None:
            held = ((55, size * MIB), *((pid, 4000 * MIB) for pid in pids))
            used = dataclasses.replace(device, used_bytes=(8000 + size) * MIB, processes=held)
            memory._sensors.sample = lambda pids, *, now: Reading(now, (used,))  # type: ignore[method-assign]
            await memory.sample(list(here.pool.all()))
            here.pool.leave_strangers_their_memory()

        await strangers(1000)
        assert (first.state, second.state) == (State.READY, State.READY)
        await strangers(2000)
        assert first.state is State.READY
        await second.wait_gone()
        assert second.end_reason == "other programs need the memory"


# The owner.


async def test_a_pause_sends_all_away_and_ends(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        idle = await here.start(here.profile("idle"))
        warm = here.profile("warm", min_instances=1)
        busy = await here.start(here.profile("busy"))
        lease = busy.occupy()
        here.keeper.paused_until = math.inf
        assert here.keeper.away() == "paused"
        here.keeper.tick()
        await idle.wait_gone()
        assert busy.state is State.DRAINING
        busy.vacate(lease, abandoned=False)
        await busy.wait_gone()
        here.keeper.tick()
        assert here.states(warm) == []
        here.keeper.paused_until = trio.current_time() + 60
        assert here.keeper.away().startswith("paused for another ")
        here.keeper.paused_until = trio.current_time()
        assert here.keeper.away() == ""
        await here.tick_until(lambda: here.states(warm) == [State.READY], "warm again")


async def test_a_named_program_sends_all_away(tmp_path: Path) -> None:
    async with house(tmp_path) as here:
        instance = await here.start(here.profile())
        here.pool.memory.intruder = "game"
        assert here.keeper.away() == "game is running (yield_to)"
        here.keeper.tick()
        await instance.wait_gone()
        assert here.pool.evictions == {"owner": 1}
        here.pool.memory.intruder = ""
        assert here.keeper.away() == ""


# Hung ones.


WEDGE = {"enabled": True, "window_ms": 50, "sample_interval_ms": 1}


async def test_a_hung_one_is_ended(tmp_path: Path) -> None:
    async with house(tmp_path, wedge_detector=WEDGE) as here:
        hung = await here.start(here.profile("hung"))
        idle = await here.start(here.profile("idle"))
        hung.occupy()
        with trio.fail_after(20):
            while not hung.asked_to_end:
                await here.keeper._end_hung()
                await trio.sleep(0.01)
        await hung.wait_gone()
        assert "without using CPU or GPU" in str(hung.failure)
        assert idle.state is State.READY
        await here.keeper._end_hung()
        assert here.keeper._flat == {}


@pytest.mark.parametrize(
    "settings",
    [{**WEDGE, "enabled": False}, {**WEDGE, "window_ms": 600_000}],
    ids=["off", "not yet"],
)
async def test_others_are_left_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    async with house(tmp_path, wedge_detector=settings) as here:
        instance = await here.start(here.profile())
        instance.occupy()
        for _ in range(10):
            await here.keeper._end_hung()
            await trio.sleep(0.01)
        assert instance.state is State.READY
        here.pool.drain((instance.id,), "test", cause="test")
        instance.stop("test")


async def test_a_gpu_that_works_says_that_it_isnt_hung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(module, "_cpu_seconds", lambda pids: [1.0] * len(pids))
    device = Device(0, "GPU-0", "Fake", "nvidia", total_bytes=MIB, used_bytes=0, utilisation=0.9)
    other = dataclasses.replace(device, index=1, uuid="GPU-1", utilisation=0.0)
    async with house(tmp_path, wedge_detector=WEDGE) as here:
        instance = await here.start(here.profile())
        instance.occupy()
        here.pool.memory.reading = Reading(0.0, (device, other))
        for _ in range(10):
            await here.keeper._end_hung()
            await trio.sleep(0.01)
        assert instance.state is State.READY
        # It may use only the one that does nothing.
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
        with trio.fail_after(20):
            while not instance.asked_to_end:
                await here.keeper._end_hung()
                await trio.sleep(0.01)
        await instance.wait_gone()


async def test_it_ticks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TICK", 0.01)
    async with house(tmp_path) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.keeper.run)
        instance = await here.start(here.profile(idle_timeout_seconds=0.05))
        with trio.fail_after(20):
            await instance.wait_gone()
        nursery.cancel_scope.cancel()
