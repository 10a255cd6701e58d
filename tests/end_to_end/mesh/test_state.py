"""The state of a mesh, seen from any of its nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import trio

from tests.end_to_end.cookbooks import CHAT, chat
from tests.end_to_end.mesh.parts import NO_MODELS, fakes
from tests.end_to_end.test_state import asking, lines_of, state_of, wait_state
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import running_mesh
from tests.support.node import PATIENCE_SECONDS


def node_of(document: dict[str, Any], node: str) -> dict[str, Any]:
    """A node's entry."""
    found: dict[str, Any] = next(one for one in document["nodes"] if one["id"] == node)
    return found


async def test_every_node_shows_the_whole_mesh(tmp_path: Path) -> None:
    """One schema, all nodes, all instances, one line for each model; the same from each of them."""
    members = {
        "node-a": fakes(tmp_path / "fa", m={}, near={}),
        "node-b": fakes(tmp_path / "fb", m={}, far={}),
    }
    async with running_mesh(tmp_path, members, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await b.ask("far")
        for here, there in ((a, b), (b, a)):
            document = await wait_state(
                here.node,
                lambda d, there=there: (
                    len(d["nodes"]) == 2 and node_of(d, there.id)["fresh"] and d["instances"]
                ),
            )
            assert document["node_id"] == here.id
            assert node_of(document, here.id)["self"]
            other = node_of(document, there.id)
            assert (other["self"], other["status"], other["ready"]) == (False, "alive", True)
            assert other["link"]["direct"]
            assert other["memory"]["ram"]["total"] > 0
            matrix = {model["name"]: set(model["nodes"]) for model in document["models"]}
            assert matrix == {"m": {"node-a", "node-b"}, "near": {"node-a"}, "far": {"node-b"}}
            [instance] = document["instances"]
            assert (instance["node"], instance["id"], instance["state"]) == (
                "node-b",
                "far:default#1",
                "ready",
            )
            assert {one["node"] for one in document["events"]} == {"node-a", "node-b"}
            assert document["attention"] == []


async def test_a_forwarded_request_is_one_with_its_path_and_its_reasons(tmp_path: Path) -> None:
    """The entry node knows the choice, the other one how far it is; both have it by the same id."""
    go = tmp_path / "go"
    recipes = fakes(tmp_path / "f", m={"slots": 1, "gate": str(go), "gate_after": 2, "tokens": 6})
    members = {"node-a": NO_MODELS, "node-b": recipes}
    async with running_mesh(tmp_path, members, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        async with asking(a.node, "far/1", stream=True) as outcome:
            for member in (a, b):
                document = await wait_state(
                    member.node,
                    lambda d: (
                        [(r["phase"], bool(r["tokens"] and r["instance"])) for r in d["requests"]]
                        == [("decode", True)]
                    ),
                )
                [one] = document["requests"]
                assert (one["id"], one["node"], one["seen_by"]) == ("far/1", "node-a", "node-a")
                assert (one["served_by"], one["via"]) == ("node-b", ["node-a", "node-b"])
                assert one["instance"] == "m:default#1"
                [choice] = one["decision"]
                assert (choice["node"], choice["why_not"]) == ("node-b", None)
                assert choice["total"] >= sum(choice["parts"].values()) * 0.99 > 0
            go.touch()
        assert outcome["status"] == 200
        for member in (a, b):
            record = (await member.node.client.get("/api/v1/requests/far/1")).json()
            assert {one["seen_by"] for one in record["records"]} == {"node-a", "node-b"}
            assert (record["node"], record["served_by"], record["status"]) == ("node-a", "node-b", 200)
            assert record["tokens"] == 6


async def test_any_node_can_end_any_request(tmp_path: Path) -> None:
    """At the entry, at the node that serves, and at one that has nothing to do with it."""
    later = tmp_path / "later"
    recipes = fakes(tmp_path / "f", m={"slots": 1})
    members = {"node-a": NO_MODELS, "node-b": recipes, "node-c": NO_MODELS}
    async with running_mesh(tmp_path, members, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        a, b, _ = mesh
        await mesh.wait_listed("m", at="node-a", by="node-b")
        for number, member in enumerate(mesh):
            name = f"it-{number}"
            async with asking(a.node, name, stream=True, fake={"head_gate": str(later)}) as outcome:
                await wait_state(b.node, lambda d: [one["phase"] for one in d["requests"]] == ["prefill"])
                reply = await member.node.client.post("/admin/cancel", json={"request_id": name})
                assert reply.status_code == 200, reply.text
            assert outcome["status"] == 499, outcome
            assert outcome["reply"].json()["error"]["type"] == "cancelled_by_operator"
            await wait_state(b.node, lambda d: not d["requests"] and node_of(d, "node-b")["running"] == 0)
        reply = await a.node.client.post("/admin/cancel", json={"request_id": "never seen"})
        assert reply.status_code == 404
        assert (await a.ask("m")).status == 200


async def test_a_node_that_stops_answering_holds_up_nobody_and_is_told(tmp_path: Path) -> None:
    """The rest is shown as before; it is suspected, then lost, and forgotten as a trouble when it is back."""
    members = {"node-a": NO_MODELS, "node-b": fakes(tmp_path / "f", m={})}
    async with running_mesh(tmp_path, members, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await wait_state(a.node, lambda d: node_of(d, "node-b")["fresh"])
        b.freeze()
        with trio.fail_after(PATIENCE_SECONDS):
            await state_of(a.node)
        document = await wait_state(a.node, lambda d: any(c["what"] == "peer_lost" for c in d["attention"]))
        [lost] = [one for one in document["attention"] if one["what"] == "peer_lost"]
        assert lost["level"] == "error"
        assert "node-b" in lost["text"]
        assert "node-b" not in {node["id"] for node in document["nodes"]}
        b.thaw()
        document = await wait_state(
            a.node, lambda d: len(d["nodes"]) == 2 and all(c["what"] != "peer_lost" for c in d["attention"])
        )
        assert "peer lost" in {one["event"] for one in document["events"]}


async def test_the_log_of_another_nodes_child(tmp_path: Path) -> None:
    members = {"node-a": NO_MODELS, "node-b": fakes(tmp_path / "f", m={"lines": ["hello from b"]})}
    async with running_mesh(tmp_path, members, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await b.node.client.post(CHAT, json=chat("m"))
        path = "/logs/stream/m?node=node-b&format=sse"
        async with a.node.client.stream("GET", path) as reply, lines_of(reply) as lines:
            with trio.fail_after(PATIENCE_SECONDS):
                assert json.loads((await anext(lines)).removeprefix("data: "))["line"] == "hello from b"
                await b.node.client.post(CHAT, json=chat("m"))
                said, asked = "", 0
                while asked < 2:
                    said = await anext(lines)
                    asked += "POST /v1/chat/completions" in said
