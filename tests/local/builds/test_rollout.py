"""Moving a node to another engine, on the virtual clock with scripted instances."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import trio
import trio.testing

from llamesh.core.lifecycle import State
from llamesh.local.builds.rollout import Rollout
from llamesh.local.launch import Engine
from tests.support.scripted import Client, Play, Scripted, World, get, profile, world

OLD = Engine(("none",), "configured", "0")
NEW = Engine(("new",), "configured", "1", build="b1")
NEWER = Engine(("newer",), "configured", "2", build="b2")


class ByEngine(Scripted):
    """An instance that fails to start on some engines: `fails` has profile keys by version."""

    fails: ClassVar[dict[str, set[str]]] = {}

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.profile.key in self.fails.get(self.engine.version, set()):
            self.play = replace(self.play, fails=True)


@asynccontextmanager
async def moving(
    plays: dict[str, list[Play]] | None = None, *, fails: dict[str, set[str]] | None = None, **more: Any
) -> AsyncIterator[tuple[World, Rollout]]:
    kind = type("Failing", (ByEngine,), {"fails": fails or {}})
    async with world(plays, instance_type=kind, **more) as here:
        rollout = Rollout(here.pool)
        here.nursery.start_soon(rollout.run)
        yield here, rollout


async def serve(here: World, name: str, seconds: float = 0.0) -> str:
    """One request; the version of the engine that served it."""
    lease = await get(here.dispatch, profile(name))
    await trio.sleep(seconds)
    lease.release()
    return lease.instance.engine.version


def running(here: World) -> dict[str, str]:
    return {i.profile.model: i.engine.version for i in here.pool.all() if i.state is State.READY}


async def test_idle_instances_go_and_new_ones_run_the_new_engine(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with moving() as (here, rollout):
        assert [await serve(here, name) for name in "ab"] == ["0", "0"]
        rollout.begin(NEW)
        assert rollout.on_trial
        # Nothing of the new one has served, and the old one still does: that is what is reported.
        assert here.pool.engine is here.pool.engine
        assert here.pool.engine.version == "0"
        await trio.sleep(8)
        assert running(here) == {}
        assert here.pool.engine is NEW
        assert await serve(here, "a") == "1"
        assert not rollout.on_trial
        assert here.pool.evictions["engine"] == 2


async def test_one_by_one_and_the_next_when_the_replacement_is_ready(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Three models with waiters: never is more than one of them out of service."""
    plays = {name: [Play(load=3.0)] for name in "abc"}
    async with moving(plays) as (here, rollout):
        for name in "abc":
            await serve(here, name)
        served: list[str] = []

        async def ask_on(name: str) -> None:
            for _ in range(12):
                served.append(await serve(here, name, 0.5))
                await trio.sleep(0.5)

        async with trio.open_nursery() as nursery:
            for name in "abc":
                nursery.start_soon(ask_on, name)
            await trio.sleep(1)
            rollout.begin(NEW)
            while set(running(here).values()) != {"1"} or len(running(here)) < 3:
                assert len(running(here)) >= 2, "two are out of service at once"
                await trio.sleep(0.05)
        assert len(served) == 36
        assert sum(here.pool.evictions.values()) == 3


async def test_a_busy_one_finishes_first(autojump_clock: trio.testing.MockClock) -> None:
    async with moving() as (here, rollout):
        lease = await get(here.dispatch, profile("a"))
        await serve(here, "b")
        rollout.begin(NEW)
        await trio.sleep(3)
        # The idle one has left, the busy one is on its way out and takes nothing new.
        assert [(i.profile.model, i.state) for i in here.pool.all()] == [("a", State.DRAINING)]
        waiter = Client(here, profile("a"))
        await trio.sleep(30)
        assert waiter.waits
        lease.release()
        await trio.sleep(3)
        assert waiter.lease is not None
        assert waiter.lease.instance.engine is NEW
        waiter.lease.release()


async def test_the_same_engine_drains_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with moving() as (here, rollout):
        await serve(here, "a")
        rollout.begin(Engine(("none",), "configured", "0"))
        await trio.sleep(10)
        assert running(here) == {"a": "0"}
        assert not rollout.on_trial


async def test_one_that_can_not_start_anything_is_taken_back(autojump_clock: trio.testing.MockClock) -> None:
    async with moving(fails={"1": {"a:default"}}) as (here, rollout):
        rejected: list[tuple[Engine, str]] = []
        rollout.on_rejected = lambda engine, why: rejected.append((engine, why))
        await serve(here, "a")
        await serve(here, "b")
        rollout.begin(NEW)
        await trio.sleep(0.15)
        # The request that tries the new one in vain is served by the old one all the same.
        assert await serve(here, "a") == "0"
        assert [(engine.version, "as told" in why) for engine, why in rejected] == [("1", True)]
        assert rollout.target.version == "0"
        await trio.sleep(10)
        assert here.pool.engine.version == "0"
        assert await serve(here, "b") == "0"
        # A further one has its own trial.
        rollout.begin(NEWER)
        await trio.sleep(5)
        assert await serve(here, "a") == "2"
        assert not rollout.on_trial


async def test_a_model_that_fails_everywhere_is_no_reason(autojump_clock: trio.testing.MockClock) -> None:
    async with moving(fails={"0": {"a:default"}, "1": {"a:default"}}) as (here, rollout):
        rollout.on_rejected = lambda engine, why: pytest.fail(why)
        rollout.begin(NEW)
        client = Client(here, profile("a"))
        await trio.sleep(30)
        assert client.error is not None
        assert rollout.target is NEW
        assert await serve(here, "b") == "1"
        assert not rollout.on_trial


async def test_once_it_serves_a_failure_is_the_model_s(autojump_clock: trio.testing.MockClock) -> None:
    async with moving(fails={"1": {"a:default"}}) as (here, rollout):
        rollout.on_rejected = lambda engine, why: pytest.fail(why)
        rollout.begin(NEW)
        assert await serve(here, "b") == "1"
        client = Client(here, profile("a"))
        await trio.sleep(30)
        assert client.error is not None
        assert rollout.target is NEW


async def test_without_a_second_try_the_doubt_passes(autojump_clock: trio.testing.MockClock) -> None:
    """Who wanted the model that failed has left: others aren't kept from the new engine for ever."""
    async with moving(fails={"1": {"a:default"}}) as (here, rollout):
        rollout.begin(NEW)
        client = Client(here, profile("a"))
        await trio.sleep(0.9)
        while not here.stage.started or here.stage.started[0].state is not State.GONE:
            await trio.sleep(0.005)
        client.scope.cancel()
        await trio.sleep(0.01)
        assert await serve(here, "b") == "0"
        await trio.sleep(300)
        assert await serve(here, "c") == "1"


async def test_two_moves_in_a_row(autojump_clock: trio.testing.MockClock) -> None:
    async with moving({"a": [Play(leaves=5.0)]}) as (here, rollout):
        await serve(here, "a")
        rollout.begin(NEW)
        await trio.sleep(1)
        rollout.begin(NEWER)
        assert await serve(here, "a") == "2"
        assert [one.engine.version for one in here.stage.started] == ["0", "2"]
        await trio.sleep(10)
        assert here.pool.engine is NEWER


async def test_back_to_the_one_that_serves(autojump_clock: trio.testing.MockClock) -> None:
    """What is asked for is what runs: nothing is drained for it."""
    async with moving({"a": [Play(load=1.0)]}) as (here, rollout):
        lease = await get(here.dispatch, profile("b"))
        await serve(here, "a")
        rollout.begin(NEW)
        rollout.begin(Engine(("none",), "configured", "0"))
        await trio.sleep(10)
        assert running(here) == {"a": "0", "b": "0"}
        assert not rollout.on_trial
        lease.release()


async def test_warm_instances_are_replaced(autojump_clock: trio.testing.MockClock) -> None:
    warm = profile("a", min_instances=1)
    async with moving(cookbook=[warm]) as (here, rollout):
        await trio.sleep(3)
        assert running(here) == {"a": "0"}
        rollout.begin(NEW)
        await trio.sleep(5)
        assert running(here) == {"a": "1"}
        assert here.pool.engine is NEW
