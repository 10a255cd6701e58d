"""`/mcp` under those who mean harm, or know no better: nothing hangs, leaks or is taken for a defect."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import trio

from tests.end_to_end.cookbooks import error_of, wait_document
from tests.end_to_end.test_state import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mcp import HEADERS, PATH, call_of, post
from tests.support.node import Node, running_node, wait_until

MODERN = {"mcp-protocol-version": "2026-07-28"}
META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientCapabilities": {},
}
MOST_BYTES = 256 << 10


def call_alone(tool: str, **arguments: Any) -> tuple[bytes, dict[str, str]]:
    """A call of 2026's era: its body, and the headers that it needs."""
    call = call_of(tool, **arguments)
    call["params"]["_meta"] = META
    return json.dumps(call).encode(), {**MODERN, "mcp-method": "tools/call", "mcp-name": tool}


def tools_call(name: bytes, arguments: bytes) -> bytes:
    """A call with JSON as it is."""
    params = b'{"name":%b,"arguments":%b,"_meta":%b}' % (name, arguments, json.dumps(META).encode())
    return b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":%b}' % params


BODIES = {
    "nothing": b"",
    "half": b'{"jsonrpc":',
    "null": b"null",
    "number": b"1",
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep arguments": tools_call(b'"mesh_summary"', b'{"a":' * 30_000 + b"1" + b"}" * 30_000),
    "long number": b'{"jsonrpc":"2.0","id":%b,"method":"ping"}' % (b"9" * 5000),
    "no utf-8": b'{"jsonrpc":"2.0","id":1,"method":"\xff\xfe"}',
    "utf-16": '{"jsonrpc":"2.0","id":1,"method":"ping"}'.encode("utf-16"),
    "parameters in a list": b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":[1]}',
    "method is a number": b'{"jsonrpc":"2.0","id":1,"method":5}',
    "another version": b'{"jsonrpc":"1.0","id":1,"method":"ping"}',
    "batch": b'[{"jsonrpc":"2.0","id":1,"method":"ping"},{"jsonrpc":"2.0","id":2,"method":"ping"}]',
    "large batch": b"[" + b",".join([b'{"jsonrpc":"2.0","id":1,"method":"ping"}'] * 6000) + b"]",
    "many members": b"{%b}" % b",".join(b'"k%d":1' % number for number in range(15_000)),
}


async def test_what_is_no_request_is_refused(tmp_path: Path) -> None:
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        for name, body in BODIES.items():
            for headers in ({}, {**MODERN, "mcp-method": "tools/call", "mcp-name": "mesh_summary"}):
                reply = await post(node, body, headers)
                assert reply.status_code == 400, (name, reply.text)
                assert isinstance(reply.json()["error"]["code"], int), (name, reply.text)
        for kind in (
            "text/plain",
            "",
            "application/x-www-form-urlencoded",
            "application/jsonp",
            "multipart/form-data",
        ):
            reply = await post(node, call_of("drain_node"), {"content-type": kind})
            assert (reply.status_code, error_of(reply)["type"]) == (400, "invalid_request_error")
        for accept in ("text/html", "image/*"):
            assert (await post(node, call_of("drain_node"), {"accept": accept})).status_code == 406
        for version in ("2027-01-01", "x" * 3000):
            reply = await post(node, call_of("drain_node"), {"mcp-protocol-version": version})
            assert reply.status_code == 400
        for method in ("resources/list", "subscriptions/listen", "logging/setLevel", "../drain"):
            reply = await post(node, {"jsonrpc": "2.0", "id": 1, "method": method, "params": {}})
            assert reply.json()["error"]["code"] in (-32601, -32602)
        assert (
            await post(node, {"jsonrpc": "2.0", "method": "notifications/initialized"})
        ).status_code == 202
        assert (await node.client.get("/readyz")).status_code == 200
        assert not _bad(node)


ARGUMENTS = [
    (b'"load_model"', b'{"model":"\\ud800"}'),
    (b'"load_model"', b'{"model":"m","node":"\\ud800"}'),
    (b'"list_models"', b'{"\\ud800":1}'),
    (b'"read_logs"', b'{"model":"m","node":"\\ud800"}'),
    (b'"explain_request"', b'{"request_id":"\\ud800"}'),
    (b'"load_model"', b'{"model":"m","wait_seconds":NaN}'),
    (b'"load_model"', b'{"model":"m","wait_seconds":1e999}'),
    (b'"load_model"', b'{"model":"a\\nb\\u0000c"}'),
    (b'"load_model"', b'{"model":"%b"}' % (b"x" * 100_000)),
    (b'"explain_request"', b'{"request_id":"../../etc/passwd"}'),
]


async def test_odd_arguments_are_told_and_harm_nothing(tmp_path: Path) -> None:
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        for tool, arguments in ARGUMENTS:
            headers = {**MODERN, "mcp-method": "tools/call", "mcp-name": json.loads(tool)}
            reply = await post(node, tools_call(tool, arguments), headers)
            assert reply.status_code == 200, reply.text
            result = reply.json()["result"]
            assert result["isError"], result
            [content] = result["content"]
            assert len(content["text"]) < 1000
            assert "internal error" not in content["text"]
        assert not _bad(node)


async def test_large_and_slow_bodies(tmp_path: Path) -> None:
    config = {"http": {"body_read_timeout_ms": 300}}
    async with running_node(tmp_path, fakes(tmp_path, m={}), config, binary_path=FAKE_LLAMA_SERVER) as node:

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(5):
                yield b" " * (MOST_BYTES // 4)

        for reply in (
            await post(node, b" " * (MOST_BYTES + 1)),
            await node.client.post(PATH, content=pieces(), headers=HEADERS),
        ):
            assert (reply.status_code, error_of(reply)["type"]) == (413, "request_too_large")
            assert str(MOST_BYTES) in error_of(reply)["message"]
        # The most that may be, of which the answer repeats a part.
        reply = await post(node, {"jsonrpc": "2.0", "id": "x" * (MOST_BYTES - 100), "method": "ping"})
        assert reply.status_code == 200
        stream = await trio.open_tcp_stream("127.0.0.1", node.port)
        async with stream:
            await stream.send_all(_head(100) + b"{")
            answer = b""
            with trio.fail_after(20):
                while data := await stream.receive_some():
                    answer += data
            assert answer.startswith(b"HTTP/1.1 408 ")


async def test_more_calls_than_may_be(tmp_path: Path) -> None:
    go = tmp_path / "go"
    recipes = fakes(tmp_path, m={"ready_when": str(go)})
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        outcomes: list[Any] = []

        async def load() -> None:
            reply = await post(node, call_of("load_model", model="m", wait_seconds=60))
            if reply.status_code == 200:
                outcomes.append(reply.json()["result"]["structuredContent"]["status"])
            else:
                assert reply.headers["retry-after"] == "5"
                outcomes.append(error_of(reply)["type"])

        async with trio.open_nursery() as nursery:
            for _ in range(70):
                nursery.start_soon(load)
            await wait_until(lambda: len(outcomes) == 6, lambda: f"{outcomes}")
            go.touch()
        assert Counter(outcomes) == {"loaded": 64, "too_many_calls": 6}
        assert (await post(node, call_of("mesh_summary"))).status_code == 200


async def test_asking_again_and_again_takes_one_place_in_the_queue(tmp_path: Path) -> None:
    recipes = fakes(tmp_path, m={"never_ready": True})
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        for _ in range(5):
            for tool, more in (("load_model", {"wait_seconds": 0}), ("prewarm_model", {})):
                reply = await post(node, call_of(tool, model="m", **more))
                assert reply.json()["result"]["structuredContent"]["status"] == "loading"
        await wait_document(node, "/cluster/nodes", lambda d: _queued(d) == 1)


async def test_clients_that_leave_in_the_midst_of_it(tmp_path: Path) -> None:
    """At any byte and any moment, in order or by reset."""
    recipes = fakes(tmp_path, m={"never_ready": True})
    chance = random.Random(7)
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        assert (await post(node, call_of("mesh_summary"))).status_code == 200
        process = psutil.Process(node.pid)
        files = process.num_fds()

        async def leave(number: int) -> None:
            tool = chance.choice(["load_model", "mesh_summary", "read_logs"])
            arguments = {"model": "m", "wait_seconds": 600} if tool == "load_model" else {}
            body, headers = json.dumps(call_of(tool, **arguments)).encode(), dict[str, str]()
            if number % 2:
                body, headers = call_alone(tool, **arguments)
            data = _head(len(body), headers) + body
            stream = await trio.open_tcp_stream("127.0.0.1", node.port)
            await stream.send_all(data[: chance.choice([len(data), chance.randrange(1, len(data))])])
            await trio.sleep(chance.choice([0, 0.001, 0.01, 0.05]))
            if chance.random() < 0.5:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await stream.aclose()

        for _ in range(5):
            async with trio.open_nursery() as nursery:
                for number in range(20):
                    nursery.start_soon(leave, number)
        await wait_document(node, "/cluster/nodes", lambda d: _queued(d) == 0)
        await wait_until(
            lambda: process.num_fds() <= files + 8, lambda: f"{process.num_fds()} files, before {files}"
        )
        # All places are free again.
        async with trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(post, node, call_of("mesh_summary"))
        assert not _bad(node)
        assert await node.stop() == 0


def _head(length: int, more: dict[str, str] | None = None) -> bytes:
    lines = [f"POST {PATH} HTTP/1.1", "host: 127.0.0.1", f"content-length: {length}"]
    lines += [f"{name}: {value}" for name, value in {**HEADERS, **(more or {})}.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def _queued(document: Any) -> int:
    return int(document["nodes"]["node-a"]["total_queue_length"])


def _bad(node: Node) -> list[Any]:
    """What the node took for a defect, or couldn't log."""
    return [one for one in node.events if one.get("level") in ("error", "unreadable")] + list(node.errors)
