"""The socket transport: whole sends to slow readers, cancellation, and connecting."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from llamesh.net.transport import READ_SIZE, SocketTransport, connect

PATTERN = bytes(range(256)) * 16_384  # 4 MiB: no socket buffer holds it


def pair() -> tuple[SocketTransport, SocketTransport]:
    one, two = socket.socketpair()
    return SocketTransport(one), SocketTransport(two)


async def read_all(transport: SocketTransport, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = await transport.receive()
        assert 0 < len(piece) <= READ_SIZE
        data += piece
    return bytes(data)


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


async def test_both_directions_at_once() -> None:
    one, two = pair()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, PATTERN)
            nursery.start_soon(two.send, PATTERN)
            nursery.start_soon(read_all, one, len(PATTERN))
            nursery.start_soon(read_all, two, len(PATTERN))
    one.close()
    two.close()


async def test_a_cancelled_receive_loses_nothing() -> None:
    one, two = pair()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two.receive)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    await one.send(b"still here")
    assert await two.receive() == b"still here"
    one.close()
    two.close()


async def test_a_cancelled_send_ends() -> None:
    one, two = pair()
    with trio.fail_after(10), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.send, PATTERN)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    one.close()
    arrived = 0
    while data := await two.receive():
        arrived += len(data)
    assert 0 < arrived < len(PATTERN)
    two.close()


async def test_the_end_of_the_stream() -> None:
    one, two = pair()
    one.close()
    one.close()
    assert one.closed
    assert await two.receive() == b""
    with pytest.raises(OSError, match=r"."):
        await two.send(PATTERN)
    with pytest.raises(OSError, match=r"."):
        await one.send(b"x")
    two.close()


async def test_closing_wakes_who_waits() -> None:
    one, two = pair()

    async def wait() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await one.receive()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            one.close()
    two.close()


async def test_detaching_gives_the_socket_away() -> None:
    one, two = pair()
    with one.detach() as sock:
        assert one.closed
        one.close()
        sock.sendall(b"mine now")
        assert await two.receive() == b"mine now"
    two.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_connecting(host: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        try:
            listener.bind((host, 0))
        except OSError:
            assert family == socket.AF_INET6  # a machine without IPv6: nothing to connect to
            return
        listener.listen()
        transport = await connect(host, listener.getsockname()[1])
        accepted, _ = listener.accept()
        with accepted:
            await transport.send(b"hello")
            accepted.settimeout(10)
            assert accepted.recv(10) == b"hello"
            assert transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        transport.close()


async def test_nobody_listens() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound, so nobody else gets it; not listening
        with pytest.raises(OSError, match=r"."):
            await connect("127.0.0.1", reserved.getsockname()[1])
