"""Files of a running node are edited: what changed takes effect, the rest isn't disturbed."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import trio

from tests.end_to_end.cookbooks import (
    ask,
    ask_well,
    chat,
    cookbook,
    error_of,
    pid_of,
    profile,
    wait_document,
    wait_running,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.node import Node, running_node, wait_until

LANE_PATHS = ("/v1/models", "/metrics/json")
"""One page of the fast lane, one of the slow lane."""


@asynccontextmanager
async def faked(tmp_path: Path, recipes: Any, config: Any = None) -> AsyncIterator[Node]:
    async with running_node(tmp_path / "node", recipes, config, binary_path=FAKE_LLAMA_SERVER) as node:
        yield node


def write(node: Node, recipes: Any) -> None:
    """Edit the cookbook in place."""
    text = recipes if isinstance(recipes, str) else json.dumps(recipes, indent=1)
    (node.directory / "cookbook.yaml").write_text(text)


def configure(node: Node, **changes: Any) -> None:
    """Edit the configuration; a new file takes its name."""
    path = node.directory / "config.yaml"
    new = path.with_suffix(".new")
    new.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    new.replace(path)


async def reload(node: Node, **headers: str) -> Any:
    reply = await node.client.post("/admin/reload", headers=headers)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_models_come_and_go_while_it_runs(tmp_path: Path) -> None:
    a, b, c = (fake_profile_file(tmp_path, name) for name in "abc")
    async with faked(tmp_path, cookbook(a=profile(a), b=profile(b))) as node:
        await ask_well(node, "a")
        await ask_well(node, "b")
        pid = pid_of(node, "a:default")
        write(node, cookbook(a=profile(a), c=profile(c)))
        told = await node.wait_event("reloaded")
        assert (told["added"], told["removed"], told["changed"]) == (["c:default"], ["b:default"], [])
        await node.wait_event("gone", instance="b:default#2", reason="no longer in the cookbook")
        await ask_well(node, "c")
        refused = await ask(node, "b")
        assert (refused.status_code, error_of(refused)["type"]) == (404, "model_not_found")
        names = {entry["id"] for entry in (await node.client.get("/v1/models")).json()["data"]}
        assert names == {"a", "c"}
        await ask_well(node, "a")
        assert (pid_of(node, "a:default"), len(launches(a))) == (pid, 1)
        text = (await node.client.get("/metrics")).text
        assert "llamesh_reloads_total 1.0" in text
        assert 'llamesh_instance_drains_total{reason="reload"} 1.0' in text
        assert await node.stop() == 0


async def test_changed_arguments_run_with_the_next_request(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", launches=[{"gate": str(gate), "gate_after": 1}, {}])
    async with faked(tmp_path, cookbook(slow=profile(slow, "-c 1024 -np 1"))) as node:
        replies: list[httpx.Response] = []

        async def post() -> None:
            replies.append(await ask(node, "slow"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(post)
            await wait_document(node, "/running", lambda d: [i["busy"] for i in d["running"]] == [1])
            nursery.start_soon(post)
            await wait_running(node, 2)
            write(node, cookbook(slow=profile(slow, "-c 2048 -np 1")))
            await node.wait_event("draining", instance="slow:default#1", reason="changed in the cookbook")
            assert len(launches(slow)) == 1
            gate.touch()
        # What ran was finished by the old one, what waited is answered by the new one.
        assert [reply.status_code for reply in replies] == [200, 200]
        await node.wait_event("request", after=1, status=200)
        served = [entry["instance"] for entry in node.find_events("request", path="/v1/chat/completions")]
        assert served == ["slow:default#1", "slow:default#2"]
        await node.wait_event("gone", instance="slow:default#1")
        words = psutil.Process(pid_of(node, "slow:default")).cmdline()
        assert words[words.index("-c") + 1] == "2048"


async def test_an_idle_one_with_changed_arguments_leaves_at_once(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    async with running_node(
        tmp_path, cookbook(tiny=profile(tiny_model, "-c 1024 -np 1")), binary_path=engine_binary
    ) as node:
        await ask_well(node)
        write(node, cookbook(tiny=profile(tiny_model, "-c 1024 -np 2")))
        await node.wait_event("gone", instance="tiny:default#1")
        await ask_well(node)
        [running] = (await node.client.get("/running")).json()["running"]
        assert (running["instance"], running["slots"]) == ("tiny:default#2", 2)


async def test_changed_limits_touch_no_instance(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", gate=str(gate))
    async with faked(tmp_path, cookbook(slow=profile(slow, "-np 1"))) as node, trio.open_nursery() as nursery:
        nursery.start_soon(ask_well, node, "slow")
        await wait_document(node, "/running", lambda d: [i["busy"] for i in d["running"]] == [1])
        nursery.start_soon(ask_well, node, "slow")
        await wait_running(node, 2)
        write(node, cookbook(slow=profile(slow, "-np 1", max_queue_size=1, idle_timeout_seconds=0.1)))
        changed = await node.wait_event("reloaded")
        assert changed["changed"] == ["slow:default"]
        full = await ask(node, "slow")
        assert (full.status_code, error_of(full)["type"]) == (503, "queue_full")
        assert len(launches(slow)) == 1
        assert node.find_events("draining") == []
        gate.touch()
        # The instance that was there all the time obeys its new timeout.
        await node.wait_event("gone", instance="slow:default#1", reason="idle for 0.1 s")


async def test_who_waits_for_a_removed_model_is_told(tmp_path: Path) -> None:
    never = fake_profile_file(tmp_path, "never", ready_when=str(tmp_path / "no"))
    replies: list[httpx.Response] = []
    async with faked(tmp_path, cookbook(never=profile(never))) as node:

        async def wait_in_vain() -> None:
            replies.append(await ask(node, "never"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_in_vain)
            nursery.start_soon(wait_in_vain)
            await wait_running(node, 2)
            write(node, "models: []\n")
        assert [reply.status_code for reply in replies] == [404, 404]
        assert "removed" in error_of(replies[0])["message"]
        await node.wait_event("gone", instance="never:default#1")
        assert node.children() == []
        assert node.find_events("defect") == []


async def test_a_name_that_becomes_an_alias_or_is_spelled_otherwise(tmp_path: Path) -> None:
    """The instance of the old name leaves; it is never mistaken for one of the new."""
    file = fake_profile_file(tmp_path, "file")
    async with faked(tmp_path, cookbook(old=profile(file))) as node:
        await ask_well(node, "old")
        write(node, cookbook(new={"aliases": ["old"], "profiles": [profile(file)]}))
        await node.wait_event("gone", instance="old:default#1")
        assert (await ask(node, "old")).headers["x-llamesh-profile"] == "new:default"
        write(node, cookbook(NEW=profile(file)))
        await node.wait_event("gone", instance="new:default#2")
        assert (await ask(node, "new")).headers["x-llamesh-profile"] == "NEW:default"
        write(node, "models: []\n")
        await node.wait_event("gone", instance="NEW:default#3")
        assert (await node.client.get("/running")).json() == {"running": []}
        assert await node.stop() == 0
        assert node.find_events("defect") == []


async def test_a_bad_edit_is_refused_whole_and_shown(tmp_path: Path) -> None:
    file = fake_profile_file(tmp_path, "file")
    good = cookbook(a=profile(file))
    async with faked(tmp_path, good) as node:
        await ask_well(node, "a")
        write(node, cookbook(a=profile(file, idle_timeout_seconds="soon"), b=profile(file)))
        told = await node.wait_event("a file was changed and has a mistake; the old one stays")
        place = "models[0].profiles[0].idle_timeout_seconds"
        assert told["level"] == "error"
        assert str(node.directory / "cookbook.yaml") in told["problem"]
        assert place in told["problem"]
        ready = await node.client.get("/readyz")
        assert ready.status_code == 200
        [problem] = ready.json()["config_problems"]
        # Everybody may read this page: what is wrong, not where on the disk.
        assert problem.startswith("cookbook.yaml:")
        assert place in problem
        assert str(node.directory) not in ready.text
        text = (await node.client.get("/metrics")).text
        assert "llamesh_config_in_force 0.0" in text
        assert "llamesh_reload_failures_total 1.0" in text
        assert (await ask(node, "b")).status_code == 404
        refused = await node.client.post("/admin/reload")
        assert (refused.status_code, error_of(refused)["type"]) == (400, "invalid_request_error")
        assert place in refused.json()["problems"][0]
        write(node, good)
        await wait_document(node, "/readyz", lambda document: document["config_problems"] == [])
        assert "llamesh_config_in_force 1.0" in (await node.client.get("/metrics")).text
        await ask_well(node, "a")
        assert len(launches(file)) == 1


async def test_an_emptied_file_takes_no_model_away(tmp_path: Path) -> None:
    file = fake_profile_file(tmp_path, "file")
    async with faked(tmp_path, cookbook(a=profile(file))) as node:
        await ask_well(node, "a")
        write(node, "")
        [problem] = (await wait_document(node, "/readyz", lambda d: bool(d["config_problems"])))[
            "config_problems"
        ]
        assert "is empty now" in problem
        await ask_well(node, "a")
        (node.directory / "cookbook.yaml").unlink()
        await wait_document(node, "/readyz", lambda d: "doesn't exist" in d["config_problems"][0])
        await ask_well(node, "a")
        assert len(launches(file)) == 1


async def test_reload_on_request_says_what_changed(tmp_path: Path) -> None:
    file = fake_profile_file(tmp_path, "file")
    async with faked(tmp_path, cookbook(a=profile(file), b=profile(file))) as node:
        nothing: dict[str, list[str]] = {
            "added": [],
            "removed": [],
            "changed": [],
            "aliases": [],
            "settings": [],
            "needs_restart": [],
        }
        assert await reload(node) == nothing
        write(node, cookbook(a=profile(file, "-c 2048"), c={"aliases": ["sea"], "profiles": [profile(file)]}))
        configure(node, max_hops=2, http={"idle_timeout_seconds": 9})
        # At once, without a look of the watcher; if it was faster, the log has it.
        await reload(node)
        told = await node.wait_event("reloaded")
        assert (told["added"], told["removed"], told["changed"]) == (
            ["c:default"],
            ["b:default"],
            ["a:default"],
        )
        assert (told["aliases"], told["settings"]) == (["sea"], ["max_hops"])
        restart = await node.wait_event("these settings take effect at the next start")
        assert restart["settings"] == ["http"]
        assert await reload(node) == {**nothing, "needs_restart": ["http"]}
        assert len(node.find_events("reloaded")) == 1
        hops = await node.client.post(
            "/v1/chat/completions", json=chat("a"), headers={"X-Llama-Mesh-Hops": "3"}
        )
        assert hops.status_code == 400


async def test_keys_change_at_once_for_both_lanes(tmp_path: Path) -> None:
    file = fake_profile_file(tmp_path, "file")
    keys = {"enabled": True, "allowed_keys": ["old-key"], "admin_keys": ["root-key"]}
    async with faked(tmp_path, cookbook(a=profile(file)), {"auth": keys}) as node:

        async def statuses(key: str) -> list[int]:
            headers = {"authorization": f"Bearer {key}"}
            replies = [await node.client.get(path, headers=headers) for path in LANE_PATHS]
            replies.append(await node.client.post("/v1/chat/completions", json=chat("a"), headers=headers))
            return [reply.status_code for reply in replies]

        assert await statuses("old-key") == [200, 200, 200]
        assert await statuses("new-key") == [401, 401, 401]
        configure(node, auth={**keys, "allowed_keys": ["new-key"]})
        refused = await node.client.post("/admin/reload", headers={"authorization": "Bearer old-key"})
        assert refused.status_code in (401, 403)
        await reload(node, authorization="Bearer root-key")
        # On connections that are open, too.
        assert await statuses("old-key") == [401, 401, 401]
        assert await statuses("new-key") == [200, 200, 200]
        assert await statuses("root-key") == [200, 200, 200]
        configure(node, auth={**keys, "allowed_keys": ["new-key", "plain"], "requird_header": "x"})
        await wait_document_with(node, "/readyz")
        assert await statuses("plain") == [401, 401, 401]
        assert not [entry for entry in node.events if "-key" in json.dumps(entry)]


async def wait_document_with(node: Node, path: str) -> None:
    [problem] = (await wait_document(node, path, lambda d: bool(d["config_problems"])))["config_problems"]
    assert "requird_header" in problem


async def test_the_grace_at_shutdown_is_the_one_of_now(tmp_path: Path) -> None:
    gate = tmp_path / "never"
    slow = fake_profile_file(tmp_path, "slow", head_gate=str(gate))
    async with faked(tmp_path, cookbook(slow=profile(slow)), {"shutdown_grace_period_seconds": 3600}) as node:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, node, "slow")
            await wait_document(node, "/running", lambda d: [i["busy"] for i in d["running"]] == [1])
            configure(node, shutdown_grace_period_seconds=0.1)
            await reload(node)
            assert await node.stop() == 0
        await wait_until(lambda: node.errors == [], "it complained")
