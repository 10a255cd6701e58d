"""Queues, deadlines, refusals: one situation a test, on a virtual clock."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.core.lifecycle import State
from llamesh.errors import QueueFull, QueueTimeout, SpawnFailed
from tests.support.scripted import Play, ask, get, profile, world

M = profile()
N = profile("n")


async def test_first_come_first_served(autojump_clock: MockClock) -> None:
    async with world() as here:
        clients = await here.clients(5, M)
        assert here.dispatch.queue_length("m:default") == here.dispatch.queue_length() == 5
        for number, client in enumerate(clients):
            await trio.sleep(2)
            assert here.order == clients[: number + 1]
            assert client.lease is not None
            client.lease.release()
        assert len(here.stage.started) == 1


async def test_as_many_at_once_as_the_instance_reports(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(slots=3)]}) as here:
        clients = await here.clients(4, M)
        await trio.sleep(2)
        assert [client.waits for client in clients] == [False, False, False, True]
        assert here.dispatch.take(ask(M)) is None
        assert clients[1].lease is not None
        clients[1].lease.release()
        clients[1].lease.release()  # a second time does nothing
        await trio.sleep(0)
        await trio.testing.wait_all_tasks_blocked()
        assert here.instance(M).busy_slots == 3
        for client in clients:
            assert client.lease is not None
            client.lease.release()


async def test_a_configured_maximum_below_what_is_reported(autojump_clock: MockClock) -> None:
    limit = {"max_concurrent_requests_per_instance": 2}
    async with world({"m": [Play(slots=8)]}, model_defaults=limit) as here:
        clients = await here.clients(3, M)
        await trio.sleep(2)
        assert [client.waits for client in clients] == [False, False, True]
        clients[2].scope.cancel()
        for client in clients[:2]:
            assert client.lease is not None
            client.lease.release()


async def test_nobody_overtakes_those_who_wait(autojump_clock: MockClock) -> None:
    async with world() as here:
        lease = await get(here.dispatch, M)
        [waiting] = await here.clients(1, M)
        lease.release()  # the slot is the waiter's from now on, though it hasn't run yet
        assert here.dispatch.take(ask(M)) is None
        await trio.sleep(1)
        assert waiting.lease is not None
        waiting.lease.release()
        second = here.dispatch.take(ask(M))
        assert second is not None
        second.release()


async def test_a_lease_that_nobody_came_for_goes_to_the_next(autojump_clock: MockClock) -> None:
    async with world() as here:
        lease = await get(here.dispatch, M)
        first, second = await here.clients(2, M)
        first.scope.cancel()
        lease.release()  # granted to the first, who is about to leave
        await trio.sleep(1)
        assert first.waits
        assert second.lease is not None
        second.lease.release()
        assert here.instance(M).busy_slots == 0


async def test_instances_for_all_who_wait(autojump_clock: MockClock) -> None:
    several_allowed = profile(max_instances=3)
    async with world({"m": [Play(slots=2)]}) as here, trio.open_nursery() as nursery:

        async def hold() -> None:
            lease = await get(here.dispatch, several_allowed)
            await trio.sleep(10)
            lease.release()

        here.learned.of("m:default").n_slots = 2
        for _ in range(3):
            nursery.start_soon(hold)
        await trio.sleep(0.5)
        assert len(here.pool.instances("m:default")) == 2
        for _ in range(6):
            nursery.start_soon(hold)
        await trio.sleep(2)
        assert [one.busy_slots for one in here.pool.instances("m:default")] == [2, 2, 2]
        assert here.dispatch.queue_length() == 3


# Limits.


async def test_queue_limits(autojump_clock: MockClock) -> None:
    short = profile(max_queue_size=2)
    async with world({"m": [Play(load=5)]}, max_total_queue_entries=3) as here:
        clients = await here.clients(2, short)
        with pytest.raises(QueueFull, match=r"queue of m:default on node node-a is full \(2 wait\)"):
            here.dispatch.join(ask(short))
        clients += await here.clients(1, N)
        with pytest.raises(QueueFull, match="3 requests waiting"):
            here.dispatch.join(ask(N))
        assert here.dispatch.queue_length() == 3
        for client in clients:
            client.scope.cancel()
    assert here.stats.profile("m:default").starts_total == 1


async def test_default_queue_limit(autojump_clock: MockClock) -> None:
    async with world(model_defaults={"max_queue_size_per_model": 1}) as here:
        [client] = await here.clients(1, M)
        with pytest.raises(QueueFull):
            here.dispatch.join(ask(M))
        client.scope.cancel()


# Deadlines.


@pytest.mark.parametrize("limit_ms", [40, 700, 20_000])
async def test_deadline_while_all_slots_are_busy(autojump_clock: MockClock, limit_ms: int) -> None:
    patient = profile(max_wait_in_queue_ms=limit_ms)
    async with world() as here:
        lease = await get(here.dispatch, patient)
        begun = trio.current_time()
        with here.dispatch.join(ask(patient)) as ticket:
            with pytest.raises(QueueTimeout, match=f"no slot within {limit_ms} ms .queued for m:def") as seen:
                await ticket.wait()
            assert here.dispatch.queue_length() == 0  # before the block is left
        assert trio.current_time() - begun == pytest.approx(limit_ms / 1000, abs=0.02)
        assert seen.value.retry_after == 5
        assert seen.value.extra == {}
        lease.release()


async def test_the_clock_stands_still_while_loading_moves(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(load=900)]}, model_defaults={"max_wait_in_queue_ms": 1000}) as here:
        begun = trio.current_time()
        lease = await get(here.dispatch, M)
        assert trio.current_time() - begun == pytest.approx(900, abs=1)
        lease.release()


async def test_the_clock_goes_on_when_loading_hangs(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(load=900, progress=False)]}) as here:
        here.learned.of("m:default").load_seconds = 100.0
        begun = trio.current_time()
        with pytest.raises(QueueTimeout) as seen:
            await get(here.dispatch, profile(max_wait_in_queue_ms=10_000))
        passed = trio.current_time() - begun
        assert 14 <= passed <= 16  # 5 s of grace, then the 10 s
        assert seen.value.extra["loading"] == {
            "model": "m",
            "state": "loading",
            "node": "node-a",
            "progress": round(passed / 100, 2),
            "eta_seconds": round(100 - passed, 1),
        }


async def test_a_guess_isnt_made_up(autojump_clock: MockClock) -> None:
    async with world() as here:
        with here.dispatch.join(ask(M)) as ticket:
            assert here.dispatch.patience.loading_info(here.instance(M)).keys() == {"model", "state", "node"}
            await trio.sleep(0.6)
            assert ticket.waiting_for == "loading m:default for 1 s"


async def test_no_deadline_at_all(autojump_clock: MockClock) -> None:
    for_ever = profile(max_wait_in_queue_ms=0)
    async with world({"m": [Play(load=5)]}) as here:
        lease = await get(here.dispatch, for_ever)
        with here.dispatch.join(ask(for_ever)) as ticket:
            assert await ticket.wait(3000) is None
            lease.release()
            second = await ticket.wait(0)
        assert second is not None
        second.release()


async def test_wait_in_pieces(autojump_clock: MockClock) -> None:
    """As the relay waits for a stream, with comments in between: the deadline is for all of it."""
    async with world(model_defaults={"max_wait_in_queue_ms": 25_000}) as here:
        lease = await get(here.dispatch, M)
        begun = trio.current_time()
        with here.dispatch.join(ask(M)) as first, here.dispatch.join(ask(M)) as second:
            assert await second.wait(10) is None
            assert first.waiting_for == "queued for m:default, 0 ahead"
            assert second.waiting_for == "queued for m:default, 1 ahead"
            assert await second.wait(10) is None
            with pytest.raises(QueueTimeout):
                await second.wait(10)
        assert trio.current_time() - begun == pytest.approx(25, abs=0.1)
        lease.release()


# Starts that fail.


async def test_three_failed_starts_and_everyone_is_told(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(load=0.1, fails=True)]}) as here:
        clients = await here.clients(3, M)
        await trio.sleep(1)
        for client in clients:
            assert isinstance(client.error, SpawnFailed)
            assert client.error.status == 503
            assert client.error.retry_after == 30
            assert client.error.message == (
                "m:default failed to start 3 times on node node-a: it crashed, as told; "
                "its last words: the last words"
            )
        assert here.stats.profile("m:default").start_failures_total == 3
        # While it rests, nobody waits and nothing is tried.
        with pytest.raises(SpawnFailed):
            here.dispatch.join(ask(M))
        assert here.dispatch.queue_length() == 0
        assert len(here.stage.started) == 3
        # Then there is a new round of three.
        await trio.sleep(2)
        with pytest.raises(SpawnFailed):
            await get(here.dispatch, M)
        assert len(here.stage.started) == 6


async def test_starts_that_fail_side_by_side_end_in_an_answer(autojump_clock: MockClock) -> None:
    """Two at a time: the last try of a round must not be lost in the first of the next."""
    many = profile(max_instances=2)
    async with world({"m": [Play(load=0.5, fails=True)]}) as here:
        clients = await here.clients(4, many)
        await trio.sleep(3)
        assert [type(client.error) for client in clients] == [SpawnFailed] * 4
        assert len(here.stage.started) == 4


async def test_rests_get_longer_up_to_a_limit(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(load=0, fails=True)]}) as here:
        rests = []
        for _ in range(7):
            with pytest.raises(SpawnFailed):
                await get(here.dispatch, M)
            trouble = here.pool.trouble("m:default")
            assert trouble is not None
            rests.append(round(trouble.rest_until - trio.current_time()))
            await trio.sleep_until(trouble.rest_until)
        assert rests == [1, 2, 4, 8, 16, 30, 30]


async def test_a_start_that_works_forgives(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(fails=True), Play(fails=True), Play()]}) as here:
        (await get(here.dispatch, M)).release()
        assert here.pool.trouble("m:default") is None
        assert here.stats.profile("m:default").start_failures_total == 2
        assert here.learned.of("m:default").load_seconds == pytest.approx(1)


async def test_waiters_of_a_serving_instance_dont_suffer_from_the_next_ones_failures(
    autojump_clock: MockClock,
) -> None:
    """A second instance may not fit on the device: the first one still serves."""
    two = profile(max_instances=2)
    async with world({"m": [Play(), Play(load=0, fails=True)]}) as here:
        lease = await get(here.dispatch, two)
        [waiting] = await here.clients(1, two)
        await trio.sleep(0.9)
        trouble = here.pool.trouble("m:default")
        assert trouble is not None
        assert trouble.exhausted
        with here.dispatch.join(ask(two)) as late:
            lease.release()
            await trio.sleep(0)
            await trio.testing.wait_all_tasks_blocked()
            assert waiting.lease is not None
            waiting.lease.release()
            lease = await late.wait(0) or lease
        lease.release()


async def test_refused_as_soon_as_the_last_hope_is_gone(autojump_clock: MockClock) -> None:
    two = profile(max_instances=2)
    async with world({"m": [Play(), Play(load=0, fails=True)]}) as here:
        lease = await get(here.dispatch, two)
        [waiting] = await here.clients(1, two)
        await trio.sleep(0.9)
        assert waiting.waits
        for one in here.pool.instances("m:default"):
            one.stop("unloaded")
        await trio.sleep(0.01)
        assert isinstance(waiting.error, SpawnFailed)
        lease.release()


async def test_a_crash_is_replaced_for_those_who_wait(autojump_clock: MockClock) -> None:
    async with world({"m": [Play(crashes_after=5), Play()]}) as here:
        lease = await get(here.dispatch, M)
        [waiting] = await here.clients(1, M)
        await trio.sleep(7)
        assert waiting.lease is not None
        assert waiting.lease.instance is not lease.instance
        assert lease.instance.state is State.GONE
        assert here.stats.profile("m:default").crashes_total == 1
        lease.release()
        waiting.lease.release()
