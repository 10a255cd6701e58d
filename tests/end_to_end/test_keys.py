"""Tokens of a key, as a real engine counts them; and keys in the files of a real node."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import trio

from tests.end_to_end.cookbooks import CHAT, chat, cookbook, profile
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS, Node, running_node

ALICE = {"authorization": "Bearer key-of-alice"}
BOSS = {"authorization": "Bearer key-of-the-boss"}


def auth(**limits: Any) -> dict[str, Any]:
    return {
        "auth": {
            "enabled": True,
            "allowed_keys": [{"name": "alice", "key": "key-of-alice", **limits}],
            "admin_keys": ["key-of-the-boss"],
        }
    }


async def used(node: Node) -> dict[str, int]:
    """What counts against alice."""
    reply = await node.client.get("/api/v1/keys", headers=BOSS)
    found = next(one["used"] for one in reply.json()["keys"] if one["name"] == "alice")
    assert isinstance(found, dict)
    return found


async def wait_tokens(node: Node, expected: int) -> None:
    tokens = -1
    with trio.move_on_after(PATIENCE_SECONDS):
        while (tokens := (await used(node))["tokens_per_minute"]) != expected:
            await trio.sleep(POLL_SECONDS)
        return
    raise AssertionError(f"{tokens} tokens are counted, not {expected}")


async def test_tokens_are_those_that_the_engine_reports(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(
        tiny=profile(tiny_model), embed=profile(tiny_model, "--embedding --pooling mean -c 1024")
    )
    config = auth(tokens_per_minute=1_000_000)
    async with running_node(tmp_path, recipes, config, binary_path=engine_binary) as node:
        whole = (await node.client.post(CHAT, json=chat("tiny", 7), headers=ALICE)).json()["usage"]
        assert whole["completion_tokens"] == 7
        assert whole["prompt_tokens"] > 0
        await wait_tokens(node, each := whole["total_tokens"])
        # The same again: its prompt is in the cache, and counts all the same. Streamed, it has no `usage`.
        for number, more in ((2, {}), (3, {"stream": True}), (4, {"stream": True, "cache_prompt": False})):
            reply = await node.client.post(CHAT, json=chat("tiny", 7, **more), headers=ALICE)
            assert reply.status_code == 200
            assert len(reply.text) > 100
            await wait_tokens(node, number * each)
        reply = await node.client.post(
            "/v1/embeddings", json={"model": "embed", "input": "a few words"}, headers=ALICE
        )
        await wait_tokens(node, 4 * each + reply.json()["usage"]["total_tokens"])


async def test_what_was_used_of_a_day_is_in_the_file_and_no_key(tmp_path: Path) -> None:
    while time.time() % 86_400 > 86_340:
        await trio.sleep(POLL_SECONDS)
    recipes = cookbook(m=profile(fake_profile_file(tmp_path, "m")))
    path = tmp_path / "node-metrics.json"
    for life in (1, 2):
        async with running_node(
            tmp_path, recipes, auth(requests_per_day=5), binary_path=FAKE_LLAMA_SERVER
        ) as node:
            for _ in range(2):
                assert (await node.client.post(CHAT, json=chat("m"), headers=ALICE)).status_code == 200
            assert (await used(node))["requests_per_day"] == 2 * life
            assert await node.stop() == 0
        kept = json.loads(path.read_text())
        assert kept["keys"]["alice"]["day_requests"] == 2 * life
        assert "running" not in kept["keys"]["alice"]
        assert "key-of" not in path.read_text()
