"""What passes in each direction, and its bytes on the wire."""

from __future__ import annotations

import pytest

from llamesh.net.exchange import Headers
from llamesh.net.heads import parse_head
from llamesh.web.headers import pass_back, request_id, response_head, upstream_request

DROPPED = [
    *("Connection", "Content-Length", "Keep-Alive", "Proxy-Authenticate", "Proxy-Connection", "Server", "TE"),
    *("Trailer", "Transfer-Encoding", "Upgrade", "X-Request-Id", "X-Accel-Buffering", "X-Llamesh-Node"),
    *("X-Llamesh-Anything", "X-Llama-Mesh-Hops", "Access-Control-Allow-Origin", "Access-Control-Max-Age"),
]


@pytest.mark.parametrize("name", DROPPED)
def test_what_an_upstream_cannot_say(name: str) -> None:
    kept = (b"content-type", b"text/plain")
    assert pass_back([(name.lower().encode(), b"x"), kept]) == [kept]


def test_repeated_headers_pass_in_order() -> None:
    headers: Headers = [(b"x-a", b"1"), (b"x-b", b"2"), (b"x-a", b"3")]
    assert pass_back(headers) == headers


@pytest.mark.parametrize(
    ("value", "kept"),
    [(b"a-1_.:/+=@", True), (b"x" * 128, True), (b"", False), (b"x" * 129, False), (b"a b", False)]
    + [(bad, False) for bad in (b'"', b"a\r\nb", b"\xff", b"<script>", b"a;b")],
)
def test_request_ids(value: bytes, kept: bool) -> None:
    id = request_id([(b"x-request-id", value)])  # noqa: A001
    assert (id == value.decode("latin-1")) is kept
    assert len(id) >= 1


def test_made_request_ids_differ() -> None:
    assert len({request_id([]) for _ in range(1000)}) == 1000


def test_the_request_to_a_child() -> None:
    head = upstream_request(
        b"/v1/completions?a=b",
        [
            (b"host", b"public"),
            (b"authorization", b"Bearer client"),
            (b"x-api-key", b"client"),
            (b"x-node-key", b"client"),
            (b"cookie", b"client"),
            (b"accept-encoding", b"gzip"),
            (b"content-length", b"99"),
            (b"transfer-encoding", b"chunked"),
            (b"expect", b"100-continue"),
            (b"connection", b"close"),
            (b"x-llamesh-via", b"client"),
            (b"content-type", b"application/json"),
            (b"x-session-id", b"s"),
            (b"x-conversation-id", b"c"),
        ],
        host=b"inside",
        authorization=b"Bearer child",
        length=5,
        id="r1",
        key_header=b"x-node-key",
    )
    parsed = parse_head(head)
    assert (parsed.method, parsed.target, parsed.length) == (b"POST", b"/v1/completions?a=b", 5)
    assert dict(parsed.headers) == {
        b"host": b"inside",
        b"authorization": b"Bearer child",
        b"content-type": b"application/json",
        b"x-session-id": b"s",
        b"x-request-id": b"r1",
        b"content-length": b"5",
    }


@pytest.mark.parametrize("to_peer", [True, False])
def test_only_a_peer_learns_the_conversation(to_peer: bool) -> None:
    """llama-server would keep the answer under its name, for any key to read, and write on for nobody."""
    head = upstream_request(
        b"/v1/chat/completions",
        [(b"x-conversation-id", b"c")],
        host=b"inside",
        authorization=b"",
        length=0,
        id="r1",
        key_header=b"x-api-key",
        to_peer=to_peer,
    )
    assert (b"x-conversation-id" in head) is to_peer


@pytest.mark.parametrize(
    ("length", "keep_alive", "has_body", "expected"),
    [
        (5, True, True, b"content-length: 5\r\nconnection: keep-alive\r\n\r\n"),
        (None, True, True, b"transfer-encoding: chunked\r\nconnection: keep-alive\r\n\r\n"),
        (None, False, True, b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"),
        (None, True, False, b"connection: keep-alive\r\n\r\n"),
    ],
)
def test_response_heads(length: int | None, keep_alive: bool, has_body: bool, expected: bytes) -> None:
    head = response_head(200, [(b"x", b"y")], length=length, keep_alive=keep_alive, has_body=has_body)
    assert head == b"HTTP/1.1 200 OK\r\nx: y\r\n" + expected


def test_a_status_that_nobody_knows() -> None:
    assert response_head(599, [], length=0, keep_alive=True).startswith(b"HTTP/1.1 599 Unknown\r\n")
