"""Starts that fail for memory, and wishes of others that come before: on a virtual clock."""

from __future__ import annotations

import dataclasses

import pytest
import trio
from trio.testing import MockClock

from llamesh.core.capacity import Need
from llamesh.core.lifecycle import State
from llamesh.errors import Draining, ModelNotFound, SpawnFailed
from tests.support.scripted import Play, Scripted, get, profile, world

M, N, O = profile("m"), profile("n"), profile("o")  # noqa: E741


# Starts that fail for memory.


async def test_first_the_idle_leave_then_the_busy_then_its_said(autojump_clock: MockClock) -> None:
    async with world({"o": [Play(load=1, memory=True)]}) as here:
        (await get(here.dispatch, M)).release()
        busy = await get(here.dispatch, N)
        await trio.sleep(20)  # its tenure is over
        [client] = await here.clients(1, O)
        await trio.sleep(1.2)
        assert here.pool.instances(M.key) == []
        assert here.instance(N).state is State.READY
        await trio.sleep(1.3)
        assert here.instance(N).state is State.DRAINING
        await trio.sleep(5)
        assert client.waits
        busy.release()
        await trio.sleep(2)
        assert isinstance(client.error, SpawnFailed)
        assert "failed to start 3 times" in str(client.error)
        # That was in vain: it isn't done again.
        (await get(here.dispatch, M)).release()
        trouble = here.pool.trouble(O.key)
        assert trouble is not None
        await trio.sleep_until(trouble.rest_until)
        with pytest.raises(SpawnFailed):
            await get(here.dispatch, O)
        assert here.instance(M).state is State.READY
        assert here.pool.evictions == {"room": 2}


async def test_eviction_helps(autojump_clock: MockClock) -> None:
    async with world({"o": [Play(load=1, memory=True), Play()]}) as here:
        (await get(here.dispatch, M)).release()
        busy = await get(here.dispatch, N)
        (await get(here.dispatch, O)).release()
        assert here.pool.instances(M.key) == []
        assert here.instance(N).state is State.READY
        assert here.pool.trouble(O.key) is None
        busy.release()


async def test_a_changed_profile_starts_with_a_clean_slate(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(load=0, fails=True)] * 3 + [Play()]}, cookbook=[M, N]) as here:
        with pytest.raises(SpawnFailed):
            await get(here.dispatch, M)
        here.cook([M])
        with pytest.raises(SpawnFailed):
            await get(here.dispatch, M)  # something else has changed
        changed = dataclasses.replace(M, arguments=("-ngl", "0"))
        here.cook([changed])
        (await get(here.dispatch, changed)).release()


# Others' wishes.


async def test_strangers_get_their_memory(autojump_clock: MockClock) -> None:
    async with world(vram=1000) as here:
        here.needs(M, 400)
        here.needs(N, 400)
        (await get(here.dispatch, M)).release()
        lease = await get(here.dispatch, N)
        here.memory.strangers = Need(400)
        here.pool.leave_strangers_their_memory()
        assert here.pool.staying(M.key) == []
        assert here.instance(N).state is State.READY
        here.memory.strangers = Need(700)
        here.pool.leave_strangers_their_memory()
        assert lease.instance.state is State.DRAINING
        lease.release()
        await lease.instance.wait_gone()
        assert here.pool.evictions == {"strangers": 2}


async def test_who_waits_while_the_owner_comes_back_is_told(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(slots=1)]}) as here:
        lease = await get(here.dispatch, M)
        clients = await here.clients(2, M) + await here.clients(1, N)
        here.keeper.paused_until = trio.current_time() + 60
        await trio.sleep(1)
        for client in clients:
            assert isinstance(client.error, Draining)
            assert "leaves this machine to its owner: paused for another" in str(client.error)
        started = len(here.stage.started)
        await trio.sleep(10)
        assert len(here.stage.started) == started
        assert lease.instance.state is State.DRAINING  # it finishes what it has
        lease.release()
        await trio.sleep(60)
        (await get(here.dispatch, M)).release()


async def test_a_model_that_was_removed(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(slots=1)]}, cookbook=[M, N]) as here:
        lease = await get(here.dispatch, M)
        clients = await here.clients(2, M)
        here.cook([N])
        await trio.sleep(0.1)
        assert all(isinstance(client.error, ModelNotFound) for client in clients)
        assert lease.instance.state is State.DRAINING
        lease.release()
        await lease.instance.wait_gone()
        assert isinstance(lease.instance, Scripted)
        assert here.pool.evictions == {"reload": 1}
