"""Limits of a key, held by several nodes together; and by one through reloads, restarts and crashes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trio

from tests.end_to_end.cookbooks import error_of, openai_client
from tests.end_to_end.mesh.parts import NO_MODELS, fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, Mesh, running_mesh
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS

ALICE = {"authorization": "Bearer key-of-alice"}
BOSS = {"authorization": "Bearer key-of-the-boss"}


def keys(**limits: Any) -> dict[str, Any]:
    """A configuration with one key that has limits, and one that administers."""
    return {
        "auth": {
            "enabled": True,
            "allowed_keys": [{"name": "alice", "key": "key-of-alice", **limits}],
            "admin_keys": [{"name": "boss", "key": "key-of-the-boss"}],
        }
    }


async def entry(member: Member, name: str = "alice") -> dict[str, Any]:
    """What a node says of a key."""
    found = next(one for one in (await member.get("/api/v1/keys"))["keys"] if one["name"] == name)
    assert isinstance(found, dict)
    return found


async def wait_used(member: Member, **used: int) -> None:
    """Wait until a node knows that so much was used, over all nodes."""
    seen = None
    with trio.move_on_after(PATIENCE_SECONDS):
        while (seen := (await entry(member))["used"]) is None or not used.items() <= seen.items():
            await trio.sleep(POLL_SECONDS)
        return
    raise AssertionError(f"{member.id} knows of {seen}, not {used}")


async def join(mesh: Mesh) -> None:
    while time.time() % 86_400 > 86_340:  # what is counted of a day would be gone in the middle of it
        await trio.sleep(POLL_SECONDS)
    for member in mesh:
        member.node.client.headers.update(BOSS)
    await mesh.wait_joined()
    await mesh.wait_listed("m", at="node-a", by="node-b")


def two(tmp_path: Path) -> dict[str, Any]:
    return {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={"slots": 8})}


async def test_requests_and_tokens_of_all_nodes_count_together(tmp_path: Path) -> None:
    config = keys(requests_per_minute=6, tokens_per_day=10_000)
    async with running_mesh(tmp_path, two(tmp_path), config, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await join(mesh)
        spent = 0
        for number, member in enumerate((a, a, b, a, b, b), 1):
            answer = await member.ask("m", headers=ALICE)
            assert (answer.status, answer.node) == (200, "node-b")
            # Counted where the client is, and only there.
            spent += sum(
                json.loads(answer.body)["usage"][name] for name in ("prompt_tokens", "completion_tokens")
            )
            for one in mesh:
                await wait_used(
                    one, requests_per_minute=number, requests_per_day=number, tokens_per_day=spent
                )
        for member in (a, b):
            refused = await member.ask("m", headers=ALICE)
            assert (refused.status, refused.error["type"]) == (429, "rate_limit_exceeded")
            assert "alice" in refused.error["message"]
            assert 0 < int(refused.headers["retry-after"]) <= 65
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
            assert refused.headers["x-ratelimit-remaining-tokens"] == str(10_000 - spent)
            assert (await member.ask("m", headers=BOSS)).status == 200
            here = (await entry(member))["here"]
            assert (here["requests"], here["refused"]) == (3, {"requests_per_minute": 1})
        # What one node gossips holds names, and nothing of the keys.
        said = "".join(member.said() for member in mesh)
        assert "key-of-" not in said
        record = (await a.get("/api/v1/requests?failed=1"))["requests"][0]
        assert (record["key"], record["status"], record["error"]) == ("alice", 429, "rate_limit_exceeded")
        # The served node heard of the request from a peer, whose client's key isn't its business.
        await b.node.wait_event("request", origin="node-a", status=200)
        assert not [e for e in b.node.find_events("request", origin="node-a") if "key" in e]


async def test_so_many_at_once_over_all_nodes_and_none_of_a_dead_one(tmp_path: Path) -> None:
    config = keys(max_concurrent_requests=2)
    gate = {"gate": str(tmp_path / "never"), "gate_after": 1, "tokens": 5}
    async with running_mesh(tmp_path, two(tmp_path), config, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await join(mesh)
        async with a.talking("m", headers=ALICE, fake=gate), b.talking("m", headers=ALICE, fake=gate):
            for member in (a, b):
                await wait_used(member, max_concurrent_requests=2)
                refused = await member.ask("m", headers=ALICE)
                assert (refused.status, refused.headers["retry-after"]) == (429, "1")
                assert "max_concurrent_requests" in refused.error["message"]
        for member in (a, b):
            await wait_used(member, max_concurrent_requests=0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_hold, a, gate)
            await wait_used(b, max_concurrent_requests=1)
            await a.kill()
            # It has used what it has used, but nothing runs there any more.
            await wait_used(b, max_concurrent_requests=0, requests_per_day=3)
        assert (await b.ask("m", headers=ALICE)).status == 200


async def _hold(member: Member, gate: dict[str, Any]) -> None:
    """A request that is under way until its node dies."""
    with pytest.raises(httpx.HTTPError):
        await member.ask("m", headers=ALICE, stream=True, fake=gate)


async def test_a_day_outlasts_reload_restart_and_those_who_leave(tmp_path: Path) -> None:
    config = keys(requests_per_day=100)
    async with running_mesh(tmp_path, two(tmp_path), config, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await join(mesh)
        for _ in range(3):
            assert (await a.ask("m", headers=ALICE)).status == 200
        assert (await b.ask("m", headers=ALICE)).status == 200
        await wait_used(b, requests_per_day=4)
        # A reload that changes limits, or the key itself, leaves the counters of its name.
        file = b.node.directory / "config.yaml"
        changed = json.loads(file.read_text())
        changed["auth"]["allowed_keys"][0] |= {"requests_per_day": 5, "key": "new-key-of-alice"}
        file.write_text(json.dumps(changed))
        reply = await b.node.client.post("/admin/reload")
        assert reply.json()["settings"] == ["auth"], reply.text
        assert (await entry(b))["used"]["requests_per_day"] == 4
        new = {"authorization": "Bearer new-key-of-alice"}
        assert (await b.ask("m", headers=ALICE)).status == 401
        assert (await b.ask("m", headers=new)).status == 200
        assert (await b.ask("m", headers=new)).status == 429

        await a.stop()
        await mesh.wait_gone("node-a")
        assert (await entry(b))["used"]["requests_per_day"] == 5
        b.change({"auth": changed["auth"]})
        await b.restart()
        b.node.client.headers.update(BOSS)
        assert (await entry(b))["used"]["requests_per_day"] == 2
        await a.start()
        a.node.client.headers.update(BOSS)
        for member in (a, b):
            await wait_used(member, requests_per_day=5)
        assert (await b.ask("m", headers=new)).status == 429
        assert (await a.ask("m", headers=ALICE)).status == 200


async def test_the_official_client_sees_a_rate_limit(tmp_path: Path) -> None:
    config = keys(requests_per_minute=1, models=["tiny*"])
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, tiny={}, large={})}
    cookbooks["node-b"]["models"][0]["aliases"] = ["best"]
    async with running_mesh(tmp_path, cookbooks, config, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, _ = mesh
        for member in mesh:
            member.node.client.headers.update(BOSS)
        await mesh.wait_joined()
        await mesh.wait_listed("large", at="node-a", by="node-b")
        async with openai_client(a.node, api_key="key-of-alice") as client:
            # Of a model that only a peer has, too.
            assert [model.id async for model in client.models.list()] == ["tiny"]
            with pytest.raises(openai.PermissionDeniedError) as forbidden:
                await client.models.retrieve("large")
            assert forbidden.value.type == "forbidden"
            messages: Any = [{"role": "user", "content": "hi"}]
            reply = await client.chat.completions.create(model="best", messages=messages)
            assert reply.choices[0].message.content
            with pytest.raises(openai.RateLimitError) as limited:
                await client.chat.completions.create(model="tiny", messages=messages)
            assert limited.value.type == limited.value.code == "rate_limit_exceeded"
            assert 0 < int(limited.value.response.headers["retry-after"]) <= 65
            assert limited.value.response.headers["x-ratelimit-limit-requests"] == "1"
        aliased = keys(models=["BEST:default"])
        config_file = a.node.directory / "config.yaml"
        config_file.write_text(json.dumps(json.loads(config_file.read_text()) | aliased))
        assert (await a.node.client.post("/admin/reload")).status_code == 200
        assert set(await _listed(a)) == {"tiny"}
        assert (await a.ask("tiny", headers=ALICE)).status == 200
        denied = await a.node.client.post("/tokenize", json={"model": "large"}, headers=ALICE)
        assert (denied.status_code, error_of(denied)["type"]) == (403, "forbidden")


async def _listed(member: Member) -> list[str]:
    reply = await member.node.client.get("/v1/models", headers=ALICE)
    return [one["id"] for one in reply.json()["data"]]


async def test_keys_from_the_environment(tmp_path: Path) -> None:
    listed = json.dumps([{"name": "eve", "key": "key-of-eve", "requests_per_minute": 1}])
    config = {"auth": {"enabled": True, "admin_keys": ["key-of-the-boss"]}}
    env = {"LLAMESH_AUTH__ALLOWED_KEYS": listed}
    recipes = {"node-a": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, recipes, config, env=env, binary_path=FAKE_LLAMA_SERVER) as mesh:
        (a,) = mesh
        eve = {"authorization": "Bearer key-of-eve"}
        statuses = [(await a.ask("m", headers=eve)).status for _ in range(2)]
        assert statuses == [200, 429]
        assert (await a.ask("m", headers=BOSS)).status == 200
        await a.node.wait_event("request", key="admin-1", status=200)
