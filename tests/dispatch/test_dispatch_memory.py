"""Models that can't be loaded side by side: who makes way for whom, and when. On a virtual clock."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from llamesh.config.cookbook import Profile
from llamesh.core.capacity import Need
from llamesh.core.lifecycle import State
from llamesh.errors import NoCapacity, QueueTimeout
from tests.support.scripted import Play, World, get, profile, world

M, N, O = profile("m"), profile("n"), profile("o")  # noqa: E741
TENURE = 15.0


async def keep_asking(here: World, wanted: Profile, *, seconds: float, until: float) -> int:
    """A client that asks again as soon as it has an answer; how many it got."""
    answers = 0
    while trio.current_time() < until:
        lease = await get(here.dispatch, wanted)
        await trio.sleep(seconds)
        lease.release()
        answers += 1
    return answers


async def test_two_models_under_constant_load_alternate_in_batches(autojump_clock: MockClock) -> None:
    plays = {"m": [Play(load=2, slots=2)], "n": [Play(load=3, leaves=0.5)]}
    async with world(plays, vram=1000) as here:
        here.needs(M, 700)
        here.needs(N, 600)
        end = trio.current_time() + 600
        answers = {"m": 0, "n": 0}

        async def ask(wanted: Profile) -> None:
            got = await keep_asking(here, wanted, seconds=1.0, until=end)
            answers[wanted.model] += got

        async with trio.open_nursery() as clients:
            for wanted in (M, M, M, M, N, N, N):
                clients.start_soon(ask, wanted)
        starts = here.stage.started
        # Strictly in turns; each serves for its tenure, and not much longer.
        assert all(one.profile is not other.profile for one, other in pairwise(starts))
        for one, other in pairwise(starts[:-1]):
            served = other.created - one.created - one.ready_after
            assert TENURE <= served <= TENURE + 3
        assert 28 <= len(starts) <= 36  # swaps in 10 minutes: 15 s each, and 2 to 3 s to load
        assert answers["m"] > 2 * 15 * 14
        assert answers["n"] > 15 * 13


async def test_room_that_was_made_goes_to_whom_it_was_made_for(autojump_clock: MockClock) -> None:
    """Those who wait for the evicted one came first; it would be back at once."""
    async with world(vram=1000) as here:
        here.needs(M, 1000)
        here.needs(N, 1000)
        lease = await get(here.dispatch, M)
        old = await here.clients(3, M)
        [new] = await here.clients(1, N)
        await trio.sleep(TENURE + 1)
        assert here.instance(M).state is State.DRAINING
        lease.release()
        await trio.sleep(1.5)
        assert new.lease is not None
        assert [one.profile.model for one in here.stage.started] == ["m", "n"]
        new.lease.release()
        for client in old:
            await trio.sleep(2)
            assert client.lease is not None
            client.lease.release()


async def test_a_big_model_isnt_starved_by_small_ones(autojump_clock: MockClock) -> None:
    """They leave one after the other: what each leaves must add up, and not go to its own queue."""
    big, small = profile("big"), [profile(f"s{n}") for n in range(3)]
    async with world({f"s{n}": [Play(leaves=n)] for n in range(3)}, vram=900) as here:
        here.needs(big, 900)
        for one in small:
            here.needs(one, 300)
        end = trio.current_time() + 200
        served: list[float] = []

        async def ask(wanted: Profile) -> None:
            await keep_asking(here, wanted, seconds=1.0, until=end)

        async def ask_big() -> None:
            for _ in range(3):
                begun = trio.current_time()
                lease = await get(here.dispatch, big)
                served.append(trio.current_time() - begun)
                lease.release()

        async with trio.open_nursery() as clients:
            for one in [*small, *small]:
                clients.start_soon(ask, one)
            await trio.sleep(5)
            clients.start_soon(ask_big)
        assert len(served) == 3
        assert max(served) < TENURE + 6


async def test_what_leaves_beside_promised_room_is_for_everyone(autojump_clock: MockClock) -> None:
    async with world(vram=1000) as here:
        here.needs(M, 600)
        here.needs(N, 800)
        here.needs(O, 200)
        lease = await get(here.dispatch, M)
        await trio.sleep(20)  # its tenure is over
        [waiting] = await here.clients(1, N)
        assert here.instance(M).state is State.DRAINING
        other = await get(here.dispatch, O)  # 600 + 200 now, 800 + 200 then
        [queued] = await here.clients(1, O)  # so that it has a tenure
        p = profile("p", max_wait_in_queue_ms=5000)
        here.needs(p, 200)
        with pytest.raises(
            QueueTimeout, match=r"no slot within 5000 ms \(waiting for room: n:default .*loading"
        ):
            await get(here.dispatch, p)  # 600 + 200 + 200 would do now, but not then
        lease.release()
        await trio.sleep(2)
        assert waiting.lease is not None
        waiting.lease.release()
        queued.scope.cancel()
        await trio.sleep(0.1)
        other.release()


# Waiters who leave.


async def test_a_drain_is_dropped_when_the_waiter_leaves(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(slots=2)]}, vram=1000) as here:
        here.needs(M, 800)
        here.needs(N, 800)
        lease = await get(here.dispatch, M)
        await trio.sleep(20)  # its tenure is over
        clients = await here.clients(2, N)
        instance = here.instance(M)
        assert here.instance(M).state is State.DRAINING
        queued = await here.clients(1, M)
        assert queued[0].waits
        clients[0].scope.cancel()
        await trio.sleep(1)
        assert here.instance(M).state is State.DRAINING  # there is another one
        clients[1].scope.cancel()
        await trio.sleep(0.1)
        assert here.instance(M).state is State.READY
        assert instance.end_reason == ""
        assert queued[0].lease is not None
        queued[0].lease.release()
        lease.release()
        await trio.sleep(1)
        assert len(here.stage.started) == 1


async def test_a_drain_for_good_wins(autojump_clock: MockClock) -> None:
    async with world(vram=1000, cookbook=[M, N]) as here:
        here.needs(M, 800)
        here.needs(N, 800)
        lease = await get(here.dispatch, M)
        [client] = await here.clients(1, N)
        instance = here.instance(M)
        here.cook([dataclasses.replace(M, arguments=("-c", "1")), N])
        client.scope.cancel()
        await trio.sleep(1)
        assert instance.state is State.DRAINING  # it runs what the cookbook doesn't say any more
        lease.release()
        await instance.wait_gone()


async def test_an_abandoned_slot_stays_busy_over_a_drain_that_was_dropped(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(slots=2, work=30)]}, vram=1000) as here:
        here.needs(M, 800)
        here.needs(N, 800)
        first = await get(here.dispatch, M, streams=False)
        second = await get(here.dispatch, M, streams=False)
        [client] = await here.clients(1, N)
        first.release(working=True)
        client.scope.cancel()
        await trio.sleep(0.1)
        assert here.instance(M).state is State.READY
        assert here.instance(M).busy_slots == 2
        second.release()


# Who is safe.


async def test_one_that_has_just_loaded_serves_those_it_was_loaded_for(autojump_clock: MockClock) -> None:
    """Also where nobody is safe, and someone who came earlier waits for its room."""
    async with world(
        {"m": [Play(load=5)]}, vram=1000, model_defaults={"min_eviction_tenure_secs": 0}
    ) as here:
        here.needs(M, 800)
        here.needs(N, 800)
        here.memory.look_seconds = 1.0
        [n] = await here.clients(1, N)  # its size isn't known yet
        here.memory._looked.add(M.key)
        [m] = await here.clients(1, M)
        await trio.sleep(6)
        assert m.lease is not None
        assert n.waits
        m.lease.release()
        await trio.sleep(2)
        assert n.lease is not None
        n.lease.release()


async def test_an_instance_more_isnt_worth_anyones_busy_one(autojump_clock: MockClock) -> None:
    """Nor its own."""
    two = profile(max_instances=2)
    async with world(vram=1000) as here:
        here.needs(two, 500)
        here.needs(N, 500)
        here.needs(O, 900)
        leases = [await get(here.dispatch, two), await get(here.dispatch, N)]
        clients = await here.clients(2, two) + await here.clients(1, N)
        await trio.sleep(40)
        assert [one.state for one in here.pool.all()] == [State.READY] * 2
        for lease in leases:
            lease.release()
        for client in clients:
            await trio.sleep(3)
            assert client.lease is not None
            client.lease.release()
        assert here.pool.evictions.total() <= 1  # an idle one, by the end


async def test_what_can_never_fit_evicts_nobody(autojump_clock: MockClock) -> None:
    async with world(vram=1000) as here:
        here.needs(M, 600)
        here.needs(N, 1001)
        here.needs(O, 600)
        (await get(here.dispatch, M)).release()
        with pytest.raises(NoCapacity, match="needs about 1001 MiB of GPU memory; 1000 MiB may be used here"):
            await get(here.dispatch, N)
        here.memory.strangers = Need(500)
        with pytest.raises(
            NoCapacity, match="needs about 600 MiB of GPU memory; other programs leave 500 MiB"
        ):
            await get(here.dispatch, O)
        assert here.instance(M).state is State.READY
        assert here.pool.evictions.total() == 0


async def test_what_is_kept_loaded_says_so(autojump_clock: MockClock) -> None:
    warm, late = profile(min_instances=1), profile("n", max_wait_in_queue_ms=2000)
    async with world(vram=1000, cookbook=[warm, late]) as here:
        here.needs(warm, 600)
        here.needs(late, 600)
        await trio.sleep(2)
        assert here.instance(warm).state is State.READY
        with pytest.raises(QueueTimeout, match=r"kept loaded \(min_instances\): m:default#1; 0 ahead"):
            await get(here.dispatch, late)
        assert here.pool.evictions.total() == 0


async def test_of_two_only_those_above_the_minimum_leave(autojump_clock: MockClock) -> None:
    warm = profile(min_instances=1, max_instances=2)
    async with world(cookbook=[warm], max_instances_per_node=2) as here:
        leases = []
        async with trio.open_nursery() as nursery:

            async def take() -> None:
                leases.append(await get(here.dispatch, warm))

            nursery.start_soon(take)
            nursery.start_soon(take)
        for lease in leases:
            lease.release()
        first = await get(here.dispatch, N)
        [second] = await here.clients(1, O)
        assert len(here.pool.staying(warm.key)) == 1
        first.release()
        await trio.sleep(2)
        assert second.lease is not None
        second.lease.release()
        assert len(here.pool.staying(warm.key)) == 1


async def test_embeddings_go_to_the_cpu_and_evict_text_only_when_they_must(autojump_clock: MockClock) -> None:
    small = profile("e", kind="embedding")
    async with world(vram=1000, sysmem=500) as here:
        here.needs(M, 900)
        here.needs(small, 200, cpu_only=300)
        (await get(here.dispatch, M)).release()
        lease = await get(here.dispatch, small)
        assert lease.instance.on_cpu
        assert lease.instance.need == Need(0, 300)
        lease.release()
        assert here.instance(M).state is State.READY
        huge = profile("h", kind="rerank")
        here.needs(huge, 200, cpu_only=501)
        lease = await get(here.dispatch, huge)
        assert not lease.instance.on_cpu
        assert here.pool.instances(M.key) == []
        lease.release()
