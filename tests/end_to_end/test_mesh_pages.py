"""Pages, metrics and prewarms over a mesh of real nodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio
from prometheus_client.parser import text_string_to_metric_families

from tests.end_to_end.mesh.parts import NO_MODELS, fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, running_mesh
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS


async def scraped(member: Member) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    reply = await member.node.client.get("/metrics")
    assert reply.status_code == 200
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


async def prewarm(member: Member, **body: Any) -> tuple[int, dict[str, Any]]:
    reply = await member.node.client.post("/admin/prewarm", json=body)
    return reply.status_code, reply.json()


async def test_pages_and_metrics(tmp_path: Path) -> None:
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path / "b", m={}, x={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        assert (await a.ask("m")).node == "node-b"

        theirs, ours = (await b.models())["m"], (await a.models())["m"]
        for name in ("id", "object", "created", "owned_by"):
            assert ours[name] == theirs[name]
        assert set(theirs["metadata"]) < set(ours["metadata"])
        assert ours["metadata"]["source"] == "cluster"
        assert ours["metadata"]["advertised_by"] == "node-b"
        assert ours["metadata"]["cluster_url"] == b.node.url
        assert (await a.get("/v1/models/m"))["owned_by"] == "node-b"
        assert (await a.get("/v1/models/x:Default"))["id"] == "x"
        assert (await a.node.client.get("/v1/models/nobody")).status_code == 404

        found = await a.nodes()
        with trio.fail_after(PATIENCE_SECONDS):
            while found["node-b"]["model_stats"].get("m:default", {}).get("instance_count") != 1:
                await trio.sleep(POLL_SECONDS)
                found = await a.nodes()
        own = (await b.nodes())["node-b"]
        assert set(own) <= set(found["node-b"])
        assert set(found["node-b"]["model_stats"]["m:default"]) == set(own["model_stats"]["m:default"])
        assert found["node-b"]["link"]["direct"] is True
        assert found["node-b"]["address"] == b.node.url

        samples = await scraped(a)
        peer = ("peer", "node-b")
        assert samples["llamesh_peers", frozenset({("status", "alive")})] == 1
        assert samples["llamesh_peer_up", frozenset({peer})] == 1
        assert samples["llamesh_forwards_total", frozenset({peer, ("outcome", "ended")})] == 1
        assert samples["llamesh_breaker_state", frozenset({peer, ("state", "closed")})] == 1
        assert samples["llamesh_forwarded_requests_running", frozenset({peer})] == 0
        assert 0 < samples["llamesh_peer_round_trip_seconds", frozenset({peer})] < 1
        assert samples["llamesh_gossip_bytes_total", frozenset({("direction", "in"), ("kind", "root")})] > 0
        handshakes = [value for (name, _), value in samples.items() if name == "llamesh_handshakes_total"]
        assert sum(handshakes) > 0
        await b.stop()
        await mesh.wait_gone("node-b")
        assert (await a.node.client.get("/v1/models/m")).status_code == 404
        assert (await scraped(a))["llamesh_peer_up", frozenset({peer})] == 0


async def test_prewarms(tmp_path: Path) -> None:
    cookbooks = {
        "node-a": fakes(tmp_path / "a", entry={"max_instances": 0}, listed={}),
        "node-b": fakes(tmp_path / "b", m={}, listed={}),
        "node-c": NO_MODELS,
    }
    each = {"node-c": {"cluster": {"serve_peers": "never"}}}
    async with running_mesh(tmp_path, cookbooks, each=each, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, _ = mesh
        await mesh.wait_listed("m", at="node-a", by="node-b")
        await mesh.wait_listed("m", at="node-c", by="node-b")

        status, answer = await prewarm(a, model="m", wait=False)
        assert (status, answer["node"]) in ((202, "node-b"), (200, "node-b")), answer
        await b.node.wait_event("ready", instance="m:default#1")
        # What is only listed here is loaded where it runs.
        status, answer = await prewarm(a, model="listed")
        assert (status, answer["status"], answer["node"]) == (200, "loaded", "node-b"), answer
        # A node that asks is no detour: who doesn't have it says so.
        for body, expected, text in (
            ({"model": "m", "node": "node-c"}, (503, "draining"), "node-c loads nothing for others"),
            ({"model": "nobody", "node": "node-b"}, (404, "model_not_found"), "node-b knows no model"),
            ({"model": "nobody"}, (404, "model_not_found"), "node-a knows no model"),
            ({"model": "m", "node": "node-x"}, (400, "invalid_request_error"), "no node 'node-x'"),
            ({"model": "m", "node": 7}, (400, "invalid_request_error"), "must be the id of a node"),
            ({"model": "m", "node": ""}, (400, "invalid_request_error"), "must be the id of a node"),
            ({"node": "node-b"}, (400, "invalid_request_error"), "`model` must name a model"),
        ):
            status, answer = await prewarm(a, **body)  # type: ignore[arg-type]
            assert (status, answer["error"]["type"]) == expected, (body, answer)
            assert text in answer["error"]["message"], (body, answer)
