"""Keeping warm, keeping away, and being killed: what a node does without anybody asking a model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import psutil
import trio

from llamesh.commands.pause import pause_seconds
from llamesh.config.effect import without_effect
from llamesh.config.settings import Settings
from tests.end_to_end.cookbooks import (
    CHAT,
    ask,
    ask_well,
    chat,
    cookbook,
    error_of,
    pid_of,
    processes_in,
    profile,
    wait_alone,
    wait_document,
    wait_running,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.node import Node, clean_environment, running_node, wait_until

RESTORED = 3


# Keeping warm.


async def test_a_warm_model_is_there_unasked_and_stays(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    """It is never idle for too long, and what takes its place after a crash is waited for less and less."""
    recipes = cookbook(
        warm=profile(tiny_model, min_instances=1, idle_timeout_seconds=0.1),
        cold=profile(tiny_model, idle_timeout_seconds=0.1),
        kept=profile(tiny_model, idle_timeout_seconds=0),
    )
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        await node.wait_event("ready", instance="warm:default#1")
        assert len(node.find_events("starting")) == 1
        await ask_well(node, "kept")
        await ask_well(node, "cold")
        await node.wait_event("gone", reason="idle for 0.1 s")
        # The one that is kept warm was idle for longer than that one.
        left = {str(entry["instance"]).split("#")[0] for entry in node.find_events("gone")}
        assert left == {"cold:default"}
        for number in range(RESTORED):
            psutil.Process(pid_of(node, "warm:default")).kill()
            await node.wait_event("crashed", after=number)
            await wait_document(node, "/v1/models/warm", lambda entry: entry["status"]["value"] == "loaded")
        pauses = [entry["next_start_in_seconds"] for entry in node.find_events("crashed")]
        assert pauses == [0, 1, 2]
        metrics = (await node.client.get("/metrics/json")).json()
        assert metrics["hashes"]["warm:default"]["starts_total"] == RESTORED + 1
        loaded = (await node.client.get("/cluster/nodes")).json()["nodes"]["node-a"]["loaded_models"]
        assert loaded == ["kept:default", "warm:default"]
        assert await node.stop() == 0


async def test_several_warm_ones_and_none_while_paused(tmp_path: Path) -> None:
    warm = fake_profile_file(tmp_path, "warm")
    recipes = cookbook(warm=profile(warm, min_instances=2))
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        await wait_running_instances(node, 2)
        # Unloading is no exception: the cookbook wants them there.
        assert len((await tell(node, "/admin/unload"))["unloading"]) == 2
        await node.wait_event("gone", after=1, reason="unloaded on request")
        await wait_running_instances(node, 2)
        await tell(node, "/admin/pause")
        await wait_document(node, "/running", lambda d: d["running"] == [])
        count = len(launches(warm))
        await tell(node, "/admin/pause", seconds=0)
        await wait_running_instances(node, 2)
        assert len(launches(warm)) == count + 2
        # And the file says how many, from now on.
        (node.directory / "cookbook.yaml").write_text(
            json.dumps(cookbook(warm=profile(warm, min_instances=3)))
        )
        await tell(node, "/admin/reload")
        await wait_running_instances(node, 3)
        assert await node.stop() == 0


async def test_a_warm_one_that_cant_start_is_tried_ever_more_rarely(tmp_path: Path) -> None:
    broken = fake_profile_file(tmp_path, "broken", exit_at_start={"code": 3, "lines": ["no luck"]})
    recipes = cookbook(
        broken=profile(broken, min_instances=1), fine=profile(fake_profile_file(tmp_path, "fine"))
    )
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        failed = [await node.wait_event("start failed", after=count) for count in range(4)]
        assert [entry["next_try_in_seconds"] for entry in failed] == [0.1, 0.2, 1, 0.1]
        entry = (await node.client.get("/v1/models/broken")).json()
        assert entry["status"]["value"] in ("failed", "loading", "unloaded")
        await ask_well(node, "fine")


async def wait_running_instances(node: Node, count: int) -> None:
    """Wait until exactly so many are ready."""

    def are_ready(document: Any) -> bool:
        return [entry["state"] for entry in document["running"]] == ["ready"] * count

    await wait_document(node, "/running", are_ready)


async def tell(node: Node, path: str, **wish: Any) -> Any:
    reply = await node.client.post(path, json=wish)
    assert reply.status_code in (200, 202), reply.text
    return reply.json()


# Loading beforehand.


async def test_many_who_load_the_same_start_it_once(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    file = fake_profile_file(tmp_path, "file", ready_when=str(gate))
    async with running_node(
        tmp_path / "node", cookbook(m=profile(file, "-np 1")), binary_path=FAKE_LLAMA_SERVER
    ) as node:
        answers: list[Any] = []

        async def load(path: str, wait: bool) -> None:
            answers.append(await tell(node, path, model="m", wait=wait))

        async with trio.open_nursery() as nursery:
            for number in range(12):
                path = "/admin/prewarm" if number % 3 else "/models/load"
                nursery.start_soon(load, path, number % 2 == 0)
            await wait_until(lambda: len(answers) == 6, "those that don't wait were not answered")
            assert {answer["status"] for answer in answers} == {"loading"}
            gate.touch()
        assert {answer["status"] for answer in answers[6:]} == {"loaded"}
        assert len(launches(file)) == 1
        assert (await tell(node, "/admin/prewarm", model="m", wait=False))["status"] == "loaded"
        assert len(launches(file)) == 1


# Keeping away.


async def test_a_drain_finishes_what_is_here_and_outlives_a_shutdown(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", gate=str(gate))
    async with running_node(
        tmp_path / "node", cookbook(slow=profile(slow, "-np 1")), binary_path=FAKE_LLAMA_SERVER
    ) as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_well, node, "slow")
            nursery.start_soon(ask_well, node, "slow")
            await wait_running(node, 2)
            await wait_document(node, "/running", lambda d: [i["busy"] for i in d["running"]] == [1])
            await tell(node, "/admin/drain")
            assert error_of(await ask(node, "slow"))["type"] == "draining"
            node.send_signal(signal.SIGTERM)
            await node.wait_event("draining", running=2)
            # Taking the drain back doesn't take the end back.
            assert await tell(node, "/admin/undrain") == {"status": "draining"}
            refused = await ask(node, "slow")
            assert (refused.status_code, error_of(refused)["type"]) == (503, "draining")
            assert "shutting down" in error_of(refused)["message"]
            gate.touch()
        assert await node.wait_end() == 0
    await wait_alone(tmp_path)


async def test_a_pause_lets_requests_finish_and_starts_nothing(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", gate=str(gate))
    recipes = cookbook(slow=profile(slow, "-np 1"), idle=profile(fake_profile_file(tmp_path, "idle")))
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        await ask_well(node, "idle")
        queued: list[httpx.Response] = []

        async def wait_in_vain() -> None:
            queued.append(await ask(node, "slow"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_well, node, "slow")
            await wait_document(node, "/running", lambda d: sum(i["busy"] for i in d["running"]) == 1)
            nursery.start_soon(wait_in_vain)
            await wait_running(node, 2)
            await tell(node, "/admin/pause", seconds=3600)
            # Who only waits is sent away, and the idle one leaves; the busy one may finish.
            await node.wait_event("gone", instance="idle:default#1")
            await wait_until(lambda: bool(queued), "the queue wasn't told")
            assert (queued[0].status_code, error_of(queued[0])["type"]) == (503, "draining")
            [left] = (await node.client.get("/running")).json()["running"]
            assert (left["model"], left["state"], left["busy"]) == ("slow", "draining", 1)
            gate.touch()
        await wait_document(node, "/running", lambda d: d["running"] == [])
        assert len(launches(slow)) == 1
        await tell(node, "/admin/pause", seconds=0)
        await ask_well(node, "slow")


# The command.


async def pause(node: Node, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `llamesh pause` for this node."""
    config = str(node.directory / "config.yaml")
    environment = clean_environment({"LLAMESH_LISTEN_ADDR": f"127.0.0.1:{node.port}", **env})
    command = [sys.executable, "-m", "llamesh", "pause", *arguments, "--config", config]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            env=environment,
            cwd=node.directory,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return await trio.to_thread.run_sync(run)


async def test_the_command_pauses_a_node(tmp_path: Path) -> None:
    recipes = cookbook(m=profile(fake_profile_file(tmp_path, "m")))
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        done = await pause(node, "30m")
        assert (done.returncode, done.stdout) == (0, "node-a: paused for another 1800 s\n")
        assert (await node.client.get("/readyz")).status_code == 503
        done = await pause(node)
        assert (done.returncode, done.stdout, done.stderr) == (0, "node-a: paused\n", "")
        done = await pause(node, "off")
        assert (done.returncode, done.stdout) == (0, "node-a: ready\n")
        await ask_well(node, "m")
        assert await node.stop() == 0
        gone = await pause(node, "off")
        assert gone.returncode == 1
        assert "no node answers at 127.0.0.1" in gone.stderr
        assert "Traceback" not in gone.stderr


async def test_the_command_and_keys(tmp_path: Path) -> None:
    hashed = "sha256:" + hashlib.sha256(b"root-key").hexdigest()
    auth = {"enabled": True, "allowed_keys": ["user-key"], "admin_keys": [hashed]}
    recipes = cookbook(m=profile(fake_profile_file(tmp_path, "m")))
    async with running_node(
        tmp_path / "node", recipes, {"auth": auth}, binary_path=FAKE_LLAMA_SERVER
    ) as node:
        none = await pause(node)
        assert (none.returncode, "(401)" in none.stderr) == (1, True)
        assert "LLAMESH_API_KEY" in none.stderr
        wrong = await pause(node, LLAMESH_API_KEY="user-key")
        assert (wrong.returncode, "(403)" in wrong.stderr) == (1, True)
        torn = await pause(node, LLAMESH_API_KEY="two\nlines")
        assert torn.returncode == 1
        assert (await node.client.get("/readyz")).status_code == 200
        assert (await pause(node, LLAMESH_API_KEY="root-key")).returncode == 0
        plain = {"auth": {**auth, "admin_keys": [hashed, "other-key"]}}
        config = json.loads((node.directory / "config.yaml").read_text())
        (node.directory / "config.yaml").write_text(json.dumps({**config, **plain}))
        await wait_until(lambda: bool(node.find_events("reloaded")), "it wasn't reloaded")
        # Now the configuration has one that can be sent.
        assert (await pause(node, "off")).returncode == 0
        for told in (none, wrong, torn):
            assert not any(key in told.stdout + told.stderr for key in ("user-key", "root-key", "two"))


async def test_the_command_without_a_node_to_talk_to(tmp_path: Path) -> None:
    recipes = cookbook(m=profile(fake_profile_file(tmp_path, "m")))
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        no_port = await pause(node, LLAMESH_LISTEN_ADDR="127.0.0.1:0")
        assert (no_port.returncode, "port 0" in no_port.stderr) == (1, True)
        bad_time = await pause(node, "soon")
        assert (bad_time.returncode, "not a time: 'soon'" in bad_time.stderr) == (2, True)
        bad_file = await pause(node, LLAMESH_MAX_HOPS="many")
        assert (bad_file.returncode, "max_hops" in bad_file.stderr.lower()) == (1, True)


def test_times() -> None:
    told = {
        "90": 90,
        "0": 0,
        "off": 0,
        "OFF": 0,
        "30m": 1800,
        "2h": 7200,
        "1h30m": 5400,
        "1.5h": 5400,
        "1d": 86400,
    }
    assert {text: pause_seconds(text) for text in told} == told


# Being told what does nothing.


async def test_switches_without_effect_are_named(tmp_path: Path) -> None:
    assert without_effect(Settings()) == ()
    off = {"cluster": {"noise": {"enabled": False}}}
    assert without_effect(Settings.model_validate(off)) == ("cluster.noise.enabled",)
    switches = {**off, "public_url": "http://example.org:1"}
    async with running_node(tmp_path, {"models": []}, switches) as node:
        warning = await node.wait_event("without effect in this version")
        assert (warning["level"], warning["settings"]) == ("warning", ["cluster.noise.enabled"])


# Being killed.


async def test_killed_twenty_times_it_always_starts_clean(tmp_path: Path) -> None:
    """At random moments of starting, serving and saving: no child is left, and what was learned stays."""
    moments = random.Random(3)
    file = fake_profile_file(tmp_path, "file", n_ctx=4096, slots=3)
    recipes = cookbook(m=profile(file), warm=profile(file, min_instances=1))
    directory = tmp_path / "node"
    learned = directory / "node-metrics.json"
    async with running_node(directory, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        await ask_well(node, "m")
        assert await node.stop() == 0
    known = json.loads(learned.read_text())["profiles"]["m:default"]
    assert known["n_slots"] == 3
    for _ in range(20):
        (directory / f"{learned.name}.{os.getpid() + 1_000_000_000}.part").write_text("{")
        async with running_node(directory, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
            entry = (await node.client.get("/v1/models/m")).json()
            assert entry["metadata"]["parsed_model_params"]["n_slots"] == 3
            assert node.find_events("learned values can't be read; learning starts anew") == []
            assert list(directory.glob("*.part")) == []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_ask_in_vain, node)
                await trio.sleep(moments.uniform(0, 0.4))
                node.send_signal(signal.SIGKILL)
            await wait_until(lambda node=node: node.returncode is not None, "it lives")  # type: ignore[misc]
            await wait_alone(file)
    assert processes_in(tmp_path) == []
    async with running_node(directory, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        await ask_well(node, "m")
        assert [entry for entry in node.events if entry["level"] in ("warning", "error")] == []
        assert await node.stop() == 0
    assert json.loads(learned.read_text())["profiles"]["m:default"]["n_slots"] == 3
    assert list(directory.glob("*.children/*")) == []
    assert list(directory.glob("*.broken")) == []


async def _ask_in_vain(node: Node) -> None:
    """Ask until the node is dead; in a thread, where a request that is cut leaves nothing unfinished."""

    def asking() -> None:
        with httpx.Client(base_url=node.url, trust_env=False, timeout=30) as client:
            while True:
                client.post(CHAT, json=chat("m"))

    with contextlib.suppress(httpx.HTTPError):
        await trio.to_thread.run_sync(asking)
