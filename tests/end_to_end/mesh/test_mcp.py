"""`/mcp` in a mesh: any node answers for all of them, and acts on each."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.end_to_end.mesh.parts import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mcp import fail, mcp_client, use
from tests.support.mesh import running_mesh
from tests.support.node import PATIENCE_SECONDS


async def test_one_node_answers_for_all(tmp_path: Path) -> None:
    broken = {"exit_at_start": {"code": 1, "lines": ["invalid magic"]}}
    go = tmp_path / "go"
    members = {
        "node-a": fakes(tmp_path / "fa", m={}, near={}),
        "node-b": fakes(tmp_path / "fb", m={}, far={}, broken=broken, slow={"ready_when": str(go)}),
    }
    async with running_mesh(tmp_path, members, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("far", at="node-a", by="node-b")
        async with mcp_client(a.node) as client:
            nodes = {one["id"]: one for one in (await use(client, "list_nodes"))["nodes"]}
            assert set(nodes) == {"node-a", "node-b"}
            assert nodes["node-a"]["answered"]
            assert nodes["node-b"]["link"].startswith("direct")
            loaded = await use(client, "load_model", model="m", node="node-b")
            assert (loaded["status"], loaded["node"]) == ("loaded", "node-b")
            assert (await use(client, "load_model", model="far"))["node"] == "node-b"
            assert not a.node.find_events("starting")
            slow = await use(client, "load_model", model="slow", node="node-b", wait_seconds=0.2)
            assert (slow["status"], slow["node"]) == ("loading", "node-b")
            go.touch()
            again = await use(client, "load_model", model="slow", node="node-b")
            assert again["status"] == "loaded"
            assert len(b.node.find_events("starting", instance="slow:default#3")) == 1
            # What others say of themselves is up to a second old.
            models: dict[str, dict[str, str]] = {}
            with trio.move_on_after(PATIENCE_SECONDS):
                while models.get("far") != {"node-b": "loaded"}:
                    rows = (await use(client, "list_models"))["models"]
                    models = {one["name"]: one["nodes"] for one in rows}
            assert models["m"] == {"node-a": "fits", "node-b": "loaded"}
            assert models["far"] == {"node-b": "loaded"}
            only = await use(client, "list_models", node="node-b", query="M")
            assert [(one["name"], set(one["nodes"])) for one in only["models"]] == [("m", {"node-b"})]
            # Without `node`, logs are looked for where the model is.
            for arguments in ({"model": "far"}, {"model": "far", "node": "node-b"}):
                logs = await use(client, "read_logs", **arguments)
                assert logs["node"] == "node-b"
                assert logs["lines"][0].startswith("[far:default#")
            assert "invalid magic" in await fail(client, "load_model", model="broken", node="node-b")
            assert "invalid magic" in " ".join((await use(client, "read_logs", model="broken"))["lines"])
            note = (await use(client, "unload_model", model="m"))["note"]
            assert note == "it isn't loaded on node node-a, but on node node-b: say so with `node`"
        assert (await a.ask("far")).status == 200
        async with mcp_client(b.node) as client:
            [request] = (await use(client, "list_requests", model="far"))["requests"]
            why = await use(client, "explain_request", request_id=request["id"])
            assert why["via"] == ["node-a", "node-b"]
            assert why["seen_by"] == ["node-a", "node-b"]
            assert "It went this way: node-a -> node-b." in why["story"]
            assert "A client of node node-a asked for far:default" in why["story"][0]
            mesh_wide = await use(client, "mesh_state", sections=["instances", "nodes"], node="node-b")
            assert {one["node"] for one in mesh_wide["instances"]} == {"node-b"}
            assert [one["id"] for one in mesh_wide["nodes"]] == ["node-b"]
