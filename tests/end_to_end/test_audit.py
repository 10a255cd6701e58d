"""The audit file over the life of a node and over the mesh, and a node that is open to all."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
import yaml

from tests.end_to_end.cookbooks import CHAT, chat, cookbook
from tests.end_to_end.mesh.parts import NO_MODELS, fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import running_mesh
from tests.support.node import Node, running_node, wait_until

STATE = "/api/v1/state"


def audit_of(directory: Path) -> list[dict[str, Any]]:
    path = directory / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n") if line] if path.exists() else []


async def wait_line(directory: Path, **fields: Any) -> dict[str, Any]:
    """The one line with these fields."""

    def found() -> list[dict[str, Any]]:
        return [line for line in audit_of(directory) if fields.items() <= line.items()]

    await wait_until(lambda: bool(found()), lambda: f"no line with {fields} in {audit_of(directory)}")
    [line] = found()
    return line


def writing(directory: Path) -> dict[str, Any]:
    return {"audit": {"enabled": True, "directory": str(directory)}}


async def concerns(node: Node) -> set[str]:
    return {one["what"] for one in (await node.client.get(STATE)).json()["attention"]}


async def test_who_asked_is_known_where_the_client_is(tmp_path: Path) -> None:
    """The node with the client knows the key, the one that serves from which node it came."""
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
    each = {name: writing(tmp_path / f"audit-{name}") for name in cookbooks}
    keys = {"enabled": True, "allowed_keys": ["a-key-of-someone"], "admin_keys": ["the-admins-key"]}
    each["node-a"]["auth"] = keys
    async with running_mesh(tmp_path, cookbooks, each=each, binary_path=FAKE_LLAMA_SERVER) as mesh:
        client = mesh["node-a"].node.client
        client.headers["x-api-key"] = "the-admins-key"
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        headers = {"x-api-key": "a-key-of-someone", "x-request-id": "far"}
        assert (await client.post(CHAT, json=chat("m"), headers=headers)).status_code == 200
        entry = await wait_line(tmp_path / "audit-node-a", request_id="far")
        serving = await wait_line(tmp_path / "audit-node-b", request_id="far")
        assert (entry["node"], entry["served_by"], entry["origin"]) == ("node-a", "node-b", "")
        assert (serving["node"], serving["served_by"], serving["origin"]) == ("node-b", "node-b", "node-a")
        assert serving["key"] == ""
        for line in (entry, serving):
            assert (line["model"], line["status"], line["address"]) == ("m:default", 200, "127.0.0.1")
            assert line["completion_tokens"] > 0
        reply = await client.post("/admin/prewarm", json={"model": "m", "node": "node-b"})
        assert reply.status_code == 200
        asked = await wait_line(tmp_path / "audit-node-a", what="admin")
        assert (asked["path"], asked["target"], asked["outcome"]) == ("/admin/prewarm", "node-b", "ok")
        done = await wait_line(tmp_path / "audit-node-b", what="admin")
        assert (done["origin"], done["model"], done["outcome"]) == ("node-a", "m", "ok")


async def test_it_survives_the_node(tmp_path: Path) -> None:
    directory = tmp_path / "audits"
    config = writing(directory)
    for number, how in enumerate((signal.SIGTERM, signal.SIGKILL, signal.SIGTERM)):
        async with running_node(
            tmp_path, fakes(tmp_path, m={}), config, binary_path=FAKE_LLAMA_SERVER
        ) as node:
            headers = {"x-request-id": f"life-{number}"}
            assert (await node.client.post(CHAT, json=chat("m"), headers=headers)).status_code == 200
            if how == signal.SIGKILL:
                await wait_line(directory, request_id=f"life-{number}")
            await node.stop(how)
    assert [line["request_id"] for line in audit_of(directory)] == ["life-0", "life-1", "life-2"]


async def test_a_directory_that_cant_be_used_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match=r"audit\.directory .* can't be used"):
        async with running_node(
            tmp_path, cookbook(), writing(tmp_path / "file"), binary_path=FAKE_LLAMA_SERVER
        ):
            pass


async def test_a_disk_that_says_no_is_told_and_holds_up_nobody(tmp_path: Path) -> None:
    directory = tmp_path / "audits"
    async with running_node(
        tmp_path, fakes(tmp_path, m={}), writing(directory), binary_path=FAKE_LLAMA_SERVER
    ) as node:
        shutil.rmtree(directory)
        directory.write_text("a file in its way")
        for _ in range(3):
            assert (await node.client.post(CHAT, json=chat("m"))).status_code == 200
        told = await node.wait_event("the audit file can't be written")
        assert told["level"] == "error"
        with trio.fail_after(20):
            while "audit" not in await concerns(node):
                await trio.sleep(0.05)
        [concern] = [
            one for one in (await node.client.get(STATE)).json()["attention"] if one["what"] == "audit"
        ]
        assert str(tmp_path) not in json.dumps(concern)
        directory.unlink()
        await wait_until(lambda: len(audit_of(directory)) == 3, "the lines that waited are written")
        with trio.fail_after(20):
            while "audit" in await concerns(node):
                await trio.sleep(0.05)


# Open to all.


@pytest.mark.parametrize(
    ("config", "open_address"),
    [
        ({"listen_addr": "0.0.0.0:0"}, "0.0.0.0"),
        ({"listen_addr": "[::]:0"}, "[::]"),
        ({"listen_addr": "localhost:0"}, ""),
        ({"listen_addr": "127.0.0.2:0"}, ""),
        ({"listen_addr": "0.0.0.0:0", "auth": {"enabled": True, "allowed_keys": ["k"]}}, ""),
        # Peers need the mesh's token: this port is nobody else's.
        ({"cluster": {"enabled": True, "listen_addr": "0.0.0.0:0", "discovery": {"mdns": False}}}, ""),
    ],
)
async def test_an_open_node_says_so_loudly(tmp_path: Path, config: dict[str, Any], open_address: str) -> None:
    if config.get("cluster"):
        config["cluster"]["noise"] = {"config_dir": str(tmp_path / "keys")}
    async with running_node(tmp_path, cookbook(), config, binary_path=FAKE_LLAMA_SERVER) as node:
        await node.wait_event("listening")
        host = "[::1]" if "::" in open_address else "127.0.0.2" if "127.0.0.2" in node.url else "127.0.0.1"
        url = f"http://{host}:{node.port}{STATE}"
        state = (await node.client.get(url, headers={"x-api-key": "k"})).json()
        found = [one for one in state["attention"] if one["what"] == "no_auth"]
        stderr = "".join(node.errors)
        if open_address:
            assert open_address in found[0]["text"]
            assert stderr.count("WARNING: no key is asked for") == 1
            assert f"on {open_address}:{node.port}" in stderr
            [warned] = [entry for entry in node.events if "whoever reaches" in str(entry.get("event"))]
            assert warned["level"] == "warning"
        else:
            assert found == []
            assert stderr == ""


async def test_keys_that_are_taken_away_while_it_runs(tmp_path: Path) -> None:
    config = {"listen_addr": "0.0.0.0:0", "auth": {"enabled": True, "allowed_keys": ["k"]}}
    async with running_node(tmp_path, cookbook(), config, binary_path=FAKE_LLAMA_SERVER) as node:
        assert "".join(node.errors) == ""
        path = tmp_path / "config.yaml"
        told = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(told | {"auth": {"enabled": False}}))
        await node.wait_event("reloaded")
        await wait_until(lambda: "no key is asked for" in "".join(node.errors), "it is said")
