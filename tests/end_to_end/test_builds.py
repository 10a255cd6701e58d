"""A node that builds its engine and moves over to it, on a tiny project whose product is a fake."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from tests.end_to_end.cookbooks import (
    ask,
    ask_well,
    cookbook,
    error_of,
    processes_in,
    profile,
    wait_alone,
    wait_document,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.fake_project import FakeProject, settings_for
from tests.support.node import Node, clean_environment, running_node, wait_until


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path / "upstream")


@asynccontextmanager
async def building(tmp_path: Path, project: FakeProject, recipes: Any, **more: Any) -> AsyncIterator[Node]:
    config = {"llama_cpp": settings_for(project, tmp_path / "engine", **more)}
    async with running_node(tmp_path / "node", recipes, config) as node:
        yield node


async def rebuild(node: Node) -> None:
    reply = await node.client.post("/admin/rebuild-llama")
    assert reply.status_code == 202, reply.text


async def version(node: Node) -> str:
    found = (await node.client.get("/version")).json()["llama_cpp_version"]
    assert isinstance(found, str)
    return found


async def last(node: Node) -> Any:
    return (await node.client.get("/admin/builds")).json()["last"]


def fakes(tmp_path: Path, *names: str, **behaviour: Any) -> dict[str, Path]:
    return {name: fake_profile_file(tmp_path, name, **behaviour) for name in names}


async def test_missing_it_is_built_while_something_else_serves(
    tmp_path: Path, project: FakeProject, tiny_model: Path
) -> None:
    gate = tmp_path / "gate"
    commit = project.commit(version="built", gate=str(gate))
    [fake] = fakes(tmp_path, "fake").values()
    async with building(tmp_path, project, cookbook(tiny=profile(tiny_model), fake=profile(fake))) as node:
        await ask_well(node, "tiny")
        assert (await node.client.get("/version")).json()["engine"] == "embedded"
        going_on = await wait_document(node, "/admin/builds", lambda d: d.get("stage") == "compiling")
        assert (going_on["state"], going_on["commit"], going_on["enabled"]) == ("building", commit, True)
        gate.touch()
        done = await node.wait_event("engine built")
        assert (done["commit"], done["version"]) == (commit, "built")
        percents = [entry["percent"] for entry in node.find_events("building", stage="compiling")]
        assert len(percents) > 3
        # The one that serves is drained, and what comes is served by the new one.
        await node.wait_event("gone", instance="tiny:default#1", reason="another engine takes its place")
        await ask_well(node, "fake")
        assert await version(node) == "built"
        text = (await node.client.get("/metrics")).text
        assert 'llamesh_engine_builds_total{outcome="built"} 1.0' in text
        assert 'engine_version="built"' in text
        assert await node.stop() == 0


async def test_two_commits_in_a_row_under_load(tmp_path: Path, project: FakeProject) -> None:
    """No request fails, none is served twice, and each model is down for no longer than it takes."""
    project.commit(version="one")
    files = fakes(tmp_path, "a", "b", start_delay=0.05, token_delay=0.005)
    recipes = cookbook(**{name: profile(file, "-np 2") for name, file in files.items()})
    async with building(tmp_path, project, recipes) as node:
        await node.wait_event("engine built", version="one")
        statuses: list[int] = []
        stop = False

        async def client(model: str, streams: bool) -> None:
            while not stop:
                reply = await ask(node, model, stream=streams, tokens=3)
                statuses.append(reply.status_code)
                if streams:
                    assert reply.text.endswith("data: [DONE]\n\n"), reply.text

        async with trio.open_nursery() as nursery:
            for model in files:
                for streams in (True, False, True):
                    nursery.start_soon(client, model, streams)
            await wait_until(lambda: len(statuses) > 20, "no load")
            for name in ("two", "three"):
                project.commit(version=name)
                await rebuild(node)
                await node.wait_event("engine built", version=name)
                assert await version(node) in ("one", "two", "three")
            await wait_document(node, "/version", lambda d: d["llama_cpp_version"] == "three")
            await wait_document(
                node,
                "/running",
                lambda d: {i["instance"][0] for i in d["running"] if i["state"] == "ready"} == {"a", "b"},
            )
            seen = len(statuses)
            await wait_until(lambda: len(statuses) > seen + 20, "no load")
            stop = True
        assert set(statuses) == {200}
        # Of each model one for each engine, at most: nothing was drained twice.
        assert all(len(launches(file)) <= 3 for file in files.values())
        drains = [e["instance"] for e in node.find_events("draining") if "instance" in e]
        assert len(drains) == len(set(drains))
        assert node.find_events("start failed") == []
        assert await node.stop() == 0


async def test_an_unchanged_commit_drains_nothing(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="one")
    [file] = fakes(tmp_path, "a").values()
    async with building(tmp_path, project, cookbook(a=profile(file))) as node:
        await node.wait_event("engine built")
        await ask_well(node, "a")
        await rebuild(node)
        await node.wait_event("engine unchanged")
        assert (await last(node))["outcome"] == "unchanged"
        await ask_well(node, "a")
        assert len(launches(file)) == 1
        assert node.find_events("draining") == []
    # Nor is anything built at the next start.
    async with building(tmp_path, project, cookbook(a=profile(file))) as node:
        assert await version(node) == "one"
        await ask_well(node, "a")
        assert (await node.client.get("/admin/builds")).json()["last"] is None
        assert node.find_events("building") == []


async def test_one_at_a_time(tmp_path: Path, project: FakeProject) -> None:
    gate = tmp_path / "gate"
    project.commit(version="one", gate=str(gate))
    async with building(tmp_path, project, {"models": []}) as node:
        await wait_document(node, "/admin/builds", lambda d: d["state"] == "building")
        refused = await node.client.post("/admin/rebuild-llama")
        assert (refused.status_code, error_of(refused)["type"]) == (409, "conflict")
        gate.touch()
        await node.wait_event("engine built")
        await wait_document(node, "/admin/builds", lambda d: d["state"] == "idle")
        await rebuild(node)


async def test_it_is_refused_where_nothing_is_built(tmp_path: Path) -> None:
    async with running_node(tmp_path, {"models": []}) as node:
        refused = await node.client.post("/admin/rebuild-llama")
        assert refused.status_code == 400
        assert "llama_cpp.enabled" in error_of(refused)["message"]


@pytest.mark.parametrize(
    ("behaviour", "stage", "code"),
    [({"compile": "fail"}, "compiling", 1), ({"smoke": "exit"}, "testing the build", 4)],
)
async def test_a_failure_keeps_the_engine_and_tells(
    tmp_path: Path, project: FakeProject, behaviour: dict[str, Any], stage: str, code: int
) -> None:
    project.commit(version="one")
    [file] = fakes(tmp_path, "a").values()
    async with building(tmp_path, project, cookbook(a=profile(file))) as node:
        await node.wait_event("engine built")
        await ask_well(node, "a")
        project.commit(version="two", **behaviour)
        await rebuild(node)
        told = await node.wait_event("build failed; the engine in use stays")
        assert (told["level"], told["stage"], told["exit_code"]) == ("error", stage, code)
        assert told["command"]
        assert told["last_lines"]
        assert (await last(node))["outcome"] == "failed"
        await ask_well(node, "a")
        assert await version(node) == "one"
        assert len(launches(file)) == 1
        project.commit(version="three")
        await rebuild(node)
        await node.wait_event("engine built", version="three")


async def test_an_engine_that_can_not_serve_is_taken_back(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="one")
    files = fakes(tmp_path, "a", "b")
    recipes = cookbook(**{name: profile(file) for name, file in files.items()})
    async with building(tmp_path, project, recipes, auto_update_interval_seconds=0.2) as node:
        first = await node.wait_event("engine built")
        await ask_well(node, "a")
        await ask_well(node, "b")
        link = tmp_path / "engine" / "bin" / "llama-server"
        good = link.resolve()
        project.commit(version="two", serves=False)
        await node.wait_event("engine built", version="two")
        statuses = []
        with trio.move_on_after(20):
            while not node.find_events("the new engine can't serve and was taken back"):
                statuses.append((await ask(node, "a")).status_code)
                statuses.append((await ask(node, "b")).status_code)
        told = await node.wait_event("the new engine can't serve and was taken back")
        assert "unknown model architecture" in told["error"]
        assert (told["engine_version"], told["stays_with"]) == ("two", "one")
        assert set(statuses) == {200}
        await ask_well(node, "a")
        await ask_well(node, "b")
        assert await version(node) == "one"
        assert link.resolve() == good
        assert (await node.client.get("/metrics")).text.count('outcome="rejected"} 1.0') == 1
        # It isn't built again and again; a new commit is.
        project.commit(version="three")
        await node.wait_event("engine built", version="three")
        assert len(node.find_events("engine built", version="two")) == 1
        assert first["version"] == "one"
        assert await node.stop() == 0


async def test_a_first_build_that_can_not_serve_gives_way_to_the_user_s_own(
    tmp_path: Path, project: FakeProject
) -> None:
    own = tmp_path / "engine" / "bin" / "llama-server"
    own.parent.mkdir(parents=True)
    own.write_text(f'#!/bin/sh\nexec {FAKE_LLAMA_SERVER} "$@"\n')
    own.chmod(0o755)
    gate = tmp_path / "gate"
    project.commit(version="one", serves=False, gate=str(gate))
    [file] = fakes(tmp_path, "a").values()
    async with building(tmp_path, project, cookbook(a=profile(file))) as node:
        await ask_well(node, "a")
        gate.touch()
        await node.wait_event("gone", instance="a:default#1")
        await ask_well(node, "a")
        await node.wait_event("the new engine can't serve and was taken back")
        assert own.read_text().startswith("#!/bin/sh\nexec ")
        assert await version(node) == "0 (fake)"
        assert await node.stop() == 0
    # Nor is it taken at the next start.
    async with running_node(tmp_path / "again", cookbook(a=profile(file)), binary_path=own) as node:
        await ask_well(node, "a")


async def test_a_model_that_no_engine_can_load_is_no_reason(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="one")
    good = fake_profile_file(tmp_path, "good")
    bad = fake_profile_file(tmp_path, "bad", exit_at_start={"code": 1, "lines": ["error: invalid magic"]})
    async with building(tmp_path, project, cookbook(good=profile(good), bad=profile(bad))) as node:
        await node.wait_event("engine built")
        await ask_well(node, "good")
        assert (await ask(node, "bad")).status_code == 503
        project.commit(version="two")
        await rebuild(node)
        await node.wait_event("engine built", version="two")
        await node.wait_event("gone", instance="good:default#1")
        assert (await ask(node, "bad")).status_code == 503
        await ask_well(node, "good")
        assert await version(node) == "two"
        assert node.find_events("the new engine can't serve and was taken back") == []


async def test_now_and_then_it_looks_for_a_newer_one(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="one")
    async with building(tmp_path, project, {"models": []}, auto_update_interval_seconds=0.2) as node:
        await node.wait_event("engine built", version="one")
        project.commit(version="two")
        await node.wait_event("engine built", version="two")
        # A commit that can't be compiled isn't compiled at each look.
        project.commit(version="three", compile="fail")
        await node.wait_event("build failed; the engine in use stays")
        project.commit(version="four")
        await node.wait_event("engine built", version="four")
        await wait_document(node, "/admin/builds", lambda d: d["last"]["outcome"] == "unchanged")
        assert len(node.find_events("build failed; the engine in use stays")) == 1


async def test_old_builds_go(tmp_path: Path, project: FakeProject) -> None:
    builds = tmp_path / "engine" / "builds"

    def kept() -> int:
        return len(list(builds.glob("*/build.json")))

    project.commit(version="0")
    async with building(
        tmp_path, project, {"models": []}, keep_builds=1, auto_update_interval_seconds=0.2
    ) as node:
        await node.wait_event("engine built", version="0")
        for number in range(1, 4):
            project.commit(version=str(number))
            await node.wait_event("engine built", version=str(number))
        await wait_until(lambda: kept() == 2, lambda: f"{kept()} builds")
        assert (tmp_path / "engine" / "bin" / "llama-server").resolve().is_file()


async def test_a_build_that_somebody_else_made_is_taken_over(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="one")
    [file] = fakes(tmp_path, "a").values()
    async with building(tmp_path, project, cookbook(a=profile(file))) as node:
        await node.wait_event("engine built")
        await ask_well(node, "a")
        project.commit(version="two")
        words = ["build", "--config", str(node.directory / "config.yaml")]
        done = await trio.run_process(
            [sys.executable, "-m", "llamesh", *words],
            capture_stdout=True,
            capture_stderr=True,
            env=clean_environment({}),
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode()
        assert Path(done.stdout.decode().strip()).is_file()
        await node.wait_event("gone", instance="a:default#1")
        await ask_well(node, "a")
        assert await version(node) == "two"


async def test_a_mixing_build_is_run_without_the_cache(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="one", mixes="cache")
    [file] = fakes(tmp_path, "a").values()
    async with building(tmp_path, project, cookbook(a=profile(file, "--cache-ram 4096"))) as node:
        await node.wait_event("engine built")
        [told] = [e for e in node.events if "mixes up conversations" in e["event"]]
        assert (told["level"], told["arguments"]) == ("error", "--cache-ram 0")
        await ask_well(node, "a")
        [child] = [p for p in node.children() if str(file) in p.cmdline()]
        assert child.cmdline()[-2:] == ["--cache-ram", "0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_the_end_of_the_node_ends_a_build(tmp_path: Path, project: FakeProject, number: int) -> None:
    project.commit(version="one", gate=str(tmp_path / "never"))
    async with building(tmp_path, project, {"models": []}) as node:
        await wait_until(
            lambda: any("compile.sh" in name for name in names_in(tmp_path)), "nothing is compiled"
        )
        node.send_signal(number)
        assert await node.wait_end() == (0 if number == signal.SIGTERM else -number)
        await wait_alone(tmp_path)
    assert not (tmp_path / "engine" / "bin" / "llama-server").exists()
    # What was begun is no build, and in nobody's way.
    project.commit(version="two")
    async with building(tmp_path, project, {"models": []}) as node:
        await node.wait_event("engine built", version="two")


async def test_what_one_engine_said_is_not_believed_of_another(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="one")
    file = fake_profile_file(tmp_path, "a", launches=[{"n_ctx": 8192}, {"n_ctx": 4096}])
    async with building(tmp_path, project, cookbook(a=profile(file, "-np 1"))) as node:
        await node.wait_event("engine built")
        await ask_well(node, "a")
        project.commit(version="two")
        await rebuild(node)
        await node.wait_event("gone", instance="a:default#1")
        await ask_well(node, "a")
        entry = (await node.client.get("/v1/models/a")).json()
        assert entry["metadata"]["parsed_model_params"]["n_ctx"] == 4096
        assert await node.stop() == 0
    learned = json.loads((tmp_path / "node" / "node-metrics.json").read_text())
    assert learned["profiles"]["a:default"]["engine"].startswith("two ")
    assert len({key.split("\x1f")[0] for key in learned["peaks"]}) == len(learned["peaks"])


def names_in(directory: Path) -> list[str]:
    """The command lines of the processes that have to do with a folder."""
    found = []
    for process in processes_in(directory):
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline()))
    return found
