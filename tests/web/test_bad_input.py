"""What people and programs send that they shouldn't, over real sockets, and what it costs: nothing.

Keys, pages of other sites and newlines in headers: see test_lanes_access, test_sites and test_audit. Five
hundred viewers: see test_state of the whole program.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.config.settings import Settings
from llamesh.errors import LlameshError
from llamesh.web.asgi import AsgiSink, Receive, Scope, Send
from llamesh.web.slow_lane import HypercornLane
from llamesh.web.state_stream import StateStream
from tests.support.node import wait_until
from tests.web.raw import Http1, Http2, get, post
from tests.web.served import Asking, Served, served
from tests.web.test_state_stream import Source

CHAT: dict[str, Any] = {"model": "m", "messages": []}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A node whose figures nobody else changes."""
    with served(tmp_path_factory.mktemp("alone"), {"m": {"slots": 2}}) as running:
        yield running


# Labels.


def names_in_metrics(node: Served) -> set[str]:
    """The names of all series, without their values."""
    text = node.ask("fast", None, "/metrics", {}, "GET").body.decode()
    return {line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


def test_random_model_names_make_no_labels(alone: Served) -> None:
    """Nor do paths, methods, ids, or profiles of a model that is there."""
    alone.ask("fast", CHAT)
    alone.ask("fast", {"model": "nobody"})  # the counter of what is unknown
    alone.ask("fast", {"model": "x"}, "/v1/nowhere")
    before = names_in_metrics(alone)
    with Http1(alone.port) as client:
        for number in range(300):
            name = f'random-{number}\n{{}}"'
            client.send(post({"model": name}))
            assert client.answer().status == 404
            client.send(post({"model": f"m:{name}"}))
            assert client.answer().status == 404
            client.send(get(f"/v1/models/random-{number}"))
            assert client.answer().status == 404
    with Http2(alone.port) as two:
        for number in range(100):
            stream = two.start("POST", f"/v1/chat/completions?model=random-{number}", body=b"{}")
            assert two.answer(stream).status == 404
            stream = two.start("POST", f"/nowhere-{number}", [("x-session-id", str(number))], body=b"{}")
            assert two.answer(stream).status == 404
    new = {name for name in names_in_metrics(alone) - before if "_bucket" not in name}
    assert [name for name in new if re.search(r"random|nowhere-\d", name)] == []
    assert len(names_in_metrics(alone)) <= len(before) + 5, sorted(new)
    hashes = alone.page("/metrics/json")["hashes"]
    assert list(hashes) == ["m:default"]


@pytest.mark.parametrize(
    "name", ["nobody", "m:nothing", "../../etc/passwd", "x" * 100_000, "\x00", "\u2028", "%0a"]
)
def test_unknown_models(alone: Served, lane: str, name: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/messages", "/admin/prewarm"):
        reply = alone.ask(lane, {"model": name}, path)
        assert (reply.status, reply.error["type"]) == (404, "model_not_found"), path
        assert len(reply.body) < 2000


# Administration of a node that is ending.


def test_acts_during_a_drain(tmp_path: Path) -> None:
    """They are answered until the last request has ended; what would begin something new is refused."""
    gate = tmp_path / "end"
    with served(tmp_path / "node", {"m": {"slots": 1}, "other": {}}) as node:
        wish = {**CHAT, "stream": True, "fake": {"tokens": 4, "gate": str(gate), "gate_after": 2}}
        with Asking(node, "fast", wish) as asking:
            asking.until(b"data: ")
            node.process().send_signal(signal.SIGTERM)
            node.wait(lambda: node.find("draining", running=1), "it drains")
            for lane in ("fast", "http1.0", "http2"):
                refused = node.ask(lane, {"model": "other"}, "/admin/prewarm")
                assert (refused.status, refused.error["type"]) == (503, "draining")
                refused = node.ask(lane, CHAT)
                assert (refused.status, refused.error["type"]) == (503, "draining")
                for path in ("/admin/drain", "/admin/reload", "/admin/pause"):
                    assert node.ask(lane, {"seconds": 0} if "pause" in path else {}, path).status == 200, path
                # It ends all the same.
                answer = node.ask(lane, {}, "/admin/undrain")
                assert (answer.status, answer.json()) == (200, {"status": "draining"})
                assert node.ask(lane, {"model": "m"}, "/admin/unload").status == 200
                assert node.ask(lane, {"request_id": "nobody"}, "/admin/cancel").status == 404
            gate.touch()
            asking.until(b"[DONE]")


# Viewers.


class Look:
    """An application that shows one state to everybody, by the real lane."""

    def __init__(self, stream: StateStream) -> None:
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with scope["state"]["connection"].answering():
            sink = AsgiSink(send, scope)
            try:
                await self._stream.serve(sink, "", sink.abort, [])
            except (OSError, LlameshError):
                sink.abort()


@pytest.mark.parametrize("lane", ["http1", "http2"])
async def test_a_viewer_that_stops_reading_is_dropped_and_holds_up_nobody(lane: str) -> None:
    source = Source()
    stream = StateStream(source, interval=0.02, stalled_seconds=0.5)
    hypercorn = HypercornLane(Look(stream), Settings())
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    request = get("/api/v1/state/stream")
    read = 0

    async def accept() -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            sock = listener.accept()[0]
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
            nursery.start_soon(hypercorn.serve, sock, b"")

    async def reads(client: trio.SocketStream) -> None:
        nonlocal read
        async for data in client:
            read += len(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run)
        nursery.start_soon(accept)
        good = await trio.open_tcp_stream("127.0.0.1", port)
        await good.send_all(request)
        nursery.start_soon(reads, good)
        if lane == "http1":
            one = Http1(port, receive_buffer=4096)
            one.send(request)
            close = one.close
        else:
            two = Http2(port)
            two.start("GET", "/api/v1/state/stream")
            close = two.sock.close
        await wait_until(lambda: stream.viewers == 2, "both look")
        while stream.viewers == 2:
            with trio.fail_after(20):
                source.happen("x" * 900)
                await trio.sleep(0.005)
        before = read
        source.happen("something else")
        await wait_until(lambda: read > before, "the other one still hears")
        close()
        nursery.cancel_scope.cancel()
    await trio.aclose_forcefully(good)
    listener.close()


def test_many_who_do_not_read_cost_little(alone: Served) -> None:
    viewers = [Http1(alone.port, receive_buffer=2048) for _ in range(200)]
    before = alone.process().memory_info().rss
    answered: list[int] = []

    def chat() -> None:
        answered.extend(alone.ask("fast", CHAT).status for _ in range(20))

    try:
        for viewer in viewers:
            viewer.send(get("/api/v1/state/stream"))
        asking = [threading.Thread(target=chat) for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join(20)
        assert answered == [200] * 40
        assert alone.process().memory_info().rss - before < 200 * 256 * 1024
    finally:
        for viewer in viewers:
            viewer.close()
