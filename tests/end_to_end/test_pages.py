"""The GETs: health, readiness, version, models, metrics and the node's own entry in the mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

import llamesh
from tests.end_to_end.cookbooks import ask, ask_well, cookbook, entry_of, error_of, profile, wait_document
from tests.support.node import Node, running_node

NODE_FIELDS = {
    *("ready", "version", "llama_cpp_version", "address", "active_instances", "current_requests"),
    *("loaded_models", "supported_models", "model_stats", "available_vram", "available_sysmem"),
    *("external_vram_mb", "device_vram_used_mb", "device_vram_total_mb", "gpu_telemetry_available"),
    *("total_queue_length", "last_seen", "started_at_unix"),
}


async def get(node: Node, path: str) -> Any:
    """The document at `path`."""
    reply = await node.client.get(path)
    assert reply.status_code == 200, (path, reply.text)
    assert reply.headers["content-type"] == "application/json"
    return reply.json()


async def test_health_readiness_and_version(tmp_path: Path, tiny_model: Path) -> None:
    settings = {"node_id": "one.two-3"}
    async with running_node(tmp_path, cookbook(tiny=profile(tiny_model)), settings) as node:
        assert await get(node, "/healthz") == await get(node, "/health") == {"status": "ok"}
        ready = await get(node, "/readyz")
        assert (ready["status"], ready["can_spawn"]) == ("ready", True)
        version = await get(node, "/version")
        assert version["version"] == llamesh.__version__
        assert version["node_id"] == "one.two-3"
        assert version["engine"] == "embedded"
        assert version["llama_cpp_version"]
        head = await node.client.head("/healthz")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["x-request-id"]
        for path, method, allowed in (
            ("/healthz", "POST", "GET, HEAD"),
            ("/v1/chat/completions", "GET", "POST"),
            ("/v1/models", "DELETE", "GET, HEAD"),
        ):
            reply = await node.client.request(method, path)
            assert (reply.status_code, error_of(reply)["type"]) == (405, "method_not_allowed"), path
            assert reply.headers["allow"] == allowed
        nowhere = await node.client.get("/nowhere")
        assert (nowhere.status_code, error_of(nowhere)["type"]) == (404, "not_found")


async def test_the_list_of_models(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    tiny = {
        "description": "says letters",
        "profiles": [
            profile(tiny_model, description="the usual"),
            profile(tiny_model, id="wide", idle_timeout_seconds=7),
        ],
    }
    async with running_node(tmp_path, cookbook(tiny=tiny), binary_path=engine_binary) as node:
        await ask_well(node)
        listed = await get(node, "/v1/models")
        assert listed["object"] == "list"
        usual, wide = listed["data"]
        assert usual == await entry_of(node, "tiny") == await entry_of(node, "TINY:default")
        assert {k: usual[k] for k in ("id", "object", "owned_by", "status", "context_length")} == {
            "id": "tiny",
            "object": "model",
            "owned_by": "node-a",
            "status": {"value": "loaded"},
            "context_length": 1024,
        }
        assert usual["created"] == wide["created"]
        metadata = usual["metadata"]
        assert metadata["parsed_model_params"] == {"n_ctx": 1024, "n_ctx_train": 8192, "n_slots": 1}
        assert metadata["model"] == "tiny"
        assert metadata["profile_id"] == "default"
        assert metadata["description"] == "says letters"
        assert metadata["profile_description"] == "the usual"
        assert metadata["idle_timeout_seconds"] == 300
        assert wide["id"] == "tiny:wide"
        assert wide["status"] == {"value": "unloaded"}
        assert wide["metadata"]["idle_timeout_seconds"] == 7
        unknown = await node.client.get("/v1/models/tiny:nothing")
        assert (unknown.status_code, error_of(unknown)["param"]) == (404, "model")


async def test_metrics_count_what_happened(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    recipes = cookbook(tiny=profile(tiny_model), idle=profile(tiny_model))
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        for tokens in (3, 11):
            await ask_well(node, max_tokens=tokens)
        assert (await ask(node, max_tokens=13, stream=True)).status_code == 200
        assert (await ask(node, messages="no list")).status_code == 400
        assert (await ask(node, "nobody")).status_code == 404

        document = await wait_document(
            node, "/metrics/json", lambda d: d["hashes"]["tiny:default"]["tokens_generated_total"] == 27
        )
        assert document["node_id"] == "node-a"
        assert document["version"] == llamesh.__version__
        assert (document["requests_total"], document["errors_total"]) == (5, 2)
        assert document["current_requests"] == 0
        assert isinstance(document["node_resources"], dict)
        assert set(document["hashes"]) == {"tiny:default", "idle:default"}
        tiny, idle = document["hashes"]["tiny:default"], document["hashes"]["idle:default"]
        assert tiny["display_names"] == ["tiny:default"]
        assert (tiny["requests_total"], tiny["errors_total"], tiny["instance_count"]) == (4, 1, 1)
        assert (idle["requests_total"], idle["tokens_generated_total"], idle["instance_count"]) == (0, 0, 0)

        text = (await node.client.get("/metrics")).text
        samples = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        of_tiny = (("model", "tiny"), ("profile", "default"))
        ok = (
            ("model", "tiny"),
            ("node", "node-a"),
            ("outcome", "ok"),
            ("profile", "default"),
            ("source", "client"),
        )
        assert samples["llamesh_requests_total", *ok] == 3
        assert samples["llamesh_instances", *of_tiny, ("state", "ready")] == 1
        assert samples["llamesh_request_duration_seconds_count", *of_tiny] == 4
        assert samples["llamesh_instance_starts_total", *of_tiny] == 1
        assert samples["llamesh_ready",] == 1
        assert 27 in samples.values()


async def test_the_node_among_the_nodes(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    recipes = cookbook(tiny=[profile(tiny_model), profile(tiny_model, id="more")])
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        await ask_well(node)
        document = await get(node, "/cluster/nodes")
        assert set(document["nodes"]) == {"node-a"}
        own = document["nodes"]["node-a"]
        assert set(own) >= NODE_FIELDS
        assert own["ready"] is True
        assert own["version"] == llamesh.__version__
        assert own["address"] == node.url
        assert (own["active_instances"], own["current_requests"], own["total_queue_length"]) == (1, 0, 0)
        assert own["loaded_models"] == ["tiny:default"]
        assert own["supported_models"] == ["tiny:default", "tiny:more"]
        assert set(own["model_stats"]) == {"tiny:default", "tiny:more"}
        assert set(own["model_stats"]["tiny:default"]) >= {
            *("instance_count", "queue_len", "tps", "vram_mb", "sysmem_mb")
        }
        assert own["model_stats"]["tiny:default"]["instance_count"] == 1
        assert own["last_seen"] >= own["started_at_unix"]
