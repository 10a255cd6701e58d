"""`/mcp` of a real node, used with the official client: every tool, who may call, and what it costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
from mcp import MCPError

from tests.end_to_end.cookbooks import ask_well, cookbook, error_of, profile, wait_document
from tests.end_to_end.test_state import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mcp import ERAS, HEADERS, PATH, call_of, fail, mcp_client, post, use
from tests.support.node import CHECKOUT, running_node

TOOLS = {
    *("mesh_summary", "mesh_state", "list_nodes", "list_models", "list_requests", "explain_request"),
    *("read_logs", "load_model", "prewarm_model", "unload_model", "drain_node", "undrain_node"),
}
ACTS = {"load_model", "prewarm_model", "unload_model", "drain_node", "undrain_node"}
KEYS = {"auth": {"enabled": True, "allowed_keys": ["user-key"], "admin_keys": ["admin-key"]}}


@pytest.mark.parametrize("mode", ERAS)
async def test_an_assistant_looks_after_a_model(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None, mode: str
) -> None:
    recipes = cookbook(tiny=profile(tiny_model))
    async with (
        running_node(tmp_path, recipes, binary_path=engine_binary) as node,
        mcp_client(node, mode) as client,
    ):
        summary = await use(client, "mesh_summary")
        assert (summary["answered_by"], summary["well"], summary["models"]) == ("node-a", True, {"fits": 1})
        assert await use(client, "load_model", model="tiny") == {
            "model": "tiny",
            "node": "node-a",
            "status": "loaded",
            "waited_seconds": pytest.approx(0, abs=20),
        }
        assert (await use(client, "load_model", model="tiny", wait_seconds=0))["status"] == "loaded"
        [model] = (await use(client, "list_models", only_loaded=True))["models"]
        assert (model["name"], model["nodes"]) == ("tiny", {"node-a": "loaded"})
        [row] = (await use(client, "list_nodes"))["nodes"]
        assert (row["id"], row["ready"], row["loaded"]) == ("node-a", True, ["tiny:default"])
        await ask_well(node)
        logs = await use(client, "read_logs", model="tiny", lines=5)
        assert len(logs["lines"]) == 5
        assert logs["left_out"] > 0
        assert all(line.startswith("[tiny:default#1] ") for line in logs["lines"])
        [request] = (await use(client, "list_requests", model="tiny"))["requests"]
        why = await use(client, "explain_request", request_id=request["id"])
        assert why["request"] == request
        assert "answered with status 200" in why["story"][-1]
        state = await use(client, "mesh_state", sections=["instances"], model="tiny")
        assert [one["id"] for one in state["instances"]] == ["tiny:default#1"]
        assert "nodes" not in state
        assert (await use(client, "unload_model", model="tiny"))["unloading"] == ["tiny:default#1"]
        await wait_document(node, "/running", lambda d: not d["running"])
        again = await use(client, "unload_model", model="tiny")
        assert (again["unloading"], again["note"]) == ([], "it isn't loaded on node node-a")
        assert await use(client, "drain_node") == {"node": "node-a", "status": "draining"}
        assert "draining" in await fail(client, "load_model", model="tiny")
        assert not (await use(client, "mesh_summary"))["well"]
        assert await use(client, "undrain_node", node="node-a") == {"node": "node-a", "status": "ready"}


@pytest.mark.parametrize("mode", ERAS)
async def test_the_list_tells_an_assistant_what_it_needs(tmp_path: Path, mode: str) -> None:
    async with (
        running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node,
        mcp_client(node, mode) as client,
    ):
        assert client.server_info.name == "llamesh"
        assert "mesh_summary" in (client.instructions or "")
        assert client.server_capabilities.tools is not None
        assert client.server_capabilities.resources is client.server_capabilities.prompts is None
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == TOOLS
        for name, tool in tools.items():
            assert len(tool.description or "") > 40
            assert tool.annotations is not None
            assert tool.annotations.read_only_hint == (name not in ACTS)
            assert tool.annotations.open_world_hint is False
            for schema in (tool.input_schema, tool.output_schema or {}):
                assert schema["type"] == "object"
            assert tool.input_schema["additionalProperties"] is False
        destructive = {
            name for name, tool in tools.items() if tool.annotations and tool.annotations.destructive_hint
        }
        assert destructive == {"unload_model", "drain_node"}
        # All of it is in the context of a model for as long as it works.
        assert len((await post(node, {"jsonrpc": "2.0", "id": 1, "method": "tools/list"})).content) < 24_000


async def test_mistakes_are_told_in_words(tmp_path: Path) -> None:
    """An assistant can mend what it understands: nothing but an unknown tool is an error of the protocol."""
    broken = {"exit_at_start": {"code": 1, "lines": ["cudaMalloc failed: out of memory"]}}
    recipes = fakes(tmp_path, m={}, broken=broken)
    async with (
        running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node,
        mcp_client(node) as client,
    ):
        assert await fail(client, "load_model", model="nope") == (
            "node node-a knows no model 'nope' (model_not_found)"
        )
        assert "out of memory" in await fail(client, "load_model", model="broken")
        assert "(spawn_failures_exhausted; try again in" in await fail(client, "load_model", model="broken")
        assert "no node 'far'" in await fail(client, "load_model", model="m", node="far")
        assert "Expected `str`, got `int` - at `$.model`" in await fail(client, "load_model", model=1)
        assert "missing required field `model`" in await fail(client, "load_model")
        assert "unknown field `modle`" in await fail(client, "load_model", model="m", modle="m")
        assert "`$.limit`" in await fail(client, "list_nodes", limit=0)
        assert "no node knows a request 'x'" in await fail(client, "explain_request", request_id="x")
        assert "knows no model 'nope'" in await fail(client, "read_logs", model="nope")
        assert "'far'" in await fail(client, "read_logs", model="m", node="far")
        logs = await use(client, "read_logs", model="broken", contains="CUDAMALLOC")
        assert "cudaMalloc failed" in logs["lines"][0]
        summary = await use(client, "mesh_summary")
        assert (summary["well"], summary["models"]) == (False, {"fits": 1, "failed": 1})
        assert any("broken" in one["text"] for one in summary["attention"])
        # Numbers and truth as text, as small models write them.
        assert len((await use(client, "list_models", limit="1", only_loaded="false"))["models"]) == 1
        with pytest.raises(MCPError, match="there is no tool 'rm'"):
            await client.call_tool("rm", {})


@pytest.mark.parametrize("mode", ERAS)
async def test_only_who_may_administer_may_call(tmp_path: Path, mode: str) -> None:
    recipes = fakes(tmp_path, m={})
    async with running_node(tmp_path, recipes, KEYS, binary_path=FAKE_LLAMA_SERVER) as node:
        for key, status in (("", 401), ("wrong", 401), ("user-key", 403)):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            for method in ("POST", "GET", "DELETE"):
                reply = await node.client.request(method, PATH, headers={**HEADERS, **headers})
                assert reply.status_code == status
                assert error_of(reply)["type"] in ("authentication_error", "forbidden")
            assert (reply.headers.get("www-authenticate") == "Bearer") == (status == 401)
            with pytest.RaisesGroup(MCPError, allow_unwrapped=True, flatten_subgroups=True):
                async with mcp_client(node, mode, headers):
                    pass
        for headers in ({"authorization": "Bearer admin-key"}, {"x-api-key": "admin-key"}):
            async with mcp_client(node, mode, headers) as client:
                assert (await use(client, "list_nodes"))["nodes"]
        # Whoever has the key may come from any page and by any name.
        headers = {
            "x-api-key": "admin-key",
            "host": "models.example.org",
            "origin": "https://chat.example.org",
        }
        assert (await post(node, call_of("mesh_summary"), headers)).status_code == 200
    assert "admin-key" not in json.dumps(node.events)


async def test_without_keys_only_this_machine_and_no_page_of_others(tmp_path: Path) -> None:
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        own = f"http://127.0.0.1:{node.port}"
        for host in (f"127.0.0.1:{node.port}", f"localhost:{node.port}", f"[::1]:{node.port}"):
            assert (await post(node, call_of("mesh_summary"), {"host": host})).status_code == 200
        assert (await post(node, call_of("mesh_summary"), {"origin": own})).status_code == 200
        for origin, host in (
            ("https://evil.example.org", f"127.0.0.1:{node.port}"),
            (f"http://evil.example.org:{node.port}", f"evil.example.org:{node.port}"),
            ("null", f"127.0.0.1:{node.port}"),
        ):
            reply = await post(node, call_of("drain_node"), {"origin": origin, "host": host})
            assert (reply.status_code, error_of(reply)["type"]) == (403, "forbidden")
        assert (await node.client.get("/readyz")).status_code == 200


async def test_methods_and_paths(tmp_path: Path) -> None:
    """No session is kept: there is nothing to listen to, and nothing to end."""
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        for method in ("GET", "DELETE", "PUT", "PATCH", "OPTIONS"):
            reply = await node.client.request(method, PATH, headers=HEADERS)
            assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
            assert error_of(reply)["type"] == "method_not_allowed"
        reply = await post(node, {"jsonrpc": "2.0", "id": 1, "method": "ping"}, {"x-request-id": "tea"})
        assert (reply.status_code, reply.json()) == (200, {"jsonrpc": "2.0", "id": 1, "result": {}})
        assert reply.headers["content-type"] == "application/json"
        assert reply.headers["x-request-id"] == "tea"
        assert "mcp-session-id" not in reply.headers
        slash = await node.client.post(PATH + "/", json=call_of("mesh_summary"), headers=HEADERS)
        assert slash.json()["result"]["isError"] is False
        # A session that never was is no reason to refuse: other nodes would know it as little.
        reply = await post(node, call_of("mesh_summary"), {"mcp-session-id": "x"})
        assert reply.status_code == 200


async def test_many_at_once(tmp_path: Path) -> None:
    recipes = fakes(tmp_path, **{f"m{number}": {} for number in range(4)})
    async with (
        running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node,
        mcp_client(node) as client,
        trio.open_nursery() as nursery,
    ):

        async def call(number: int) -> None:
            if number % 2:
                await use(client, "load_model", model=f"m{number % 4}")
            else:
                await use(client, "mesh_summary")

        for number in range(20):
            nursery.start_soon(call, number)


@pytest.mark.parametrize("mode", ERAS)
async def test_a_load_goes_on_when_its_caller_stops_waiting(tmp_path: Path, mode: str) -> None:
    go = tmp_path / "go"
    recipes = fakes(tmp_path, m={"ready_when": str(go)})
    async with (
        running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node,
        mcp_client(node, mode) as client,
    ):
        loading = await use(client, "load_model", model="m", wait_seconds=0.2)
        assert (loading["status"], loading["node"]) == ("loading", "node-a")
        assert "load_model again" in loading["note"]
        assert (await use(client, "prewarm_model", model="m"))["status"] == "loading"
        [model] = (await use(client, "list_models"))["models"]
        assert model["nodes"] == {"node-a": "loading"}
        go.touch()
        assert (await use(client, "load_model", model="m"))["status"] == "loaded"
        assert len(node.find_events("starting")) == 1


@pytest.mark.parametrize("headers", [{}, {"mcp-protocol-version": "2026-07-28"}], ids=["handshake", "alone"])
async def test_a_caller_that_leaves_ends_its_call(tmp_path: Path, headers: dict[str, str]) -> None:
    go = tmp_path / "go"
    recipes = fakes(tmp_path, m={"ready_when": str(go)})
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        call = call_of("load_model", model="m", wait_seconds=600)
        call["params"]["_meta"] = {
            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
            "io.modelcontextprotocol/clientCapabilities": {},
        }
        if headers:
            headers = {**headers, "mcp-method": "tools/call", "mcp-name": "load_model"}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post, node, call, headers)
            await node.wait_event("starting")
            await wait_document(node, "/cluster/nodes", lambda d: _queued(d) == 1)
            nursery.cancel_scope.cancel()
        await wait_document(node, "/cluster/nodes", lambda d: _queued(d) == 0)
        await node.wait_event("mcp act", tool="load_model", model="m", outcome="cancelled")
        go.touch()  # what it began goes on
        await node.wait_event("ready")
        assert not [one for one in node.events if one["level"] == "error"]
        assert await node.stop() == 0


def _queued(document: Any) -> int:
    return int(document["nodes"]["node-a"]["total_queue_length"])


@pytest.mark.parametrize("mode", ERAS)
async def test_a_call_does_not_hold_up_the_end(tmp_path: Path, mode: str) -> None:
    """A node that ends refuses what waits, as it does for everybody."""
    recipes = fakes(tmp_path, m={"never_ready": True})
    config = {"shutdown_grace_period_seconds": 1}
    async with running_node(tmp_path, recipes, config, binary_path=FAKE_LLAMA_SERVER) as node:
        said: list[str] = []

        async def wait(client: Any) -> None:
            said.append(await fail(client, "load_model", model="m", wait_seconds=600))

        async with mcp_client(node, mode) as client, trio.open_nursery() as nursery:
            nursery.start_soon(wait, client)
            await node.wait_event("starting")
            node.send_signal(signal.SIGTERM)
        assert await node.wait_end() == 0
        assert "is shutting down" in said[0]


async def test_nothing_of_it_is_there_before_it_is_used(tmp_path: Path) -> None:
    """The SDK is 25 MiB: a node that nobody asks for it hasn't imported it, whatever else it is asked for."""
    mark = tmp_path / "mark"
    env = in_place_of_the_sdk(tmp_path, f"open({str(mark)!r}, 'w').close()\nraise ImportError('not now')")
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER, env=env) as node:
        await ask_well(node, "m")
        for path in ("/ui/", "/metrics", "/api/v1/state", "/v1/models"):
            assert (await node.client.get(path)).status_code == 200
        assert (await node.client.get(PATH)).status_code == 405
        assert (
            await post(node, call_of("mesh_summary"), {"origin": "https://evil.example.org"})
        ).status_code == 403
        assert not mark.exists()
        assert (await post(node, call_of("mesh_summary"))).status_code == 501
        assert mark.exists()


def in_place_of_the_sdk(directory: Path, program: str) -> dict[str, str]:
    """The environment of a node for which the package `mcp` is this program."""
    package = directory / "path" / "mcp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(program)
    return {"PYTHONPATH": f"{package.parent}{os.pathsep}{CHECKOUT}"}


@pytest.mark.parametrize("module", ["llamesh.node", "llamesh.web.mcp.endpoint"])
def test_no_import_at_the_start_brings_it(module: str) -> None:
    heavy = ("mcp", "mcp_types", "starlette", "opentelemetry", "llamesh.web.mcp.tools")
    program = f"import sys, {module}; print(*sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=CHECKOUT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


async def test_tracing_that_the_environment_wants_is_none_of_it(tmp_path: Path) -> None:
    """As the operator of a cluster sets it for every program."""
    env = {
        "OTEL_PROPAGATORS": "b3,tracecontext",
        "OTEL_PYTHON_TRACER_PROVIDER": "sdk_tracer_provider",
        "OTEL_PYTHON_CONTEXT": "some_context",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
    }
    async with (
        running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER, env=env) as node,
        mcp_client(node) as client,
    ):
        assert (await use(client, "load_model", model="m"))["status"] == "loaded"
        [child] = [one for one in node.children() if "--port" in one.cmdline()]
        assert {name: child.environ().get(name) for name in env} == env
        assert not node.errors
        assert not [one for one in node.events if one["level"] in ("warning", "error")]


@pytest.mark.parametrize("broken", ["raise ImportError('no mcp here')", "x = 1"], ids=["absent", "another"])
async def test_an_installation_without_the_sdk_says_so(tmp_path: Path, broken: str) -> None:
    """`another`: some other package of that name."""
    env = in_place_of_the_sdk(tmp_path, broken)
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER, env=env) as node:
        for _ in range(2):
            reply = await post(node, call_of("mesh_summary"))
            assert (reply.status_code, error_of(reply)["type"]) == (501, "not_implemented")
            assert "install the Python package `mcp`" in error_of(reply)["message"]
        await ask_well(node, "m")
        await node.wait_event("request")
        assert len(node.find_events("/mcp can't be served")) == 1
