"""Silence, slowness and noise at the listener: nothing hangs, nothing leaks, the node answers on."""

from __future__ import annotations

import json
import random
import socket
import struct
from typing import Any

import pytest

from tests.web.raw import Http1, Http2, get, post
from tests.web.served import Served

CHAT: dict[str, Any] = {"model": "m", "messages": [], "max_tokens": 1}
NOISY_CONNECTIONS = 200


def test_a_silent_connection_is_closed_without_a_word(impatient: Served) -> None:
    with Http1(impatient.port) as client:
        assert client.rest() == b""


@pytest.mark.parametrize("start", [b"P", b"PRI * HT", b"GET /health HTTP/1.1\r\nHost: x\r\n", b"\r\nG"])
def test_half_a_head_times_out(impatient: Served, start: bytes) -> None:
    with Http1(impatient.port) as client:
        client.send(start)
        reply = client.answer()
        assert (reply.status, reply.error["type"]) == (408, "request_timeout")
        assert client.rest() == b""


def test_half_a_body_times_out(impatient: Served) -> None:
    for version in ("1.1", "1.0"):
        with Http1(impatient.port) as client:
            client.send(post(CHAT, version=version)[:-3])
            reply = client.answer()
            assert (reply.status, reply.error["type"]) == (408, "request_timeout")
            assert client.rest() == b""
    with Http1(impatient.port) as client:
        client.send(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{")
        assert client.answer().status == 408
    with Http2(impatient.port) as two:
        stream = two.state.get_next_available_stream_id()
        fields = [(":method", "POST"), (":scheme", "http"), (":authority", "x"), (":path", "/tokenize")]
        two.state.send_headers(stream, fields)
        two.state.send_data(stream, b"{")
        two.flush()
        assert two.answer(stream).status == 408


def test_a_client_that_closes_in_the_middle_gets_nothing(impatient: Served) -> None:
    for data in (post(CHAT)[:-3], get("/health")[:-3], post(CHAT)[:30]):
        with Http1(impatient.port) as client:
            client.send(data)
            client.sock.shutdown(socket.SHUT_WR)
            assert client.rest() == b""


def test_idle_connections_are_closed(impatient: Served) -> None:
    with Http1(impatient.port) as client:
        client.send(get("/health"))
        assert client.answer().status == 200
        assert client.rest() == b""
    with Http2(impatient.port) as two:
        assert two.answer(two.start("GET", "/health")).status == 200
        two.sock.settimeout(20)
        while two.sock.recv(65_536):
            pass


def noise(random: random.Random) -> bytes:
    """Random bytes, or a good request with something done to it."""
    good = random.choice(
        [
            post(CHAT),
            get("/v1/models"),
            get("/nowhere"),
            get("/health", version="1.0"),
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00" + random.randbytes(60),
        ]
    )
    at = random.randrange(len(good))
    match random.randrange(5):
        case 0:
            return random.randbytes(random.randrange(1, 300))
        case 1:
            return good[:at]
        case 2:
            return good[:at] + random.randbytes(3) + good[at:]
        case 3:
            return good[:at] + bytes([random.randrange(256)]) + good[at + 1 :]
        case _:
            return good + random.randbytes(20)


def test_noise_leaves_nothing_behind(node: Served) -> None:
    assert node.ask("fast", CHAT).status == 200
    baseline = node.process().num_fds()
    chance = random.Random(20)
    for _ in range(NOISY_CONNECTIONS):
        with Http1(node.port) as client:
            client.send(noise(chance))
            match chance.randrange(3):
                case 0:
                    client.sock.shutdown(socket.SHUT_WR)
                    client.rest()
                case 1:
                    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    # Connections to the child may have been added; they are few.
    node.wait(lambda: node.process().num_fds() <= baseline + 6, "descriptors are back")
    node.wait(lambda: node.page("/metrics/json")["connections"] == 1, "connections are gone")
    for lane in ("fast", "http1.0", "http2"):
        assert node.ask(lane, CHAT).status == 200


def test_noise_in_http_2_ends_only_its_own_connection(node: Served) -> None:
    chance = random.Random(7)
    body = json.dumps({**CHAT, "max_tokens": 20, "stream": True, "fake": {"token_delay": 0.01}}).encode()
    with Http2(node.port) as bystander:
        stream = bystander.start("POST", "/v1/chat/completions", body=body)
        for _ in range(40):
            with Http2(node.port) as client:
                client.start("POST", "/v1/chat/completions", body=json.dumps(CHAT).encode())
                kind, length = chance.randrange(12), chance.randrange(30)
                frame = length.to_bytes(3, "big") + bytes([kind, chance.randrange(256)])
                number = chance.choice([0, 1, 2, 3]).to_bytes(4, "big")
                client.sock.sendall(frame + number + chance.randbytes(length))
        assert bystander.answer(stream).body.endswith(b"data: [DONE]\n\n")
    node.wait(lambda: node.page("/metrics/json")["current_requests"] == 0, "no request left")


def test_a_path_in_other_than_ascii_by_http_2(node: Served) -> None:
    with Http2(node.port, unchecked=True) as client:
        client.start("GET", "/\xff")
        while client.sock.recv(65_536):
            pass
    assert node.ask("http2", CHAT).status == 200
