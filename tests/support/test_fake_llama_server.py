"""The fake llama-server does what its behaviour files say."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.support.engine import Running, started
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file, launches
from tests.support.node import PATIENCE_SECONDS

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
Start = Callable[..., AbstractContextManager[Running]]


@pytest.fixture
def fake(tmp_path: Path) -> Start:
    """Starts a fake that behaves as told, and waits until it is ready."""

    @contextmanager
    def start(*flags: str, env: dict[str, str] | None = None, **behaviour: Any) -> Iterator[Running]:
        model = fake_profile_file(tmp_path, "fake", **behaviour)
        arguments: list[str | Path] = ["-m", model, "--port", "0", *flags]
        with started(arguments, binary=FAKE_LLAMA_SERVER, env=env) as engine:
            engine.learn_url()
            engine.until_healthy()
            yield engine

    return start


def stats(engine: Running) -> dict[str, Any]:
    """What it counted."""
    with httpx.Client(trust_env=False) as other:
        return dict(other.get(f"{engine.url}/__fake/stats").json())


def stream_lines(engine: Running, path: str = "/v1/chat/completions", **body: Any) -> list[str]:
    """The lines of a streamed reply, blanks left out."""
    asked = {**CHAT, "prompt": "hi", "stream": True, **body}
    with engine.client.stream("POST", path, json=asked) as reply:
        assert reply.headers["content-type"] == "text/event-stream"
        return [line for line in reply.iter_lines() if line]


def connect(engine: Running) -> socket.socket:
    """A bare connection to it."""
    port = int(engine.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS)


def test_it_answers_like_llama_server(fake: Start) -> None:
    with fake("-np", "3", "-c", "900", "-a", "pet") as engine:
        assert engine.client.get("/health").json() == {"status": "ok"}
        props = engine.client.get("/props").json()
        assert props["total_slots"] == 3
        assert props["default_generation_settings"]["n_ctx"] == 300
        assert [slot["is_processing"] for slot in engine.client.get("/slots").json()] == [False] * 3
        assert engine.client.get("/v1/models").json()["data"][0]["id"] == "pet"
        reply = engine.ask("/v1/chat/completions", {**CHAT, "max_tokens": 3})
        assert reply["choices"][0]["message"]["content"] == "t0 t1 t2 "
        assert reply["usage"]["completion_tokens"] == reply["timings"]["predicted_n"] == 3
        assert engine.ask("/v1/completions", {"prompt": "x"})["choices"][0]["text"] == "t0 t1 t2 t3 t4 "
        assert len(engine.ask("/v1/embeddings", {"input": ["a", "b"]})["data"]) == 2
        assert len(engine.ask("/v1/rerank", {"query": "q", "documents": ["a", "b", "c"]})["results"]) == 3
        assert "n_slots = 3" in engine.output()
        assert "request POST /v1/rerank" in engine.output()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_streams_end_with_counts_and_done(fake: Start, path: str) -> None:
    with fake(tokens=3, pad=10) as engine:
        *events, done = [line.removeprefix("data: ") for line in stream_lines(engine, path)]
        assert done == "[DONE]"
        assert len(events) == 4
        assert json.loads(events[0])["pad"] == "x" * 10
        assert json.loads(events[-1])["usage"]["completion_tokens"] == 3


def test_a_key_is_checked_where_llama_server_checks_it(fake: Start) -> None:
    with fake(env={"LLAMA_API_KEY": "sesame"}) as engine:
        assert engine.client.get("/health").status_code == 200
        assert engine.client.get("/slots").status_code == 401
        engine.client.headers["Authorization"] = "Bearer sesame"
        assert engine.client.get("/slots").status_code == 200
        assert stats(engine)["unauthorized"] == 1


def test_it_loads_as_long_as_told(tmp_path: Path) -> None:
    gate = tmp_path / "ready"
    model = fake_profile_file(tmp_path, "slow", ready_when=gate)
    with started(["-m", model, "--port", "0"], binary=FAKE_LLAMA_SERVER) as engine:
        engine.learn_url()
        assert engine.client.get("/health").status_code == 503
        assert engine.client.post("/v1/completions", json={}).status_code == 503
        gate.touch()
        engine.until_healthy()


def test_it_exits_at_start_with_its_last_words(tmp_path: Path) -> None:
    ending = {"code": 3, "lines": ["error: out of memory"]}
    model = fake_profile_file(tmp_path, "dead", exit_at_start=ending, lines=["hello"])
    with started(["-m", model], binary=FAKE_LLAMA_SERVER) as engine:
        assert engine.wait() == 3
        assert engine.output() == "hello\nerror: out of memory\n"
    with started(["-m", tmp_path / "none"], binary=FAKE_LLAMA_SERVER) as engine:
        assert engine.wait() == 1


def test_each_launch_can_differ(tmp_path: Path) -> None:
    endings = [{"exit_at_start": {"code": 4}}, {"exit_at_start": {"code": 5}}]
    model = fake_profile_file(tmp_path, "twice", launches=endings)
    codes, pids = [], []
    for _ in range(3):
        with started(["-m", model], binary=FAKE_LLAMA_SERVER) as engine:
            codes.append(engine.wait())
            pids.append(engine.popen.pid)
    assert codes == [4, 5, 5]
    assert launches(model) == pids


def test_it_dies_as_told(fake: Start) -> None:
    with fake(die_after_requests=1) as engine:
        engine.ask("/v1/completions", {})
        with pytest.raises(httpx.TransportError):
            engine.client.post("/v1/completions", json={})
        assert engine.wait() == 1
    with fake(tokens=5, die_mid_stream=2) as engine:
        with pytest.raises(httpx.RemoteProtocolError):
            stream_lines(engine)
        assert engine.wait() == 1


@pytest.mark.parametrize("told", [{"refuse": True}, {"garbage": True}, {"cut_body": True}])
def test_replies_that_break(fake: Start, told: dict[str, bool]) -> None:
    with fake() as engine:
        with pytest.raises(httpx.RemoteProtocolError):
            engine.client.post("/v1/completions", json={"fake": told})
        # Only that request was told so.
        engine.ask("/v1/completions", {})


def test_a_stream_is_cut_without_an_end(fake: Start) -> None:
    with fake(cut_mid_stream=2) as engine:
        with connect(engine) as client:
            body = json.dumps({"stream": True}).encode()
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            reply = b"".join(iter(lambda: client.recv(65536), b""))
        assert reply.count(b"data: ") == 2
        assert b"DONE" not in reply
        assert not reply.endswith(b"0\r\n\r\n")


def test_status_headers_and_echo(fake: Start) -> None:
    with fake() as engine:
        told = {"status": 429, "headers": {"X-More": "1"}}
        reply = engine.client.post("/v1/completions", json={"fake": told})
        assert (reply.status_code, reply.headers["x-more"]) == (429, "1")
        assert reply.json()["error"]["code"] == 429
        body = b'{"fake": {"echo": true}, "spaces":  [ 1 ]}'
        echoed = engine.client.post("/v1/messages?beta=1", content=body, headers={"X-Mine": "yes"}).content
        assert echoed.startswith(b"POST /v1/messages?beta=1 HTTP/1.1\r\n")
        assert b"\r\nX-Mine: yes\r\n" in echoed
        assert echoed.endswith(b"\r\n\r\n" + body)
        assert engine.client.get("/no/such/route").text.startswith("GET /no/such/route HTTP/1.1")
        last = stats(engine)["last"]
        assert last["target"] == "/v1/messages?beta=1"
        assert ["X-Mine", "yes"] in last["headers"]


def test_routes_can_be_missing(fake: Start) -> None:
    with fake(no_slots_route=True, no_props_route=True) as engine:
        for path in ("/slots", "/props"):
            assert engine.client.get(path).text.startswith(f"GET {path} ")


def test_chunked_bodies_and_expectations_are_read(fake: Start) -> None:
    with fake(echo=True) as engine:
        reply = engine.client.post("/v1/completions", content=iter([b"ab", b"cde"]))
        assert reply.content.endswith(b"\r\n\r\nabcde")
        with connect(engine) as client:
            client.sendall(b"POST /infill HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            client.sendall(b"{}")
            assert client.recv(15) == b"HTTP/1.1 200 OK"


def test_connections_close_after_their_requests(fake: Start) -> None:
    ask = b"GET /health HTTP/1.1\r\n\r\n"
    with fake(close_after=2) as engine, connect(engine) as client:
        client.sendall(ask * 3)
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    assert reply.count(b"HTTP/1.1 200 OK") == 2


def test_idle_connections_are_closed(fake: Start) -> None:
    with fake(idle_seconds=0.05) as engine, connect(engine) as client:
        assert client.recv(1) == b""


def test_pipelined_requests_are_answered_in_order(fake: Start) -> None:
    with fake() as engine, connect(engine) as client:
        ask = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 16\r\n\r\n"
        client.sendall(ask + b'{"max_tokens":1}' + ask + b'{"max_tokens":2}')
        client.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    assert reply.index(b'"t0 "') < reply.index(b'"t0 t1 "')


def test_a_lost_client_frees_a_streaming_slot_only(fake: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"

    def processing(engine: Running) -> list[bool]:
        return [slot["is_processing"] for slot in engine.client.get("/slots").json()]

    with fake(gate=gate, slots=2) as engine:
        for number, document in enumerate(({"stream": True}, {})):
            body = json.dumps(document).encode()
            with connect(engine) as client:
                client.sendall(
                    b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )
                engine.until(lambda: sum(processing(engine)) == 1, "a busy slot")
            engine.until(lambda: stats(engine)["aborted"] > number, "an abort")  # noqa: B023 - called here
            assert sum(processing(engine)) == number
        gate.touch()
        engine.until(lambda: not any(processing(engine)), "an idle slot")
        assert stats(engine)["finished"] == 0


def test_requests_past_the_slots_wait_in_silence(fake: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    body = b'{"stream": true, "max_tokens": 1}'
    ask = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with fake(gate=gate, slots=1) as engine, connect(engine) as first, connect(engine) as second:
        first.sendall(ask)
        assert first.recv(15) == b"HTTP/1.1 200 OK"
        second.sendall(ask)
        engine.until(lambda: stats(engine)["queued"] == 1, "a queue")
        second.setblocking(False)
        with pytest.raises(BlockingIOError):
            second.recv(1)
        second.settimeout(PATIENCE_SECONDS)
        gate.touch()
        assert second.recv(15) == b"HTTP/1.1 200 OK"
        engine.until(lambda: stats(engine)["finished"] == 2, "the end")
        assert stats(engine)["max_running"] == 1


def test_a_head_can_wait_or_never_come(fake: Start, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with fake(head_gate=gate) as engine, connect(engine) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
        engine.until(lambda: stats(engine)["running"] == 1, "a request")
        gate.touch()
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        body = b'{"fake": {"hang_before_head": true}}'
        client.recv(65536)
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        engine.until(lambda: stats(engine)["running"] == 1, "a hang")


def test_it_can_eat_memory_and_ignore_sigterm(fake: Start) -> None:
    with fake(eat_mb=64, ignore_term=True) as engine:
        process = psutil.Process(engine.popen.pid)
        assert process.memory_info().rss > 64 << 20
        process.terminate()
        engine.ask("/v1/completions", {})
        assert engine.stop(signal.SIGKILL) == -signal.SIGKILL
    with fake() as engine:
        assert engine.stop() == 0


def test_a_taken_port_is_told(fake: Start, tmp_path: Path) -> None:
    with fake() as engine:
        port = engine.url.rpartition(":")[2]
        arguments: list[str | Path] = ["-m", tmp_path / "fake.json", "--port", port]
        with started(arguments, binary=FAKE_LLAMA_SERVER) as second:
            assert second.wait() == 1
            assert "couldn't bind" in second.output()


def test_it_runs_through_a_link_from_anywhere(tmp_path: Path) -> None:
    link = tmp_path / "llama-server"
    link.symlink_to(FAKE_LLAMA_SERVER)
    with started(["--version"], binary=link, env={"PYTHONPATH": ""}) as engine:
        assert engine.wait() == 0
        assert engine.output() == "version: 0 (fake)\n"
