"""How requests may arrive in the fast lane: in pieces, in heaps, in chunks, too large, malformed."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.web.conftest import BODY_LIMIT
from tests.web.raw import Http1, Http2, get, post
from tests.web.served import Served

CHAT: dict[str, Any] = {"model": "m", "messages": [], "max_tokens": 1}


def in_chunks(*chunks: bytes) -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + framed + b"0\r\n\r\n"


def test_one_connection_serves_many_requests(node: Served) -> None:
    with Http1(node.port) as client:
        for number in range(20):
            client.send(post({**CHAT, "stream": number % 2 == 0}))
            reply = client.answer()
            assert reply.status == 200
            assert reply.headers["connection"] == "keep-alive"
            client.send(get("/health"))
            assert client.answer().json() == {"status": "ok"}


def test_pipelined_requests_are_answered_in_order(node: Served) -> None:
    with Http1(node.port) as client:
        tokens = [3, 1, 4, 1, 5]
        client.send(
            b"".join(
                post({**CHAT, "max_tokens": n, "stream": n == 4}) + get("/version") + in_chunks(b"{", b"}")
                for n in tokens
            )
        )
        for n in tokens:
            assert client.answer().body.count(b"t%d " % (n - 1)) == 1
            assert client.answer().json()["node_id"] == "node-a"
            assert client.answer().status == 400  # names no model; the connection stays usable


def test_closing_after_a_request_that_says_so(node: Served) -> None:
    with Http1(node.port) as client:
        client.send(post(CHAT, "/v1/chat/completions", "Connection: close") + get("/health"))
        assert client.answer().headers["connection"] == "close"
        assert client.rest() == b""


@pytest.mark.parametrize(
    "data",
    [post(CHAT), in_chunks(b'{"model"', b': "m"}'), b"\r\n" + get("/health"), b"\r\n\r\n" + post(CHAT)],
    ids=["length", "chunks", "empty line", "empty lines"],
)
def test_the_cuts_of_a_request_do_not_matter(node: Served, data: bytes) -> None:
    with Http1(node.port) as client:
        for at in range(1, len(data)):
            client.send(data[:at])
            client.send(data[at:])
            assert client.answer().status == 200, at
        for at in range(len(data)):
            client.send(data[at : at + 1])
        assert client.answer().status == 200


def test_expect_continue(node: Served) -> None:
    head, _, body = post(CHAT, "/v1/chat/completions", "Expect: 100-continue").partition(b"\r\n\r\n")
    with Http1(node.port) as client:
        client.send(head + b"\r\n\r\n")
        assert client.head().status == 100
        client.send(body)
        assert client.answer().status == 200
        client.send(head + b"\r\n\r\n" + body)  # one that doesn't wait
        assert client.answer().status == 200


def test_head_requests_have_no_body(node: Served) -> None:
    with Http1(node.port) as client:
        client.send(get("/v1/models", method="HEAD") + get("/health"))
        assert int(client.answer(has_body=False).headers["content-length"]) > 2
        assert client.answer().json() == {"status": "ok"}


def test_http_1_0_streams_end_with_the_connection(node: Served) -> None:
    with Http1(node.port) as client:
        client.send(post({**CHAT, "stream": True}, version="1.0"))
        reply = client.answer()
        assert reply.status == 200
        assert "transfer-encoding" not in reply.headers
        assert reply.body.endswith(b"data: [DONE]\n\n")


def test_http_2_streams_side_by_side(node: Served) -> None:
    with Http2(node.port) as client:
        body = json.dumps({**CHAT, "max_tokens": 50, "stream": True}).encode()
        streams = [client.start("POST", "/v1/chat/completions", body=body) for _ in range(8)]
        for stream in streams:
            assert client.answer(stream).body.endswith(b"data: [DONE]\n\n")
        assert client.answer(client.start("GET", "/health")).json() == {"status": "ok"}


def test_an_upgrade_is_declined_and_the_request_answered(node: Served) -> None:
    with Http1(node.port) as client:
        client.send(post(CHAT, "/v1/chat/completions", "Connection: Upgrade", "Upgrade: websocket"))
        assert client.answer().status == 200


# Too large.


@pytest.mark.parametrize("body", [b'{"model": "m"}' + b" " * (BODY_LIMIT - 14)])
def test_a_body_at_the_limit(node: Served, lane: str, body: bytes) -> None:
    assert node.ask(lane, body).status == 200


def test_a_body_above_the_limit_is_refused_before_it_is_sent(node: Served) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY_LIMIT + 1}\r\n"
    for expect in ("", "Expect: 100-continue\r\n"):
        with Http1(node.port) as client:
            client.send((head + expect + "\r\n").encode())
            reply = client.answer()
            assert (reply.status, reply.error["type"]) == (413, "request_too_large")
            assert reply.headers["connection"] == "close"


def test_a_sender_of_too_much_gets_to_read_the_answer(node: Served, lane: str) -> None:
    reply = node.ask(lane, b"x" * (10 * BODY_LIMIT))
    assert (reply.status, reply.error["type"]) == (413, "request_too_large")


def test_chunks_above_the_limit(node: Served) -> None:
    with Http1(node.port) as client:
        client.send(in_chunks(*[b"x" * 60_000] * 4))
        assert client.answer().status == 413
        assert client.rest() == b""


def test_one_refused_upload_leaves_the_other_streams_of_its_connection_alone(node: Served) -> None:
    with Http2(node.port) as client:
        body = json.dumps({**CHAT, "max_tokens": 30, "stream": True, "fake": {"token_delay": 0.01}}).encode()
        stream = client.start("POST", "/v1/chat/completions", body=body)
        uploads = [
            client.start("POST", path, body=b"x" * 500_000) for path in ("/v1/completions", "/nowhere")
        ]
        assert [client.answer(upload).status for upload in uploads] == [413, 404]
        assert client.answer(stream).body.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("lines", [["X: " + "y" * 70_000], ["X: y"] * 200])
def test_heads_that_are_too_large(node: Served, lines: list[str]) -> None:
    with Http1(node.port) as client:
        client.send(get("/health", *lines))
        reply = client.answer()
        assert (reply.status, reply.error["type"]) == (431, "invalid_request_error")
        assert client.rest() == b""


def test_large_heads_within_the_limit(node: Served, lane: str) -> None:
    fields = {f"X-{number}": "y" * 8000 for number in range(5)}
    for path, document in (("/v1/models", None), ("/metrics/json", None), ("/v1/chat/completions", CHAT)):
        assert node.ask(lane, document, path, fields, "GET" if document is None else "POST").status == 200


# Malformed.

MALFORMED = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "LF": b"GET / HTTP/1.1\nHost: x\n\n",
    "no Host": b"GET /health HTTP/1.1\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "half a preface": b"PRI * HTTP/2.0\r\n\r\nno\r\n\r\n",
    "length and chunks": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "two lengths": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length:\r\n\r\n{}{}",
    "a folded length": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nX: y\r\n Content-Length: 4\r\n\r\n",
    "a bad chunk": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "a chunk that is too long": b"POST /tokenize HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"2\r\n{}{}\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("data", list(MALFORMED.values()), ids=list(MALFORMED))
def test_malformed_requests_get_one_answer_and_the_end(node: Served, data: bytes) -> None:
    for pieces in ([data], [data[:5], data[5:]]):
        with Http1(node.port) as client:
            for piece in pieces:
                client.send(piece)
            reply = client.answer()
            assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
            assert reply.headers["connection"] == "close"
            assert client.rest() == b""


@pytest.mark.parametrize("path", ["/tokenize?x y", "/tokenize?\x01", "/tokenize?x HTTP/1.0"])
def test_http_2_cannot_write_the_request_line_of_the_child(node: Served, path: str) -> None:
    before = node.fake("m")["requests"] if node.find("starting") else 0
    with Http2(node.port, unchecked=True) as client:
        reply = client.answer(client.start("POST", path, body=b'{"model": "m"}'))
        assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert not before or node.fake("m")["requests"] == before
