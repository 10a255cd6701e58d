"""Room, slots, ends and prewarming: what a dispatcher does with its instances, on a virtual clock."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.config.cookbook import Profile
from llamesh.core.lifecycle import State
from llamesh.errors import Draining, NoCapacity, SpawnFailed
from llamesh.local.ports import Ports
from llamesh.web.prewarm import Prewarm
from tests.support.scripted import Play, Scripted, World, ask, get, profile, world

M = profile()
N = profile("n")


# What can't be run.


async def test_listed_but_never_run(autojump_clock: MockClock) -> None:
    async with world() as here:
        with pytest.raises(NoCapacity, match="its max_instances is 0: it is listed, but not run"):
            await get(here.dispatch, profile(max_instances=0))
        assert here.stage.started == []


async def test_arguments_that_cant_work_are_refused_at_once_and_free_the_port(
    autojump_clock: MockClock,
) -> None:
    bad = Profile("m", "default", "", "", M.source, ("--port", "70000"))
    async with world() as here:
        with pytest.raises(SpawnFailed, match="--port needs a number"):
            await get(here.dispatch, bad)


async def test_a_port_that_becomes_free_is_noticed(autojump_clock: MockClock) -> None:
    """The port of a stranger makes no event when it gets free."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        number = stranger.getsockname()[1]
        async with world(ports=Ports([number])) as here:
            with here.dispatch.join(ask(M)) as ticket:
                assert await ticket.wait(5) is None
                assert "is used by another program; 0 ahead" in ticket.waiting_for
                stranger.close()
                lease = await ticket.wait(5)
            assert lease is not None
            lease.release()


# Room.


async def test_the_longest_idle_leaves_and_the_waiter_is_served_after_it_left(
    autojump_clock: MockClock,
) -> None:
    plays = {"m": [Play(leaves=3)], "n": [Play()], "o": [Play()]}
    async with world(plays, max_instances_per_node=2) as here:
        (await get(here.dispatch, M)).release()
        await trio.sleep(1)
        (await get(here.dispatch, N)).release()
        oldest = here.instance(M)
        [waiting] = await here.clients(1, profile("o"))
        assert oldest.state is State.STOPPING
        assert here.instance(N).state is State.READY
        with here.dispatch.join(ask(profile("o"))) as another:
            assert another.waiting_for == "waiting for m:default#1 to leave; 1 ahead"
        await trio.sleep(2.9)
        assert len(here.stage.started) == 2
        await trio.sleep(1.2)
        assert waiting.after == pytest.approx(4, abs=0.01)
        assert waiting.lease is not None
        waiting.lease.release()


async def test_busy_instances_stay_for_their_tenure_while_someone_waits_for_them(
    autojump_clock: MockClock,
) -> None:
    async with world(max_instances_per_node=1) as here:
        lease = await get(here.dispatch, M)
        clients = await here.clients(1, M) + await here.clients(1, N)
        await trio.sleep(14)
        assert here.instance(M).state is State.READY
        await trio.sleep(3)
        assert here.instance(M).state is State.DRAINING
        assert all(client.waits for client in clients)
        lease.release()
        for client in reversed(clients):
            await trio.sleep(2)
            assert client.lease is not None
            client.lease.release()


async def test_without_tenure_whoever_waits_longest_is_next(autojump_clock: MockClock) -> None:
    async with world(max_instances_per_node=1, model_defaults={"min_eviction_tenure_secs": 0}) as here:
        clients = []
        for wanted in (M, N, M, N):
            clients += await here.clients(1, wanted)
        for client in clients:
            await trio.sleep(3)
            assert client.lease is not None
            client.lease.release()
        assert here.order == clients
        assert [one.profile.key for one in here.stage.started] == ["m:default", "n:default"] * 2


async def test_idle_instances_leave(autojump_clock: MockClock) -> None:
    async with world() as here:
        short = profile(idle_timeout_seconds=10)
        (await get(here.dispatch, short)).release()
        await trio.sleep(9)
        assert here.instance(short).state is State.READY
        (await get(here.dispatch, short)).release()
        await trio.sleep(9)
        lease = await get(here.dispatch, short)
        await trio.sleep(100)
        assert here.instance(short).state is State.READY
        lease.release()
        await trio.sleep(11)
        assert here.pool.instances("m:default") == []
        (await get(here.dispatch, profile(idle_timeout_seconds=0))).release()
        await trio.sleep(1000)
        assert here.instance(M).state is State.READY


async def test_an_unloaded_instance_finishes_what_it_has(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(slots=2)]}) as here:
        first, second = await get(here.dispatch, M), await get(here.dispatch, M)
        instance = here.instance(M)
        here.pool.drain((instance.id,), "unloaded on request", cause="unload")
        assert instance.state is State.DRAINING
        assert here.dispatch.take(ask(M)) is None
        first.release()
        assert instance.state is State.DRAINING
        second.release(working=True)
        await instance.wait_gone()
        assert instance.end_reason == "unloaded on request"
        assert instance.failure is None


# Abandoned slots.


@pytest.mark.parametrize("streams", [True, False])
async def test_an_abandoned_slot_is_busy_until_llama_server_is_done_with_it(
    autojump_clock: MockClock, streams: bool
) -> None:
    async with world({"m": [Play(slots=2, work=5)]}) as here:
        lease, other = await get(here.dispatch, M, streams=streams), await get(here.dispatch, M)
        lease.release(working=True)
        assert here.instance(M).busy_slots == (1 if streams else 2)
        begun = trio.current_time()
        (await get(here.dispatch, M)).release()
        assert trio.current_time() - begun == pytest.approx(0 if streams else 6, abs=0.1)
        other.release()


@pytest.mark.parametrize("reply", [(404, {"error": {}}), (200, {"not": "a list"}), (501, None)])
async def test_without_a_slots_route_an_abandoned_slot_comes_back_anyway(
    autojump_clock: MockClock, reply: tuple[int, Any]
) -> None:
    async with world({"m": [Play(work=1000)]}) as here:
        lease = await get(here.dispatch, M, streams=False)
        instance = here.instance(M)
        instance.slots_reply = lambda: reply
        lease.release(working=True)
        assert here.dispatch.take(ask(M)) is None
        await trio.sleep(2.1)
        assert instance.busy_slots == 0


async def test_a_crash_frees_abandoned_slots(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(work=1000)]}) as here:
        lease = await get(here.dispatch, M, streams=False)
        instance = here.stage.started[0]
        lease.release(working=True)
        instance.crash.set()
        await instance.wait_gone()
        assert instance.busy_slots == 0
        (await get(here.dispatch, M)).release()


# The end.


async def test_draining_refuses_the_new_and_serves_the_old(autojump_clock: MockClock) -> None:
    async with world() as here:
        clients = await here.clients(2, M)
        here.dispatch.drained = True
        with pytest.raises(Draining, match="node-a is draining"):
            here.dispatch.join(ask(M))
        await trio.sleep(2)
        for client in clients:
            await trio.sleep(0.1)
            assert client.lease is not None
            client.lease.release()
        assert here.dispatch.take(ask(M)) is None


async def test_refuse_all(autojump_clock: MockClock) -> None:
    async with world() as here:
        clients = await here.clients(2, M) + await here.clients(1, N)
        here.dispatch.refuse_all(lambda p: Draining(f"{p.key}: over"))
        await trio.sleep(0)
        await trio.testing.wait_all_tasks_blocked()
        messages = [str(client.error) for client in clients]
        assert messages == ["m:default: over", "m:default: over", "n:default: over"]


async def test_nothing_starts_once_the_pool_closes(autojump_clock: MockClock) -> None:
    """The end of an instance wakes those who wait, who must not get another one."""
    async with world() as here:
        [client] = await here.clients(1, M)
        await here.pool.close()
        await trio.sleep(5)
        assert len(here.stage.started) == 1
        assert client.waits
        client.scope.cancel()


async def test_closing_before_the_child_was_started(autojump_clock: MockClock) -> None:
    async with world() as here:
        with here.dispatch.join(ask(M)):
            await here.pool.close()
            [instance] = here.stage.started
            assert instance.state is State.GONE


# Prewarming.


@pytest.fixture
async def prewarmed(nursery: trio.Nursery) -> Callable[[World], Any]:
    async def make(here: World) -> Prewarm:
        prewarm = Prewarm(here.pool, here.dispatch)
        await nursery.start(prewarm.serve)
        return prewarm

    return make


async def test_prewarm(autojump_clock: MockClock, prewarmed: Callable[[World], Any]) -> None:
    async with world() as here:
        prewarm = await prewarmed(here)
        assert await prewarm.run(M, wait=False) == {"model": "m", "status": "loading"}
        assert await prewarm.run(M, wait=True) == {"model": "m", "status": "loaded"}
        assert await prewarm.run(M, wait=False) == {"model": "m", "status": "loaded"}
        assert len(here.stage.started) == 1
        await trio.testing.wait_all_tasks_blocked()
        assert here.instance(M).busy_slots == 0


async def test_prewarm_is_done_when_the_model_is_there_though_others_keep_it_busy(
    autojump_clock: MockClock, prewarmed: Callable[[World], Any]
) -> None:
    async with world() as here:
        clients = await here.clients(2, M)
        assert await (await prewarmed(here)).run(M, wait=True) == {"model": "m", "status": "loaded"}
        await trio.testing.wait_all_tasks_blocked()
        assert clients[0].lease is not None
        assert clients[1].waits
        clients[1].scope.cancel()
        clients[0].lease.release()


async def test_prewarm_says_at_once_what_is_wrong(
    autojump_clock: MockClock, prewarmed: Callable[[World], Any]
) -> None:
    async with world({"m": [Play(fails=True)]}) as here:
        prewarm = await prewarmed(here)
        with pytest.raises(SpawnFailed):
            await prewarm.run(M, wait=True)
        with pytest.raises(SpawnFailed):
            await prewarm.run(M, wait=False)
        assert (await prewarm.run(N, wait=False))["status"] == "loading"
        here.dispatch.drained = True
        with pytest.raises(Draining):
            await prewarm.run(profile("o"), wait=False)
        await trio.sleep(3)
    assert isinstance(here.stage.started[0], Scripted)
