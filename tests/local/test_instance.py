"""One child at a time: how it starts, what is learned from it, how it serves and how it ends."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
import trio

from llamesh.config.cookbook import ModelPath, Profile
from llamesh.core.lifecycle import State
from llamesh.local.instance import RECLAIM_INTERVAL, Instance
from llamesh.net.exchange import UpstreamBroken
from tests.support.children import exchange, fake, local, request
from tests.support.fake import launches


def child_of(instance: Instance) -> psutil.Process:
    assert instance.child is not None
    return psutil.Process(instance.child.pid)


async def test_a_real_engine(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    arguments = ("-np", "2", "-c", "512")
    profile = Profile("tiny", "default", "", "", ModelPath(str(tiny_model)), arguments)
    async with local(tmp_path, binary=engine_binary) as here:
        status, document = await here.complete(profile)
        assert status == 200
        assert document["usage"]["completion_tokens"] == 3
        [instance] = here.pool.instances("tiny:default")
        assert instance.state is State.READY
        assert instance.slots == 2
        assert instance.facts.n_ctx_slot == 256
        assert instance.facts.n_ctx_train == 8192
        assert here.learned.of("tiny:default").n_slots == 2
        assert here.learned.of("tiny:default").context_length == 256
        assert here.stats.profile("tiny:default").load_seconds > 0
        process = child_of(instance)
        instance.stop("test")
        await instance.wait_gone()
        assert instance.failure is None
        assert not process.is_running()


async def test_properties_are_learned_from_routes(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        instance = here.pool.spawn(fake(tmp_path, slots=3, n_ctx=9000))
        assert instance.state is State.STARTING
        assert instance.free_slots == 0
        await here.until_ready(instance)
        assert (instance.slots, instance.facts.n_ctx_slot, instance.facts.n_ctx_train) == (3, 3000, 9000)
        assert instance.free_slots == 3


async def test_properties_are_learned_from_the_log_of_a_wrapper(tmp_path: Path) -> None:
    lines = ["starting up", "my wrapper: n_ctx = 6000, n_slots=5", "n_ctx_train = 7000 n_batch = 9"]
    async with local(tmp_path) as here:
        instance = here.pool.spawn(fake(tmp_path, slots=5, n_ctx=6000, no_props_route=True, lines=lines))
        await here.until_ready(instance)
        assert instance.slots == 5
        assert instance.facts.n_ctx == 6000
        assert instance.facts.n_ctx_train == 7000


async def test_a_server_that_closes_after_each_answer_is_asked_all_the_same(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        profile = fake(tmp_path, slots=4, close_after=1)
        instance = here.pool.spawn(profile)
        await here.until_ready(instance)
        assert instance.slots == 4
        assert instance.facts.n_ctx_train == 4096


async def test_a_start_without_progress_is_given_up(tmp_path: Path) -> None:
    """Its log lines about our own questions are no progress."""
    profile = dataclasses.replace(fake(tmp_path, never_ready=True), startup_timeout_seconds=1.0)
    async with local(tmp_path) as here:
        instance = here.pool.spawn(profile)
        await here.until(lambda: instance.state is State.GONE, "gone")
        assert instance.failure is not None
        assert "not ready after 1 s without progress" in str(instance.failure)
        assert not instance.was_ready
        assert here.stats.profile("m:default").start_failures_total == 1


async def test_log_lines_are_progress(tmp_path: Path) -> None:
    """A slow load that tells of its stages outlives the timeout."""
    script = tmp_path / "wrapper"
    done = tmp_path / "done"
    script.write_text(
        f"#!{sys.executable}\nimport sys, time, os\n"
        f"for n in range(8):\n    print('stage', n, flush=True); time.sleep(0.2)\n"
        f"open({str(done)!r}, 'w').close()\ntime.sleep(600)\n"
    )
    script.chmod(0o755)
    profile = dataclasses.replace(fake(tmp_path), startup_timeout_seconds=0.5)
    async with local(tmp_path, binary=script) as here:
        done.unlink(missing_ok=True)
        instance = here.pool.spawn(profile)
        await here.until(lambda: instance.state is State.GONE, "gone")
        assert done.exists()
        assert instance.failure is not None
        assert instance.failure.last_words.endswith("stage 7")


async def test_an_exit_at_start_has_last_words(tmp_path: Path) -> None:
    ending = {"code": 7, "lines": ["loading", "cudaMalloc failed: out of memory"]}
    async with local(tmp_path) as here:
        instance = here.pool.spawn(fake(tmp_path, exit_at_start=ending))
        await here.until(lambda: instance.state is State.GONE, "gone")
        assert str(instance.failure) == (
            "llama-server ended with exit code 7 before it was ready; its last words: "
            "loading\ncudaMalloc failed: out of memory"
        )


async def test_a_missing_model_file_starts_nothing(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        instance = here.pool.spawn(Profile("m", "default", "", "", ModelPath(str(tmp_path / "none.gguf"))))
        await here.until(lambda: instance.state is State.GONE, "gone")
        assert str(instance.failure) == f"there is no model file {tmp_path / 'none.gguf'}"
        assert instance.child is None


async def test_an_engine_that_went_away(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        here.pool.start_with(dataclasses.replace(here.pool.engine, command=(str(tmp_path / "gone"),)))
        instance = here.pool.spawn(fake(tmp_path))
        await here.until(lambda: instance.state is State.GONE, "gone")
        assert "can't start" in str(instance.failure)


async def test_the_key_isnt_in_the_arguments_and_is_asked_for(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        instance = here.pool.spawn(fake(tmp_path))
        await here.until_ready(instance)
        key = instance.authorization.removeprefix(b"Bearer ").decode()
        assert len(key) >= 32
        process = child_of(instance)
        assert key not in " ".join(process.cmdline())
        assert key not in repr(instance) + repr(instance.launch)
        connection = await instance.connect()
        await connection.send(request(instance, {}).replace(key.encode(), b"x" * len(key)))
        while not connection.response.complete:
            await connection.read()
        assert connection.response.status == 401
        connection.close()
        another = here.pool.spawn(fake(tmp_path, "n"))
        assert another.authorization != instance.authorization


async def test_the_profiles_own_key(tmp_path: Path) -> None:
    profile = dataclasses.replace(fake(tmp_path), api_key="mine-and-secret")
    async with local(tmp_path) as here:
        status, _ = await here.complete(profile)
        assert status == 200
        [instance] = here.pool.instances("m:default")
        assert instance.authorization == b"Bearer mine-and-secret"
        assert "mine-and-secret" not in " ".join(child_of(instance).cmdline())


async def test_connections_are_reused_and_given_up_before_the_server_does(tmp_path: Path) -> None:
    profile = fake(tmp_path)
    async with local(tmp_path) as here:
        for _ in range(5):
            assert (await here.complete(profile))[0] == 200
        [instance] = here.pool.instances("m:default")
        _, stats = await instance.ask("/__fake/stats")
        assert stats["connections"] == 1
        kept = instance.idle_connection()
        assert kept is not None
        assert kept.idle_limit == 4.0  # it said 5 s
        instance.keep(kept)
        kept.idle_since -= 4.0
        instance.close_stale_connections()
        assert instance.idle_connection() is None
        # Not yet swept is as good.
        assert (await here.complete(profile))[0] == 200
        kept = instance.idle_connection()
        assert kept is not None
        instance.keep(kept)
        kept.idle_since -= 4.0
        assert instance.idle_connection() is None


async def test_answers_that_arent(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        instance = here.pool.spawn(fake(tmp_path, no_props_route=True))
        await here.until_ready(instance)
        assert await instance.ask("/props") == (200, None)  # the fake echoes what it doesn't know
        instance.stop("test")
        await instance.wait_gone()
        with pytest.raises(UpstreamBroken, match="m:default#1 doesn't accept connections"):
            await instance.ask("/health")


async def test_a_child_that_dies_between_choice_and_connection(tmp_path: Path) -> None:
    profile = fake(tmp_path)
    async with local(tmp_path) as here:
        lease = await here.lease(profile)
        os.kill(child_of(lease.instance).pid, signal.SIGKILL)
        await lease.instance.wait_gone()
        with pytest.raises(UpstreamBroken):
            await lease.connect(fresh=True)
        lease.release()
        assert lease.instance.busy_slots == 0
        assert str(lease.instance.failure).startswith("llama-server was ended by signal 9 while serving")
        assert here.stats.profile("m:default").crashes_total == 1
        assert (await here.complete(profile))[0] == 200


async def test_a_crash_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    profile = fake(tmp_path, die_after_requests=1)
    async with local(tmp_path) as here:
        assert (await here.complete(profile))[0] == 200
        with pytest.raises(UpstreamBroken):
            await here.complete(profile)
        await here.until(lambda: here.stats.profile("m:default").crashes_total == 1, "crash counted")
        assert (await here.complete(profile))[0] == 200
        assert len(launches(Path(str(tmp_path / "m.json")))) == 2
        trouble = here.pool.trouble("m:default")
        assert trouble is not None
        assert (trouble.crashes, trouble.failures) == (1, 0)
        assert not here.pool.resting("m:default")


async def test_draining_waits_for_leases(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        lease = await here.lease(fake(tmp_path))
        instance = lease.instance
        instance.drain("test")
        instance.drain("again")
        connection = await lease.connect()
        assert (await exchange(connection, instance, {}))[0] == 200
        assert child_of(instance).is_running()
        lease.release(connection, complete=True)
        await instance.wait_gone()
        assert (instance.failure, instance.end_reason) == (None, "test")


@pytest.mark.parametrize("path", ["busy", "silent"])
async def test_an_abandoned_slot_is_free_when_the_server_says_so(tmp_path: Path, path: str) -> None:
    """Also when someone else keeps the server busy meanwhile."""
    gate = tmp_path / "gate"
    async with local(tmp_path) as here:
        profile = fake(tmp_path, slots=2)
        lease = await here.lease(profile)
        instance = lease.instance
        other = await here.lease(profile) if path == "busy" else None
        busy = 1 if other else 0
        if other:
            beside = await other.connect()
            await beside.send(request(instance, {"stream": True, "fake": {"head_gate": str(tmp_path / "x")}}))
        connection = await lease.connect(fresh=True)
        await connection.send(request(instance, {"fake": {"head_gate": str(gate)}}))
        await here_is_working(instance, 1 + busy)
        lease.release(connection, working=True)
        with trio.move_on_after(RECLAIM_INTERVAL * 1.5):
            while instance.busy_slots > busy:
                await trio.sleep(0.05)
        assert instance.busy_slots == 1 + busy
        gate.touch()
        await here.until(lambda: instance.busy_slots == busy, "the slot is free")
        if other:
            other.release(beside)


async def here_is_working(instance: Instance, count: int) -> None:
    with trio.fail_after(20):
        while True:
            _, slots = await instance.ask("/slots")
            if sum(slot["is_processing"] for slot in slots) == count:
                return
            await trio.sleep(0.01)
