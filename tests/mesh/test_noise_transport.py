"""The transport over a session: the verbs, the end, cuts, cancellation, and what the wire shows."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from llamesh.mesh.hello import Refused, encode_refusal
from llamesh.mesh.noise_transport import NoiseTransport, Truncated
from llamesh.mesh.records import END, REFUSED, RecordBroken, Session
from llamesh.mesh.stream import Welcome
from llamesh.mesh.trust import NotTrusted
from llamesh.net.exchange import UpstreamBroken, UpstreamConnection
from llamesh.net.transport import SocketTransport
from tests.mesh.noise_pairs import open_pair

PATTERN = bytes(range(256)) * 16_384  # 4 MiB: no socket buffer holds it
KEYS = (b"\x01" * 32, b"\x02" * 32)


def transport(sock: socket.socket, *, mirrored: bool = False) -> NoiseTransport:
    """A transport without a handshake, with keys that the test knows."""
    keys = KEYS[::-1] if mirrored else KEYS
    session = Session(*keys, b"h" * 32, b"r" * 32)
    return NoiseTransport(sock, session, Welcome("far", "1", 1, "local"), "10.0.0.9:8080")


def pair() -> tuple[NoiseTransport, NoiseTransport]:
    one, two = socket.socketpair()
    for sock in (one, two):
        sock.setblocking(False)
    return transport(one), transport(two, mirrored=True)


def far_end() -> tuple[NoiseTransport, socket.socket, Session]:
    """A transport, and the raw other end with its session, to misbehave with."""
    one, two = socket.socketpair()
    one.setblocking(False)
    return transport(one), two, Session(*KEYS[::-1], b"h" * 32, b"r" * 32)


async def read_all(far: NoiseTransport, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += await far.receive()
    return bytes(data)


async def read_to_error(far: NoiseTransport) -> tuple[bytes, OSError]:
    data = b""
    with trio.fail_after(10):
        while True:
            try:
                data += await far.receive()
            except OSError as error:
                return data, error


@pytest.mark.parametrize("kind", [bytes, memoryview])
async def test_all_of_it_arrives_at_a_slow_reader(kind: type[bytes] | type[memoryview]) -> None:
    one, two = pair()
    done = trio.Event()

    async def send() -> None:
        await one.send(kind(PATTERN))
        done.set()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            assert not done.is_set()  # the reader holds it back
            assert await read_all(two, len(PATTERN)) == PATTERN
    one.close()
    two.close()


async def test_both_directions_at_once_over_tcp() -> None:
    one, two = await open_pair()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, PATTERN)
            nursery.start_soon(two.send, PATTERN)
            nursery.start_soon(read_all, one, len(PATTERN))
            nursery.start_soon(read_all, two, len(PATTERN))
    one.close()
    two.close()


async def test_small_sends_coalesce() -> None:
    one, two = pair()
    for number in range(50):
        await one.send(b"data: %d\n\n" % number)
    assert await two.receive() == b"".join(b"data: %d\n\n" % number for number in range(50))
    one.close()
    two.close()


async def test_an_empty_send_is_nothing() -> None:
    one, two = pair()
    await one.send(b"")
    await one.send(b"x")
    assert await two.receive() == b"x"
    one.close()
    two.close()


async def test_a_record_in_pieces() -> None:
    near, far, session = far_end()
    record = session.seal(b"hello world")
    got: list[bytes] = []

    async def read() -> None:
        got.append(await near.receive())

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for at in range(len(record)):
                assert not got
                far.send(record[at : at + 1])
                await trio.testing.wait_all_tasks_blocked()
    assert got == [b"hello world"]
    near.close()
    far.close()


async def test_a_cancelled_receive_loses_nothing() -> None:
    """Cancelled after each byte of two records: all the data is there in the end."""
    near, far, session = far_end()
    wire = session.seal(b"hello ") + session.seal(b"world")
    got = b""
    for at in range(len(wire)):
        far.send(wire[at : at + 1])
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    nonlocal got
                    got += await near.receive()

                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
    assert got == b"hello world"
    near.close()
    far.close()


async def test_a_cancelled_send_closes_the_connection() -> None:
    one, two = pair()
    with trio.fail_after(10), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, PATTERN)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert one.closed
    with pytest.raises(OSError, match="cut off in the middle of a record"):
        await one.send(b"more")
    assert not one.send_now(b"more")
    arrived, error = await read_to_error(two)
    assert isinstance(error, Truncated)
    assert str(error) == "far at 10.0.0.9:8080 cut the connection"
    assert PATTERN.startswith(arrived)
    two.close()


# The end, and what isn't one.


async def test_an_authenticated_end() -> None:
    one, two = pair()
    await one.send(b"last words")
    await one.send_end()
    one.close()
    assert await two.receive() == b"last words"
    assert await two.receive() == b""
    assert await two.receive() == b""
    assert not one.send_now(b"x")
    two.close()


async def test_nothing_is_sent_after_the_end() -> None:
    one, two = pair()
    await one.send_end()
    with pytest.raises(OSError, match="the end was sent"):
        await one.send(b"x")
    with pytest.raises(OSError, match="the end was sent"):
        await one.send_end()
    # The other direction is still open.
    await two.send(b"an answer")
    assert await one.receive() == b"an answer"
    one.close()
    two.close()


async def test_a_cut_is_no_end_wherever_it_falls() -> None:
    session = Session(*KEYS[::-1], b"", b"")
    wire = session.seal(b"first") + session.seal(b"second") + session.encrypt(END, b"")
    for at in range(len(wire)):
        near, far, _ = far_end()
        far.sendall(wire[:at])
        far.close()
        got, error = await read_to_error(near)
        assert isinstance(error, Truncated)
        assert b"firstsecond".startswith(got)
        with pytest.raises(Truncated):
            await near.receive()
        near.close()


async def test_a_changed_record_is_an_error_for_good() -> None:
    near, far, session = far_end()
    good = session.seal(b"first")
    bad = bytearray(session.seal(b"second"))
    bad[-1] ^= 1
    far.sendall(good)
    assert await near.receive() == b"first"
    far.sendall(bad)
    for _ in range(2):
        with pytest.raises(RecordBroken):
            await near.receive()
    near.close()
    far.close()


async def test_a_refusal_instead_of_data() -> None:
    near, far, session = far_end()
    far.sendall(
        session.seal(b"data") + session.encrypt(REFUSED, encode_refusal(NotTrusted("go\x1b[31m away")))
    )
    assert await near.receive() == b"data"
    for _ in range(2):
        with pytest.raises(Refused, match=r"^far at 10.0.0.9:8080 refuses this node: go\?\[31m away$"):
            await near.receive()
    near.close()
    far.close()


async def test_a_reset_is_an_error() -> None:
    one, two = await open_pair()
    two.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    two.close()
    with trio.fail_after(10), pytest.raises(OSError, match=r"."):
        await one.receive()
    with pytest.raises(OSError, match=r"."):
        await one.send(PATTERN)
    assert not one.closed  # what came before could still be read
    with pytest.raises(OSError, match="the connection is lost"):
        await one.send(b"x")
    one.close()


# Closing.


async def test_closing_wakes_who_waits() -> None:
    one, two = pair()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await one.receive()

    async def push() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await one.send(PATTERN)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(push)
            await trio.testing.wait_all_tasks_blocked()
            one.close()
    one.close()
    assert one.closed
    with pytest.raises(trio.ClosedResourceError):
        await one.receive()
    assert "closed" in repr(one)
    two.close()


# Sending without waiting.


async def test_send_now() -> None:
    one, two = pair()
    assert one.send_now(b"HTTP/1.1 102 Processing\r\n\r\n")
    assert await two.receive() == b"HTTP/1.1 102 Processing\r\n\r\n"
    one.close()
    assert not one.send_now(b"x")
    two.close()


async def test_what_send_now_leaves_goes_with_the_next_send() -> None:
    one, two = pair()
    line = b"interim " * 100
    said = 0
    while one.send_now(line):
        said += 1
        assert len(one._left) <= 70_000
    assert one._left  # the kernel is full, and so is what may be left over
    got = b""

    async def read() -> None:
        nonlocal got
        got = await read_all(two, said * len(line) + 4)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await one.send(b"done")
    assert got == line * said + b"done"
    one.close()
    two.close()


async def test_send_now_beside_a_send_in_progress_is_refused() -> None:
    one, two = pair()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, PATTERN)
            await trio.testing.wait_all_tasks_blocked()
            assert not one.send_now(b"between two records")
            with pytest.raises(trio.BusyResourceError):
                await one.send(b"between two records")
            assert await read_all(two, len(PATTERN)) == PATTERN
    one.close()
    two.close()


async def test_send_now_to_somebody_who_left() -> None:
    one, two = pair()
    two.close()
    assert not one.send_now(b"x")
    with pytest.raises(OSError, match="the connection is lost"):
        await one.send(b"x")
    one.close()


# As the transport of an HTTP exchange, and what a wire-tapper sees of it.


async def test_an_http_exchange() -> None:
    near, far = await open_pair()
    upstream = UpstreamConnection(near)
    body = b"".join(b"7\r\ndata %d\n\r\n" % number for number in range(10)) + b"0\r\n\r\n"

    async def serve() -> None:
        for _ in range(2):
            asked = b""
            while not asked.endswith(b"secret prompt"):
                asked += await far.receive()
            await far.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            far.send_now(body[:20])
            await far.send(body[20:])

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            for _ in range(2):
                await upstream.send(b"POST / HTTP/1.1\r\nContent-Length: 13\r\n\r\n", [b"secret prompt"])
                answer = b""
                while not upstream.response.complete:
                    await upstream.read()
                    answer += upstream.response.take()
                assert answer == b"".join(b"data %d\n" % number for number in range(10))
                assert upstream.reusable
    far.close()
    with pytest.raises(UpstreamBroken, match="cut the connection"):
        await upstream.read()
    upstream.close()


async def test_the_wire_shows_no_plaintext() -> None:
    """Both directions pass through a tap; nothing that either node said can be read there."""
    near, tap_near = socket.socketpair()
    tap_far, far = socket.socketpair()
    seen = bytearray()

    async def tap(source: SocketTransport, sink: SocketTransport) -> None:
        while data := await source.receive():
            seen.extend(data)
            await sink.send(data)

    left, right = SocketTransport(tap_near), SocketTransport(tap_far)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(tap, left, right)
            nursery.start_soon(tap, right, left)
            one, two = await open_pair((near, far))
            await one.send(b"a very secret prompt")
            assert await two.receive() == b"a very secret prompt"
            await two.send(b"a very secret answer")
            assert await one.receive() == b"a very secret answer"
            nursery.cancel_scope.cancel()
    for word in (
        b"secret",
        b"node_id",
        b"1.2.3",
        b"8080",
        b"one",
        b"two",
        b"ttttttt",
        one.remote_key,
        two.remote_key,
    ):
        assert word not in seen
    assert len(seen) > 300
    for end in (one, two, left, right):
        end.close()
