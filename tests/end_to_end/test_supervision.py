"""Instances of real engines: started when asked, replaced when they die, gone when nobody asks."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from tests.end_to_end.cookbooks import (
    CHAT,
    ask,
    ask_well,
    chat,
    cookbook,
    entry_of,
    error_of,
    pid_of,
    profile,
    wait_document,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.node import Node, running_node, wait_until


async def test_started_on_demand_several_at_once(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(
        tiny=[profile(tiny_model), profile(tiny_model, "-c 2048 -np 2", id="wide")],
        other=profile(tiny_model),
        embed=profile(tiny_model, "--embedding --pooling mean -c 1024"),
    )
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        assert node.children() == []
        async with trio.open_nursery() as nursery:
            for model in ("tiny", "TINY:WIDE", "Other:default", "tiny", "tiny:wide"):
                nursery.start_soon(ask_well, node, model)
            embed = {"model": "embed", "input": "one"}
            nursery.start_soon(_succeed, node, "/v1/embeddings", embed)
        await node.wait_event("starting", after=3)
        keys = {entry["instance"].split("#")[0] for entry in node.find_events("starting")}
        assert keys == {"tiny:default", "tiny:wide", "other:default", "embed:default"}
        assert len(node.find_events("starting")) == 4
        assert len(node.children()) == 4
        status = (await node.client.get("/cluster/nodes")).json()["nodes"]["node-a"]
        assert status["active_instances"] == 4
        assert set(status["loaded_models"]) == keys
        assert (await entry_of(node, "tiny:wide"))["status"] == {"value": "loaded"}
        assert await node.stop() == 0


async def _succeed(node: Node, path: str, body: dict[str, Any]) -> None:
    reply = await node.client.post(path, json=body)
    assert reply.status_code == 200, reply.text


async def test_an_idle_instance_leaves_and_what_was_learned_stays(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(tiny=profile(tiny_model, "-c 2048 -np 2", idle_timeout_seconds=0.5))
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        unknown = (await entry_of(node, "tiny"))["metadata"]["parsed_model_params"]
        assert unknown == {"n_ctx": None, "n_ctx_train": None, "n_slots": None}
        await ask_well(node, max_tokens=20)
        [child] = node.children()
        known = (await entry_of(node, "tiny"))["metadata"]
        assert known["parsed_model_params"]["n_ctx_train"] == 8192
        assert known["parsed_model_params"]["n_slots"] == 2
        await node.wait_event("gone", instance="tiny:default#1")
        await wait_until(lambda: not child.is_running(), "the child lives")
        entry = await entry_of(node, "tiny")
        assert entry["status"] == {"value": "unloaded"}
        assert entry["metadata"] == known
        assert (await node.client.get("/running")).json() == {"running": []}
        await ask_well(node)
        assert pid_of(node, "tiny:default") != child.pid
        assert await node.stop() == 0
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        again = (await entry_of(node, "tiny"))["metadata"]
        assert again["parsed_model_params"] == known["parsed_model_params"]
        assert again["estimated_tokens_per_second"] > 0
        assert node.find_events("starting") == []


async def test_a_killed_instance_is_replaced(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(tiny=profile(tiny_model))
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        said = await ask_well(node)
        first = pid_of(node, "tiny:default")
        psutil.Process(first).kill()
        # At once: the node may learn of it by this very request.
        assert await ask_well(node) == said
        assert pid_of(node, "tiny:default") != first
        crash = await node.wait_event("crashed", instance="tiny:default#1")
        assert "signal 9" in crash["error"]
        metrics = (await node.client.get("/metrics/json")).json()["hashes"]["tiny:default"]
        assert (metrics["crashes_total"], metrics["starts_total"]) == (1, 2)
        assert (metrics["requests_total"], metrics["errors_total"]) == (2, 0)


async def test_a_stream_whose_instance_is_killed_ends_in_an_error(
    tmp_path: Path, endless_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(tiny=profile(endless_model, "-np 1"))
    body = chat(tokens=-1, stream=True)
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:

        async def hear_and_kill() -> None:
            async with node.client.stream("POST", CHAT, json=body) as reply:
                assert reply.status_code == 200
                child = psutil.Process(pid_of(node, "tiny:default"))
                async for line in reply.aiter_lines():
                    assert line != "data: [DONE]"
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()

        with pytest.raises(httpx.RemoteProtocolError):
            await hear_and_kill()
        await node.wait_event("request", error="cut", status=200)
        assert len(await ask_well(node)) == 5


async def test_an_instance_that_dies_of_a_request_twice_is_a_bad_gateway(tmp_path: Path) -> None:
    deadly = fake_profile_file(tmp_path, "deadly", die_after_requests=0)
    recipes = cookbook(deadly=profile(deadly), fine=profile(fake_profile_file(tmp_path, "fine")))
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        reply = await ask(node, "deadly")
        assert reply.status_code == 502
        error = error_of(reply)
        assert error["type"] == "upstream_error"
        for part in ("deadly:default", "node-a", "dying as told"):
            assert part in error["message"]
        assert len(launches(deadly)) == 2
        await ask_well(node, "fine")


async def test_a_start_that_fails_is_told_in_the_engine_s_own_words(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    whole = tiny_model.read_bytes()
    files = {"cut": whole[: len(whole) // 2], "text": b"this is no model\n" * 100, "empty": b""}
    for name, content in files.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
    recipes = cookbook(
        missing=profile(tmp_path / "missing.gguf"),
        **{name: profile(tmp_path / f"{name}.gguf") for name in files},
        flag=profile(tiny_model, "--no-such-flag -c 1024"),
        fine=profile(tiny_model),
    )
    words = {
        "missing": ("no model file", "missing.gguf"),
        "cut": ("cut.gguf", "exit code"),
        "text": ("text.gguf", "exit code"),
        "empty": ("empty.gguf", "exit code"),
        "flag": ("--no-such-flag",),
    }
    replies: dict[str, httpx.Response] = {}
    async with running_node(tmp_path / "node", recipes, binary_path=engine_binary) as node:

        async def fail(model: str) -> None:
            replies[model] = await ask(node, model)

        async with trio.open_nursery() as nursery:
            for model in words:
                nursery.start_soon(fail, model)
            # Meanwhile others are served.
            nursery.start_soon(ask_well, node, "fine")
        for model, parts in words.items():
            reply = replies[model]
            assert reply.status_code == 503, (model, reply.text)
            error = error_of(reply)
            assert error["type"] == "spawn_failures_exhausted"
            assert reply.headers["retry-after"] == "30"
            for part in (f"{model}:default", "node-a", *parts):
                assert part in error["message"], (model, error["message"])
            assert (await entry_of(node, model))["status"]["value"] == "failed"
        metrics = (await node.client.get("/metrics/json")).json()["hashes"]
        assert metrics["cut:default"]["start_failures_total"] == 3
        assert metrics["fine:default"]["start_failures_total"] == 0
        assert len(await ask_well(node, "fine")) == 5
        assert len(node.children()) == 1


async def test_a_model_file_that_appears_later_is_served(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    late = tmp_path / "late.gguf"
    async with running_node(
        tmp_path / "node", cookbook(late=profile(late)), binary_path=engine_binary
    ) as node:
        assert (await ask(node, "late")).status_code == 503
        late.write_bytes(tiny_model.read_bytes())

        async def until_served() -> None:
            while (await ask(node, "late")).status_code != 200:
                await trio.sleep(0.05)

        with trio.fail_after(20):
            await until_served()
        assert (await entry_of(node, "late"))["status"] == {"value": "loaded"}


async def test_names(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    tiny = {"profiles": [profile(tiny_model), profile(tiny_model, id="Quick")], "aliases": ["gpt-4o", "Best"]}
    settings = {"default_model": "TINY"}
    async with running_node(tmp_path, cookbook(Tiny=tiny), settings, binary_path=engine_binary) as node:
        for name, key in {
            "tiny": "Tiny:default",
            "TINY:DEFAULT": "Tiny:default",
            "GPT-4o": "Tiny:default",
            "best:quick": "Tiny:Quick",
            "Tiny:QUICK": "Tiny:Quick",
        }.items():
            reply = await ask(node, name)
            assert reply.headers["x-llamesh-profile"] == key, name
        nameless = chat()
        del nameless["model"]
        reply = await node.client.post(CHAT, json=nameless)
        assert reply.headers["x-llamesh-profile"] == "Tiny:default"
        named_in_query = await node.client.post(f"{CHAT}?model=best%3Aquick", json=nameless)
        assert named_in_query.headers["x-llamesh-profile"] == "Tiny:Quick"
        await node.wait_event("starting", after=1)
        assert len(node.find_events("starting")) == 2


async def test_prewarm_and_unload(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    recipes = cookbook(tiny=profile(tiny_model), other=profile(tiny_model))
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        replies: list[httpx.Response] = []

        async def prewarm(body: dict[str, Any]) -> None:
            replies.append(await node.client.post("/admin/prewarm", json=body))

        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(prewarm, {"model": "tiny", "wait": number % 4 != 0})
        assert sorted({reply.status_code for reply in replies}) == [200, 202]
        assert {reply.json()["model"] for reply in replies} == {"tiny"}
        assert {r.json()["status"] for r in replies if r.status_code == 200} == {"loaded"}
        await node.wait_event("starting")
        assert len(node.find_events("starting")) == 1
        [child] = node.children()
        assert (await entry_of(node, "tiny"))["status"] == {"value": "loaded"}
        await ask_well(node)
        await node.wait_event("request", instance="tiny:default#1")

        await prewarm({"model": "other", "wait": False})
        assert replies[-1].status_code == 202
        await node.wait_event("ready", instance="other:default#2")

        unloaded = await node.client.post("/admin/unload", json={"model": "tiny"})
        assert unloaded.status_code == 200
        await node.wait_event("gone", instance="tiny:default#1")
        await wait_until(lambda: not child.is_running(), "the child lives")
        assert (await node.client.post("/admin/unload", json={})).status_code == 200
        await node.wait_event("gone", instance="other:default#2")
        assert node.children() == []

        for body, status in (
            ({"model": "nobody"}, 404),
            ({}, 400),
            ({"model": 7}, 400),
            ({"model": "tiny", "wait": "yes"}, 400),
        ):
            await prewarm(body)
            assert replies[-1].status_code == status, body
            error_of(replies[-1])


async def test_prewarm_tells_what_went_wrong(tmp_path: Path) -> None:
    recipes = cookbook(missing=profile(tmp_path / "missing.gguf"))
    async with running_node(tmp_path / "node", recipes) as node:
        reply = await node.client.post("/admin/prewarm", json={"model": "missing"})
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "30")
        assert error_of(reply)["type"] == "spawn_failures_exhausted"


async def test_an_unload_waits_for_what_runs(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", gate=str(gate))
    async with running_node(
        tmp_path / "node", cookbook(slow=profile(slow)), binary_path=FAKE_LLAMA_SERVER
    ) as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask_well, node, "slow")
            await wait_document(node, "/running", lambda d: [i["busy"] for i in d["running"]] == [1])
            await node.client.post("/admin/unload", json={"model": "slow"})
            states = (await node.client.get("/running")).json()["running"]
            assert [state["state"] for state in states] == ["draining"]
            gate.touch()
        await node.wait_event("gone", instance="slow:default#1")
