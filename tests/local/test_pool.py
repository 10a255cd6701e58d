"""Several children, and a whole node that is killed: what starts, what ends, what is left."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import psutil
import pytest
import trio

from llamesh.core.lifecycle import State
from llamesh.errors import QueueTimeout, SpawnFailed
from llamesh.local.ports import NoFreePort, Ports
from tests.support.children import fake, local
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.node import running_node


async def test_a_child_that_never_starts_is_tried_three_times(tmp_path: Path) -> None:
    ending = {"code": 1, "lines": ["error: invalid magic"]}
    async with local(tmp_path) as here:
        with pytest.raises(SpawnFailed, match=r"(?s)failed to start 3 times on node node-a: .*invalid magic"):
            await here.complete(fake(tmp_path, exit_at_start=ending))
    assert len(launches(tmp_path / "m.json")) == 3


async def test_the_second_try_works(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        status, _ = await here.complete(fake(tmp_path, launches=[{"exit_at_start": {"code": 1}}, {}]))
        assert status == 200
        assert here.stats.profile("m:default").starts_total == 2
        assert here.pool.trouble("m:default") is None


async def test_idle_children_leave(tmp_path: Path) -> None:
    profile = dataclasses.replace(fake(tmp_path), idle_timeout_seconds=0.6)
    async with local(tmp_path) as here:
        lease = await here.lease(profile)
        [pid] = launches(tmp_path / "m.json")
        with trio.move_on_after(1.2):  # in use isn't idle
            await lease.instance.wait_gone()
        assert lease.instance.state is State.READY
        lease.release()
        await here.until(lambda: not psutil.pid_exists(pid), "the child left")
        assert lease.instance.end_reason == "idle for 0.6 s"
        assert here.stats.profile("m:default").crashes_total == 0


async def test_room_is_made_for_another_model(tmp_path: Path) -> None:
    async with local(tmp_path, max_instances_per_node=1) as here:
        for name in ("a", "b", "a"):
            status, document = await here.complete(fake(tmp_path, name))
            assert (status, Path(document["model"]).stem) == (200, name)
            assert len(list(here.pool.all())) == 1


async def test_many_requests_never_exceed_the_slots(tmp_path: Path) -> None:
    profile = dataclasses.replace(fake(tmp_path, slots=3, token_delay=0.005), max_instances=1)
    async with local(tmp_path) as here:
        answers: list[int] = []

        async def one() -> None:
            answers.append((await here.complete(profile))[0])

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for _ in range(24):
                    nursery.start_soon(one)
        assert answers == [200] * 24
        [instance] = here.pool.instances("m:default")
        _, stats = await instance.ask("/__fake/stats")
        assert stats["max_running"] == 3
        assert stats["queued"] == 0


async def test_ports_come_from_the_configured_set(tmp_path: Path) -> None:
    with Ports(None).reserve() as found:
        number = found.number
    only = dataclasses.replace(fake(tmp_path), max_wait_in_queue_ms=300)
    async with local(tmp_path, ports=Ports([number])) as here:
        lease = await here.lease(only)
        assert lease.instance.launch.port == number
        with pytest.raises(NoFreePort, match=f"{number} is used by m:default"):
            here.pool.spawn(fake(tmp_path, "n"))
        with pytest.raises(QueueTimeout, match=f"no free port .* {number} is used by m:default"):
            await here.complete(dataclasses.replace(fake(tmp_path, "n"), max_wait_in_queue_ms=300))
        lease.release()


async def test_a_profile_with_a_port_of_its_own_has_one_instance(tmp_path: Path) -> None:
    with Ports(None).reserve() as found:
        number = found.number
    profile = dataclasses.replace(fake(tmp_path, arguments=("--port", str(number))), max_instances=5)
    async with local(tmp_path) as here:
        assert here.pool.max_instances(profile) == 1
        assert (await here.complete(profile))[0] == 200
        [instance] = here.pool.instances("m:default")
        assert instance.launch.port == number


async def test_closing_while_starting_and_serving(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        lease = await here.lease(fake(tmp_path))
        starting = here.pool.spawn(fake(tmp_path, "n", never_ready=True))
        await here.until(lambda: starting.child is not None, "a child")
        early = here.pool.spawn(fake(tmp_path, "o"))
        with trio.fail_after(8):
            await here.pool.close()
        assert lease.instance.state is starting.state is early.state is State.GONE
        assert early.child is None
        lease.release()
    assert not any(psutil.pid_exists(pid) for name in "mn" for pid in launches(tmp_path / f"{name}.json"))


async def test_cancelling_the_pool_kills_what_ignores_term(tmp_path: Path) -> None:
    async with local(tmp_path) as here:
        lease = await here.lease(fake(tmp_path, ignore_term=True))
        [pid] = launches(tmp_path / "m.json")
        lease.instance.stop("test")
        assert here.pool._nursery is not None
        here.pool._nursery.cancel_scope.cancel()
        with trio.fail_after(5):
            await lease.instance.wait_gone()
        assert not psutil.pid_exists(pid)
        lease.release()


async def test_nothing_outlives_a_node_that_is_killed(tmp_path: Path) -> None:
    model = fake_profile_file(tmp_path, "m", ignore_term=True)
    cookbook = {"models": [{"name": "m", "profiles": [{"id": "default", "model_path": str(model)}]}]}
    prompt = {"model": "m", "prompt": "hi", "max_tokens": 2}
    for life in range(2):
        async with running_node(tmp_path / "node", cookbook, binary_path=FAKE_LLAMA_SERVER) as node:
            reply = await node.client.post("/v1/completions", json=prompt)
            assert reply.status_code == 200, reply.text
            children = node.children()
            assert [child.pid for child in children] == launches(model)[life:]
            node.send_signal(signal.SIGKILL)
            assert await node.wait_end(children) == -signal.SIGKILL
            assert node.find_events("start failed") == []


async def test_a_child_that_ignores_term_doesnt_keep_a_node_from_ending(tmp_path: Path) -> None:
    model = fake_profile_file(tmp_path, "m", ignore_term=True)
    cookbook = {"models": [{"name": "m", "profiles": [{"id": "default", "model_path": str(model)}]}]}
    async with running_node(tmp_path / "node", cookbook, binary_path=FAKE_LLAMA_SERVER) as node:
        reply = await node.client.post("/admin/prewarm", json={"model": "m"})
        assert reply.json() == {"model": "m", "status": "loaded"}
        assert await node.stop() == 0
    assert not (tmp_path / "node" / "node-metrics.json.children").exists() or not list(
        (tmp_path / "node" / "node-metrics.json.children").iterdir()
    )
