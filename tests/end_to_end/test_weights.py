"""Models from a hub: named in the cookbook, fetched when they are asked for, served; and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    events_of,
    wait_document,
)
from tests.support.hub import Hub, digest_of, running_hub
from tests.support.node import clean_environment, running_node, wait_until

FILE = "tiny-Q4_K_M.gguf"
REPO = "someone/tiny-GGUF"


@pytest.fixture
def hub(tiny_model: Path) -> Iterator[Hub]:
    with running_hub() as found:
        found.add(REPO, {FILE: tiny_model.read_bytes(), "tiny-Q8_0.gguf": b"GGUF, but of no use"})
        yield found


def environment(hub: Hub, folder: Path, **more: str) -> dict[str, str]:
    """What leads a node to this hub and to a cache of its own, and nowhere else."""
    ours = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    return {
        **ours,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **more,
    }


def of_hub(repo: str = f"{REPO}:Q4_K_M", **more: Any) -> dict[str, Any]:
    return {"id": "default", "hf_repo": repo, "llama_server_args": "-c 1024 -np 1 -t 1", **more}


async def test_a_line_in_the_cookbook_is_enough(tmp_path: Path, hub: Hub) -> None:
    env = environment(hub, tmp_path / "hf")
    for life in ("first", "second"):
        async with running_node(tmp_path / "node", cookbook(tiny=of_hub()), env=env) as node:
            assert len(await ask_well(node)) == 5, life
            assert (await entry_of(node, "tiny"))["status"] == {"value": "loaded"}
            # The size comes from the file that was fetched.
            nodes = (await node.client.get("/cluster/nodes")).json()["nodes"]["node-a"]
            assert nodes["model_stats"]["tiny:default"]["estimate_source"] in ("estimate", "measured")
    [download] = hub.asked("store")
    assert download.authorization is None
    snapshots = tmp_path / "hf" / "hub" / "models--someone--tiny-GGUF" / "snapshots"
    [found] = snapshots.glob(f"*/{FILE}")
    assert found.is_symlink()
    assert found.resolve().parent.name == "blobs"


async def test_looking_at_the_node_fetches_nothing(tmp_path: Path, hub: Hub) -> None:
    env = environment(hub, tmp_path / "hf")
    async with running_node(tmp_path / "node", cookbook(tiny=of_hub()), env=env) as node:
        for path in ("/api/v1/state", "/cluster/nodes", "/v1/models", "/metrics", "/readyz", "/api/v1/state"):
            seen = (await node.client.get(path)).raise_for_status()
            if path == "/api/v1/state":
                [model] = seen.json()["models"]
                assert model["nodes"]["node-a"]["state"] == "missing"
                assert "has to be fetched first" in model["nodes"]["node-a"]["why"]
    assert hub.asked("store") == []


async def test_a_stream_hears_how_far_the_download_is(tmp_path: Path, hub: Hub) -> None:
    fault = hub.fault(FILE, stall_after=100_000)
    env = environment(hub, tmp_path / "hf")
    settings = {"http": {"stream_keepalive_seconds": 0.05}}
    async with running_node(tmp_path / "node", cookbook(tiny=of_hub()), settings, env=env) as node:
        async with node.client.stream("POST", CHAT, json=chat(stream=True)) as reply:
            text = ""
            async for piece in reply.aiter_text():
                text += piece
                if "% of" in text and not fault.resume.is_set():
                    path = "/v1/models/tiny"
                    entry = await wait_document(node, path, lambda d: d["status"].get("progress", 0) > 0)
                    assert entry["status"]["value"] == "downloading"
                    assert entry["status"]["progress"] < 1
                    fault.resume.set()
        assert reply.status_code == 200
        assert events_of(text)[-1] == "[DONE]"
        assert f": downloading {REPO}:Q4_K_M, " in text


async def test_who_cant_wait_is_told_how_far_it_is(tmp_path: Path, hub: Hub) -> None:
    hub.fault(FILE, stall_after=100_000)
    book = cookbook(tiny=of_hub(max_wait_in_queue_ms=300))
    env = environment(hub, tmp_path / "hf")
    async with running_node(tmp_path / "node", book, env=env) as node:
        reply = await ask(node)
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "5"
        document = reply.json()
        assert document["error"]["type"] == "queue_timeout"
        loading = document["loading"]
        assert (loading["model"], loading["state"], loading["node"]) == ("tiny", "downloading", "node-a")
        assert 0 < loading["progress"] < 1
        # It goes on without them.
        hub.faults[FILE].resume.set()
        await wait_document(node, "/v1/models/tiny", lambda d: d["status"]["value"] == "unloaded")
        assert len(await ask_well(node)) == 5


async def test_killed_in_the_middle_it_goes_on_where_it_was(tmp_path: Path, hub: Hub) -> None:
    content = os.urandom(24 << 20)  # not a model: what counts is how it comes
    hub.add("someone/big", {"big.gguf": content})
    fault = hub.fault("big.gguf", stall_after=16 << 20)
    env = environment(hub, tmp_path / "hf")
    book = cookbook(big=of_hub("someone/big", startup_timeout_seconds=5))
    blobs = tmp_path / "hf" / "hub" / "models--someone--big" / "blobs"
    async with running_node(tmp_path / "node", book, env=env) as node:
        await node.client.post("/admin/prewarm", json={"model": "big", "wait": False})

        def journaled() -> int:
            for journal in blobs.glob("*.journal"):
                return sum(end - start for start, end in json.loads(journal.read_text())["ranges"])
            return 0

        await wait_until(lambda: journaled() == 16 << 20, "no journal of all that came")
        node.send_signal(signal.SIGKILL)
        await node.wait_end()
    sent, fault.stall_after = hub.sent, None
    assert sent == 16 << 20
    async with running_node(tmp_path / "node", book, env=env) as node:
        await node.client.post("/admin/prewarm", json={"model": "big", "wait": False})
        await node.wait_event("downloaded")
    assert hub.sent == len(content), "what was there was fetched again"
    [blob] = blobs.iterdir()
    assert blob.read_bytes() == content
    resumed = [one.range for one in hub.asked("store")]
    assert resumed[-1] == f"bytes={16 << 20}-{len(content) - 1}"


async def test_two_nodes_on_one_disk_fetch_it_once(tmp_path: Path, hub: Hub) -> None:
    fault = hub.fault(FILE, stall_after=100_000)
    env = environment(hub, tmp_path / "hf")
    async with (
        running_node(tmp_path / "a", cookbook(tiny=of_hub()), env=env) as one,
        running_node(tmp_path / "b", cookbook(tiny=of_hub()), env=env) as two,
        trio.open_nursery() as nursery,
    ):
        texts: list[str] = []

        async def have(node: Any) -> None:
            texts.append(await ask_well(node))

        for node in (one, two):
            nursery.start_soon(have, node)
            await wait_document(node, "/v1/models/tiny", lambda d: d["status"]["value"] == "downloading")
        fault.resume.set()
    assert len(texts) == 2
    assert len(hub.asked("store")) == 1


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        (
            "someone/gated",
            r"someone/gated is gated: accept its conditions at .*/someone/gated, then set HF_TOKEN",
        ),
        ("someone/missing", "there is no public repository someone/missing"),
        (f"{REPO}:Q2_K", "there is no Q2_K in it; it has Q4_K_M, Q8_0"),
    ],
)
async def test_what_cant_be_had_is_said(tmp_path: Path, hub: Hub, repo: str, message: str) -> None:
    hub.add("someone/gated", {FILE: b"secret"}, gated=True, allowed=frozenset({"token"}))
    env = environment(hub, tmp_path / "hf")
    async with running_node(tmp_path / "node", cookbook(tiny=of_hub(repo)), env=env) as node:
        reply = await ask(node)
        assert reply.status_code == 503
        error = error_of(reply)
        assert error["type"] == "spawn_failures_exhausted"
        assert re.search(message, error["message"]), error["message"]
        status = (await entry_of(node, "tiny"))["status"]
        assert status["value"] == "failed"
        assert status["reason"] in error["message"]


async def test_offline_the_cache_serves_and_nobody_is_asked(tmp_path: Path, hub: Hub) -> None:
    env = environment(hub, tmp_path / "hf")
    async with running_node(tmp_path / "node", cookbook(tiny=of_hub()), env=env) as node:
        assert len(await ask_well(node)) == 5
    before = len(hub.seen)
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    book = cookbook(tiny=of_hub(), other=of_hub(f"{REPO}:Q8_0"))
    async with running_node(tmp_path / "node", book, env=offline) as node:
        assert len(await ask_well(node)) == 5
        reply = await ask(node, "other")
        assert reply.status_code == 503
        assert "HF_HUB_OFFLINE forbids" in error_of(reply)["message"]
    assert len(hub.seen) == before


async def test_a_file_at_an_address(tmp_path: Path, hub: Hub, tiny_model: Path) -> None:
    hub.add("plain/x", {"web.gguf": tiny_model.read_bytes()})
    arguments = "-c 1024 -np 1 -t 1"
    good = {"id": "default", "url": f"{hub.store_url}/plain/x/web.gguf", "llama_server_args": arguments}
    good["sha256"] = digest_of(tiny_model)
    wrong = {**good, "sha256": "0" * 64}
    env = environment(hub, tmp_path / "hf")
    async with running_node(tmp_path / "node", cookbook(web=good, wrong=wrong), env=env) as node:
        assert len(await ask_well(node, "web")) == 5
        reply = await ask(node, "wrong")
        assert reply.status_code == 503
        assert "isn't what it should be" in error_of(reply)["message"]


async def test_every_file_of_a_folder_is_a_model(tmp_path: Path, hub: Hub, tiny_model: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    settings = {"models_dir": str(models), "default_model": "one"}
    env = environment(hub, tmp_path / "hf")
    async with running_node(tmp_path / "node", "models: []", settings, env=env) as node:
        for name in ("one", "two"):
            os.link(tiny_model, models / f"{name}.gguf")
            path = f"/v1/models/{name}"
            await wait_document(node, path, lambda d: "error" not in d)
            assert len(await ask_well(node, name)) == 5
        (models / "one.gguf").unlink()
        await wait_document(node, "/v1/models", lambda d: [one["id"] for one in d["data"]] == ["two"])


async def test_a_model_that_was_added_is_served_within_moments(tmp_path: Path, hub: Hub) -> None:
    env = environment(hub, tmp_path / "hf")
    async with running_node(tmp_path / "node", "models: []", env=env) as node:
        cookbook_path = tmp_path / "node" / "cookbook.yaml"
        words = ["add", f"{REPO}:Q4_K_M", "--cookbook", str(cookbook_path), "--args=-c 1024 -np 1 -t 1"]
        command = [sys.executable, "-m", "llamesh", *words]
        await trio.run_process(command, env=clean_environment(env), capture_stdout=True)
        await wait_document(node, "/v1/models/tiny", lambda d: "error" not in d)
        assert len(await ask_well(node)) == 5
