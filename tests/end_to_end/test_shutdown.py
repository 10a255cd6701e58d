"""The end of a node: in order, in a hurry, and by force. Nothing of it is left, whichever it was."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trio

from tests.end_to_end.cookbooks import (
    CHAT,
    ask,
    ask_well,
    chat,
    cookbook,
    error_of,
    events_of,
    processes_in,
    profile,
    wait_alone,
    wait_document,
    wait_running,
)
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import Node, running_node, wait_until


def gated(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A gate, and a cookbook with a model that says one word and the rest when the gate exists."""
    gate = tmp_path / "gate"
    slow = fake_profile_file(tmp_path, "slow", gate=str(gate), gate_after=1, tokens=3)
    return gate, cookbook(slow=profile(slow))


@asynccontextmanager
async def streaming(node: Node, model: str, **more: Any) -> AsyncIterator[AsyncIterator[str]]:
    """A stream of which the first data has come; its text from there on, in pieces."""
    body = chat(model, stream=True, **more)
    async with node.client.stream("POST", CHAT, json=body) as reply:
        assert reply.status_code == 200
        pieces = reply.aiter_text()
        assert "data: " in await anext(pieces)
        yield pieces


async def test_what_runs_is_finished_and_what_comes_is_refused(tmp_path: Path) -> None:
    gate, recipes = gated(tmp_path)
    async with running_node(tmp_path / "node", recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        async with streaming(node, "slow") as pieces, trio.open_nursery() as nursery:
            # Waits in the queue, for the one slot.
            nursery.start_soon(ask_well, node, "slow")
            await wait_running(node, 2)
            children = node.children()
            node.send_signal(signal.SIGTERM)
            await node.wait_event("draining", running=2)
            refused = await ask(node, "slow")
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
            assert error_of(refused)["type"] == "draining"
            ready = await node.client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (503, "draining")
            assert ready.json()["can_spawn"] is False
            assert (await node.client.get("/healthz")).status_code == 200
            assert node.returncode is None
            gate.touch()
            rest = "".join([piece async for piece in pieces])
        assert events_of(rest)[-1] == "[DONE]"
        assert "t2 " in rest
        assert await node.wait_end(children) == 0
        assert node.find_events("ended")
        assert node.errors == []
    await wait_alone(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_stream_of_a_real_engine_is_finished(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None, number: signal.Signals
) -> None:
    recipes = cookbook(tiny=profile(tiny_model, "-c 4096 -np 1"))
    async with running_node(tmp_path, recipes, binary_path=engine_binary) as node:
        children = []
        async with streaming(node, "tiny", tokens=400) as pieces:
            children = node.children()
            node.send_signal(number)
            events = events_of("".join([piece async for piece in pieces]))
        assert events[-1] == "[DONE]"
        assert events[-2]["timings"]["predicted_n"] == 400
        assert await node.wait_end(children) == 0


async def test_an_idle_node_with_open_connections_ends(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    async with running_node(tmp_path, cookbook(tiny=profile(tiny_model)), binary_path=engine_binary) as node:
        await ask_well(node)
        silent = await trio.open_tcp_stream("127.0.0.1", node.port)
        half = await trio.open_tcp_stream("127.0.0.1", node.port)
        await half.send_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
        async with silent, half:
            assert await node.stop() == 0
    await wait_alone(tmp_path)


async def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """Even with a child that ignores what it is told: nothing is left, nobody waits for the grace."""
    gate = tmp_path / "gate"
    deaf = fake_profile_file(tmp_path, "deaf", gate=str(gate), gate_after=1, ignore_term=True)
    settings = {"shutdown_grace_period_seconds": 3600}
    async with running_node(
        tmp_path / "node", cookbook(deaf=profile(deaf)), settings, binary_path=FAKE_LLAMA_SERVER
    ) as node:
        with pytest.raises(httpx.RemoteProtocolError):
            await _end_twice(node)
        assert node.find_events("request", error="cut") or node.find_events("request", error="cancelled")
    await wait_alone(tmp_path)


async def _end_twice(node: Node) -> None:
    async with streaming(node, "deaf") as pieces:
        children = node.children()
        node.send_signal(signal.SIGTERM)
        await node.wait_event("draining", running=1)
        node.send_signal(signal.SIGTERM)
        assert await node.wait_end(children) == 0
        async for _ in pieces:
            pass


async def test_after_the_grace_children_are_ended(tmp_path: Path) -> None:
    _, recipes = gated(tmp_path)
    silent = fake_profile_file(tmp_path, "silent", head_gate=str(tmp_path / "never"))
    recipes["models"] += cookbook(silent=profile(silent))["models"]
    settings = {"shutdown_grace_period_seconds": 0.2}
    async with running_node(tmp_path / "node", recipes, settings, binary_path=FAKE_LLAMA_SERVER) as node:
        replies: list[httpx.Response] = []

        async def wait_in_vain(model: str) -> None:
            replies.append(await ask(node, model))

        async with streaming(node, "slow") as pieces, trio.open_nursery() as nursery:
            for model in ("slow", "silent"):
                nursery.start_soon(wait_in_vain, model)
            await wait_document(node, "/running", lambda d: [i["busy"] for i in d["running"]] == [1, 1])
            await wait_running(node, 3)
            children = node.children()
            node.send_signal(signal.SIGTERM)
            with pytest.raises(httpx.RemoteProtocolError):
                [piece async for piece in pieces]
        # Who waited, in the queue or for a first byte, is told and not cut off.
        assert [reply.status_code for reply in replies] == [503, 503]
        assert {error_of(reply)["type"] for reply in replies} == {"draining"}
        assert await node.wait_end(children) == 0
    await wait_alone(tmp_path)


async def test_killed_at_any_moment_nothing_is_left(
    tmp_path: Path, endless_model: Path, engine_binary: Path | None
) -> None:
    """SIGKILL while it listens, starts a child, serves a stream, is idle, drains; then all is well again."""
    model = tmp_path / "model.gguf"
    model.hardlink_to(endless_model)
    recipes = cookbook(tiny=profile(model, "-np 1"), other=profile(model, "-c 1024"))

    async def start_a_child(node: Node) -> None:
        await node.client.post("/admin/prewarm", json={"model": "tiny", "wait": False})
        await node.wait_event("starting")

    async def serve_a_stream(node: Node) -> None:
        async with streaming(node, "tiny", tokens=-1) as pieces:
            node.send_signal(signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                [piece async for piece in pieces]

    async def be_idle(node: Node) -> None:
        await ask_well(node)
        await ask_well(node, "other")

    async def drain(node: Node) -> None:
        await ask_well(node)
        node.send_signal(signal.SIGTERM)
        await node.wait_event("draining")

    async def only_listen(node: Node) -> None:
        pass

    for moment in (only_listen, start_a_child, serve_a_stream, be_idle, drain):
        async with running_node(tmp_path / "node", recipes, binary_path=engine_binary) as node:
            assert processes_in(model, but=node.pid) == [], moment
            await moment(node)
            node.send_signal(signal.SIGKILL)
            await wait_until(lambda node=node: node.returncode is not None, "it lives")  # type: ignore[misc]
            await wait_alone(tmp_path)
    async with running_node(tmp_path / "node", recipes, binary_path=engine_binary) as node:
        assert len(await ask_well(node)) == 5
        assert node.find_events("ended children of an earlier life") == []
        assert [entry for entry in node.events if entry["level"] in {"warning", "error"}] == []
        assert await node.stop() == 0
    await wait_alone(tmp_path)
    assert list((tmp_path / "node").glob("*.children/*")) == []


async def test_two_nodes_may_share_the_file_of_learned_values(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    """The children of one are nothing that the other's start would sweep away, dead or alive."""
    recipes = cookbook(tiny=profile(tiny_model))
    shared = {"metrics_path": str(tmp_path / "shared" / "metrics.json")}
    first_settings, second_settings = {"node_id": "first", **shared}, {"node_id": "second", **shared}
    async with running_node(tmp_path / "1", recipes, first_settings, binary_path=engine_binary) as first:
        await ask_well(first)
        [child] = first.children()
        async with running_node(
            tmp_path / "2", recipes, second_settings, binary_path=engine_binary
        ) as second:
            await ask_well(second)
            [other] = second.children()
            second.send_signal(signal.SIGKILL)
            await second.wait_end([other])
            assert child.is_running()
        async with running_node(
            tmp_path / "2", recipes, second_settings, binary_path=engine_binary
        ) as second:
            await ask_well(second)
            [other] = second.children()
            assert await first.stop() == 0
            assert other.is_running()
            assert other.status() != psutil.STATUS_ZOMBIE
            assert (await second.client.post(CHAT, json=chat())).headers["x-llamesh-node"] == "second"
            assert await second.stop() == 0
