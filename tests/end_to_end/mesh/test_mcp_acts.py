"""An assistant at one node has another one load, unload, drain."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.end_to_end.cookbooks import wait_document
from tests.end_to_end.mesh.parts import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mcp import fail, mcp_client, use
from tests.support.mesh import running_mesh
from tests.support.node import PATIENCE_SECONDS


async def test_acts_on_another_node(tmp_path: Path) -> None:
    members = {"node-a": fakes(tmp_path / "fa", m={}), "node-b": fakes(tmp_path / "fb", m={}, far={})}
    async with running_mesh(tmp_path, members, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("far", at="node-a", by="node-b")
        async with mcp_client(a.node) as client:
            assert (await use(client, "load_model", model="m", node="node-b"))["status"] == "loaded"
            gone = await use(client, "unload_model", model="m", node="node-b")
            assert (gone["node"], gone["unloading"]) == ("node-b", ["m:default#1"])
            await wait_document(b.node, "/running", lambda d: not d["running"])
            assert await use(client, "drain_node", node="node-b") == {"node": "node-b", "status": "draining"}
            assert (await b.node.client.get("/readyz")).status_code == 503
            assert (await a.node.client.get("/readyz")).status_code == 200
            assert "draining" in await fail(client, "load_model", model="m", node="node-b")
            assert await use(client, "undrain_node", node="node-b") == {"node": "node-b", "status": "ready"}
            assert (await b.node.client.get("/readyz")).status_code == 200
            assert "no node 'far'" in await fail(client, "drain_node", node="far")
            assert (await a.node.client.get("/readyz")).status_code == 200
            await use(client, "load_model", model="far", node="node-b")
            with trio.fail_after(PATIENCE_SECONDS):  # until the news of it has come
                while "loaded on node-b" not in (said := await fail(client, "unload_model", model="far")):
                    assert "knows no model 'far'" in said
