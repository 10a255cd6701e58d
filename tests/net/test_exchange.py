"""The client side of HTTP/1.1: whatever an upstream may send, in whatever pieces."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Iterable
from dataclasses import dataclass

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from llamesh.net.exchange import MAX_HEAD, Headers, UpstreamBroken, UpstreamConnection
from llamesh.net.transport import SocketTransport
from tests.net.memory import ScriptedTransport

OK = b"HTTP/1.1 200 OK\r\n"
PLAIN = OK + b"Content-Length: 5\r\n\r\nhello"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
UNTIL_CLOSE = OK + b"Content-Type: text/plain\r\n\r\nhello"
INTERIM = b"HTTP/1.1 102 Processing\r\nX-Progress: 5\r\n\r\n"


@dataclass
class Answer:
    status: int
    headers: Headers
    body: bytes
    connection: UpstreamConnection


async def exchange(pieces: Iterable[bytes | OSError]) -> Answer:
    connection = UpstreamConnection(ScriptedTransport(pieces))
    await connection.send(b"POST / HTTP/1.1\r\n\r\n", [b"body"])
    body = b""
    while not connection.response.complete:
        await connection.read()
        body += connection.response.take()
    return Answer(connection.response.status, connection.response.headers, body, connection)


async def broken(pieces: Iterable[bytes | OSError]) -> UpstreamBroken:
    with pytest.raises(UpstreamBroken) as caught:
        await exchange(pieces)
    return caught.value


async def test_a_body_of_known_length() -> None:
    answer = await exchange([PLAIN])
    assert (answer.status, answer.body) == (200, b"hello")
    assert answer.connection.response.length == 5
    assert answer.connection.reusable
    assert answer.connection.served == 1


async def test_a_body_in_chunks() -> None:
    answer = await exchange([CHUNKED])
    assert answer.body == b"hello world"
    assert answer.connection.response.length is None
    assert answer.connection.reusable


async def test_a_body_that_ends_with_the_connection() -> None:
    answer = await exchange([UNTIL_CLOSE, b" world"])
    assert answer.body == b"hello world"
    assert not answer.connection.reusable


@pytest.mark.parametrize("status", [204, 304])
async def test_answers_without_a_body(status: int) -> None:
    answer = await exchange([b"HTTP/1.1 %d X\r\n\r\n" % status])
    assert (answer.status, answer.body) == (status, b"")
    assert answer.connection.reusable


async def test_interim_answers_are_told_and_passed_over() -> None:
    told: list[tuple[int, Headers]] = []
    connection = UpstreamConnection(ScriptedTransport([INTERIM, INTERIM + PLAIN]))
    connection.on_interim = lambda status, headers: told.append((status, list(headers)))
    await connection.send(b"")
    while not connection.response.complete:
        await connection.read()
    assert told == [(102, [(b"x-progress", b"5")])] * 2
    assert connection.response.headers == [(b"content-length", b"5")]
    assert connection.response.take() == b"hello"


async def test_many_interim_answers_are_no_huge_head() -> None:
    assert (await exchange([INTERIM] * (MAX_HEAD // 20) + [PLAIN])).body == b"hello"


async def test_an_answer_that_was_only_begun_by_an_interim_one_has_started() -> None:
    assert (await broken([INTERIM])).started


@pytest.mark.parametrize(
    ("header", "reusable", "limit"),
    [
        (b"", True, 4.0),
        (b"Keep-Alive: timeout=5, max=100\r\n", True, 4.0),
        (b"Keep-Alive: timeout=30\r\n", True, 29.0),
        (b"Keep-Alive: timeout=0\r\n", True, 0.0),
        (b"Keep-Alive: timeout=5, max=1\r\n", False, 4.0),
        (b"Keep-Alive: max=2\r\n", True, 4.0),
        (b"Keep-Alive: nonsense\r\n", True, 4.0),
        (b"Connection: close\r\n", False, 4.0),
    ],
)
async def test_keep_alive_is_learned(header: bytes, reusable: bool, limit: float) -> None:
    connection = (await exchange([OK + header + b"Content-Length: 5\r\n\r\nhello"])).connection
    assert connection.reusable is reusable
    assert connection.idle_limit == limit


async def test_http_1_0_answers_are_not_followed_by_another() -> None:
    assert not (await exchange([PLAIN.replace(b"1.1", b"1.0")])).connection.reusable


async def test_a_closed_connection_is_not_reusable() -> None:
    connection = (await exchange([PLAIN])).connection
    connection.close()
    assert not connection.reusable


async def test_two_requests_on_one_connection() -> None:
    transport = ScriptedTransport([PLAIN, CHUNKED])
    connection = UpstreamConnection(transport)
    for expected in (b"hello", b"hello world"):
        await connection.send(b"head", [b"body"])
        await connection.read()
        assert connection.response.take() == expected
        assert connection.reusable
    assert connection.served == 2
    assert transport.sent == b"headbody" * 2


async def test_large_bodies_are_sent_apart() -> None:
    transport = ScriptedTransport()
    await UpstreamConnection(transport).send(b"head", [memoryview(b"x" * 70_000), b"y"])
    assert transport.sent == b"head" + b"x" * 70_000 + b"y"


@pytest.mark.parametrize(
    ("pieces", "started"),
    [
        ([], False),
        ([ConnectionResetError()], False),
        ([b"H"], True),
        ([OK], True),
        ([OK, ConnectionResetError()], True),
        ([PLAIN[:-1]], True),
        ([CHUNKED[:-2]], True),
        ([CHUNKED[:-2], ConnectionResetError()], True),
        ([b"\x00\xff nothing that speaks HTTP\r\n\r\n"], True),
        ([b"SSH-2.0-x\r\n"], True),
        ([OK + b"Content-Length: x\r\n\r\n"], True),
        ([OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\na"], True),
        ([OK + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"], True),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"], True),
        ([b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n"], True),
        ([PLAIN + b"HTTP/1.1 200 OK\r\n"], True),
        ([PLAIN + b"junk"], True),
        ([OK + b"Connection: close\r\nContent-Length: 1\r\n\r\nab"], True),
        ([OK + b"X: " + b"y" * MAX_HEAD], True),
        ([OK] + [b"X: " + b"y" * 1000 + b"\r\n"] * 70, True),
    ],
)
async def test_all_else_is_broken(pieces: list[bytes | OSError], started: bool) -> None:
    assert (await broken(pieces)).started is started


async def test_a_connection_that_takes_no_request() -> None:
    connection = UpstreamConnection(ScriptedTransport(refuses=BrokenPipeError("gone")))
    with pytest.raises(UpstreamBroken, match="gone") as caught:
        await connection.send(b"head", [b"body"])
    assert not caught.value.started


async def test_over_real_sockets_until_the_other_side_closes() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        connection = UpstreamConnection(SocketTransport(ours))
        await connection.send(b"POST / HTTP/1.1\r\n\r\n", [b"x"])
        assert theirs.recv(1000) == b"POST / HTTP/1.1\r\n\r\nx"
        theirs.sendall(PLAIN)
        await connection.read()
        assert connection.response.take() == b"hello"
        await connection.send(b"again")
    with pytest.raises(UpstreamBroken, match=r"closed|reset") as caught:
        await connection.read()
    assert not caught.value.started
    connection.close()


@given(
    st.sampled_from([PLAIN, CHUNKED, UNTIL_CLOSE, INTERIM + CHUNKED, INTERIM + INTERIM + PLAIN]),
    st.lists(st.integers(0, 200), max_size=12),
)
def test_the_cuts_of_an_answer_do_not_matter(data: bytes, places: list[int]) -> None:
    async def check() -> None:
        ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
        whole = await exchange([data])
        for pieces in (
            [data[a:b] for a, b in itertools.pairwise(ends)],
            [data[i : i + 1] for i in range(len(data))],
        ):
            cut = await exchange(pieces)
            assert (cut.status, cut.headers, cut.body) == (whole.status, whole.headers, whole.body)
            assert cut.connection.reusable == whole.connection.reusable

    trio.run(check)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda junk: OK + junk))
def test_random_bytes_are_an_answer_or_broken(data: bytes) -> None:
    async def check() -> None:
        with contextlib.suppress(UpstreamBroken):
            await exchange([data])

    trio.run(check)
