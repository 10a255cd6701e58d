"""The opening against those who don't play by the rules: bounded in time and size, and never believed."""

from __future__ import annotations

import contextlib
import gc
import socket
import tracemalloc

import pytest
import trio
import trio.testing

from llamesh.mesh.noise import (
    HINT_TOKEN,
    HINT_VERSION,
    MAGIC,
    PREAMBLE,
    HandshakeFailed,
    Initiator,
)
from llamesh.mesh.records import HELLO
from llamesh.mesh.stream import HANDSHAKE_SECONDS, NoiseTransport, accept, dial
from llamesh.mesh.trust import Claim
from tests.mesh.noise_pairs import Me, believe, hello, open_both, tcp_pair, welcome

ME = Me("me")


def never(_claim: Claim) -> None:
    raise AssertionError("nobody was proven to be anybody")


async def opens(role: str, sock: socket.socket) -> None:
    """One side of an opening with whoever is at the other end; it must not come to believing them."""
    if role == "dialler":
        await dial(sock, ME, hello(ME), never)
    else:
        await accept(sock, b"", ME, welcome(ME), never)


async def meet(role: str, said: bytes, *, shut: bool = True) -> tuple[HandshakeFailed, bytes]:
    """What a side raises that hears this and then the end of the connection, and what it says itself."""
    near, far = tcp_pair()
    far.setblocking(False)
    far.sendall(said)
    if shut:
        far.shutdown(socket.SHUT_WR)
    with trio.fail_after(20), pytest.raises(HandshakeFailed) as caught:
        await opens(role, near)
    assert near.fileno() == -1
    heard = b""
    with trio.fail_after(10):
        while True:
            await trio.lowlevel.wait_readable(far)
            try:
                data = far.recv(65_536)
            except ConnectionResetError:
                break
            if not data:
                break
            heard += data
    far.close()
    return caught.value, heard


MESSAGE = Initiator(b"\x01" * 32, b"t" * 32).start()


@pytest.mark.parametrize(
    ("role", "said", "reason"),
    [
        ("acceptor", b"", "closed"),
        ("acceptor", b"GET / HTTP/1.1\r\n\r\n", "garbage"),
        ("acceptor", b"\x00" * 100, "garbage"),
        ("acceptor", MAGIC, "closed"),
        ("acceptor", PREAMBLE, "closed"),
        ("acceptor", PREAMBLE + b"\x00\x00", "garbage"),
        ("acceptor", PREAMBLE + b"\xfe\xff", "garbage"),
        ("acceptor", PREAMBLE + b"\x00\x31" + bytes(49), "garbage"),
        ("acceptor", PREAMBLE + b"\x00\x30" + bytes(48), "garbage"),
        ("acceptor", MESSAGE[:-1], "closed"),
        ("acceptor", MESSAGE, "closed"),
        ("acceptor", MESSAGE + b"\x00\x40" + bytes(64) + b"\x02\x00\x20" + bytes(32), "garbage"),
        ("acceptor", MESSAGE + b"\x00\x40" + bytes(64) + b"\x02\xff\xff", "garbage"),
        ("acceptor", MESSAGE + b"\x00\x40" + bytes(64) + b"\x00\x00\x20" + bytes(32), "garbage"),
        ("acceptor", MESSAGE + b"\x00\x40" + bytes(64), "closed"),
        ("acceptor", PREAMBLE + HINT_TOKEN, "token"),
        ("dialler", b"", "closed"),
        ("dialler", b"HTTP/1.1 400 Bad Request\r\n\r\n", "garbage"),
        ("dialler", b"SSH-2.0-x\r\n", "garbage"),
        ("dialler", b"\x00\x60", "closed"),
        ("dialler", b"\x00\x60" + bytes(96), "garbage"),
        ("dialler", b"\x00\x61" + bytes(97), "garbage"),
        ("dialler", HINT_TOKEN, "token"),
        ("dialler", HINT_VERSION, "version"),
        ("dialler", b"\xff\x00\x01\x07", "garbage"),
        ("dialler", b"\xff\x00", "closed"),
    ],
    ids=lambda value: len(value) if isinstance(value, bytes) else value,  # some of the bytes are random
)  # fmt: skip
async def test_garbage(role: str, said: bytes, reason: str) -> None:
    error, heard = await meet(role, said)
    assert error.reason == reason
    assert str(error).startswith("127.0.0.1:")
    # An acceptor says nothing to who hasn't said a whole first message.
    assert role == "dialler" or said.startswith(MESSAGE) or heard == b""


async def test_another_wire_version_is_said_on_both_sides() -> None:
    said = MAGIC + b"\x02" + b"\x00\x99" + bytes(0x99)
    error, heard = await meet("acceptor", said, shut=False)
    assert error.reason == "version"
    assert "it speaks version 2 of the mesh's wire, this node speaks 1: update the older" in str(error)
    assert heard == HINT_VERSION
    error, heard = await meet("dialler", heard)
    assert error.reason == "version"
    assert heard.startswith(PREAMBLE)


async def test_who_goes_on_before_the_answer_is_refused() -> None:
    near, far = tcp_pair()
    with far, pytest.raises(HandshakeFailed, match="before it was answered"):
        await accept(near, MESSAGE + b"\x00", ME, welcome(ME), never)


async def through(flip: int, *, forward: bool) -> tuple[object, object, int]:
    """An opening with byte number `flip` of one direction changed on its way; how it ended, and the bytes."""
    near, tap_near = socket.socketpair()
    tap_far, far = socket.socketpair()
    passed = 0

    async def carry(source: socket.socket, sink: socket.socket, *, change: bool) -> None:
        nonlocal passed
        while True:
            await trio.lowlevel.wait_readable(source)
            try:
                data = bytearray(source.recv(65_536))
            except ConnectionResetError:
                data = bytearray()
            if not data:
                with contextlib.suppress(OSError):  # that side left as well
                    sink.shutdown(socket.SHUT_WR)
                return
            if change:
                if 0 <= flip - passed < len(data):
                    data[flip - passed] ^= 1 << flip % 8
                passed += len(data)
            with contextlib.suppress(BrokenPipeError):
                sink.sendall(data)

    for sock in (tap_near, tap_far):
        sock.setblocking(False)
    with trio.fail_after(30), tap_near, tap_far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: carry(tap_near, tap_far, change=forward))
            nursery.start_soon(lambda: carry(tap_far, tap_near, change=not forward))
            outcome = await open_both(Me("one"), Me("two"), (near, far))
            outcome.close()
            nursery.cancel_scope.cancel()
    return outcome.dialled, outcome.accepted, passed


@pytest.mark.parametrize("forward", [True, False])
async def test_no_flipped_byte_gets_through(autojump_clock: trio.testing.MockClock, forward: bool) -> None:
    """Each byte of an opening, in both directions. A changed length makes a side wait for ever, almost."""
    dialled, accepted, size = await through(-1, forward=forward)
    assert isinstance(dialled, NoiseTransport)
    assert isinstance(accepted, NoiseTransport)
    assert size > 100
    for flip in range(size):
        dialled, accepted, _ = await through(flip, forward=forward)
        assert isinstance(dialled, HandshakeFailed), flip
        if forward:
            assert isinstance(accepted, HandshakeFailed), flip


async def test_a_replayed_dialler_is_not_believed() -> None:
    """Everything that a dialler once sent, sent again."""
    near, tap = tcp_pair()
    recorded = b""
    gone, far = tcp_pair()
    tap.setblocking(False)
    gone.setblocking(False)

    async def record() -> None:
        nonlocal recorded
        while True:
            await trio.lowlevel.wait_readable(tap)
            data = tap.recv(65_536)
            if not data:
                return
            recorded += data
            gone.sendall(data)

    async def back() -> None:
        while True:
            await trio.lowlevel.wait_readable(gone)
            tap.sendall(gone.recv(65_536))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(record)
            nursery.start_soon(back)
            outcome = await open_both(Me("one"), Me("two"), (near, far))
            nursery.cancel_scope.cancel()
    outcome.close()
    tap.close()
    gone.close()
    assert len(outcome.transports) == 2
    error, _ = await meet("acceptor", recorded)
    assert error.reason in ("garbage", "token")


# Time, cancellation and memory.


@pytest.mark.parametrize("role", ["dialler", "acceptor"])
@pytest.mark.parametrize("said", [b"", MESSAGE[:1], MESSAGE[:30], MESSAGE], ids=len)
async def test_silence_ends_in_time(autojump_clock: trio.testing.MockClock, role: str, said: bytes) -> None:
    near, far = tcp_pair()
    started = trio.current_time()
    if role == "acceptor":
        far.sendall(said)
    with far, pytest.raises(HandshakeFailed, match="no handshake within 5 s") as caught:
        await opens(role, near)
    assert caught.value.reason == "timeout"
    assert trio.current_time() - started == pytest.approx(HANDSHAKE_SECONDS)
    assert near.fileno() == -1


async def test_a_slow_trickle_ends_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """The time is for all of it, not for each byte."""
    near, far = tcp_pair()
    sent = 0

    async def trickle() -> None:
        nonlocal sent
        for at in range(len(MESSAGE)):
            far.sendall(MESSAGE[at : at + 1])
            sent += 1
            await trio.sleep(0.9)

    with far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            with pytest.raises(HandshakeFailed, match="no handshake within 5 s"):
                await accept(near, b"", ME, welcome(ME), never)
            nursery.cancel_scope.cancel()
    assert sent == 6


@pytest.mark.parametrize("role", ["dialler", "acceptor"])
@pytest.mark.parametrize("size", [0, 9, 11, 20, len(MESSAGE)])
async def test_a_cancelled_opening_closes_the_socket(role: str, size: int) -> None:
    near, far = tcp_pair()
    if role == "acceptor":
        far.sendall(MESSAGE[:size])
    with far:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opens, role, near)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert near.fileno() == -1


async def test_a_defect_of_the_caller_closes_the_socket() -> None:
    outcome = await open_both(Me("one"), Me("two"), dialler_checks=lambda claim: 1 / 0)  # type: ignore[arg-type]
    assert isinstance(outcome.dialled, ZeroDivisionError)
    assert isinstance(outcome.accepted, NoiseTransport)
    with pytest.raises(OSError, match=r"."):
        await outcome.accepted.receive()
    outcome.close()


async def test_somebody_who_left_already() -> None:
    near, far = tcp_pair()
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    far.close()
    with pytest.raises((OSError, HandshakeFailed)):
        await accept(near, b"", ME, welcome(ME), never)
    assert near.fileno() == -1


async def test_a_thousand_idle_attackers_cost_next_to_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """Each has one task and the few bytes that it sent, and both go when its time is up."""
    near: list[socket.socket] = []
    ends = 0

    async def victim(sock: socket.socket) -> None:
        nonlocal ends
        with pytest.raises(HandshakeFailed):
            await accept(sock, b"", ME, welcome(ME), never)
        ends += 1

    pairs = [socket.socketpair() for _ in range(1000)]
    for attacker, sock in pairs:
        attacker.sendall(MESSAGE[:-1])
        near.append(sock)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        async with trio.open_nursery() as nursery:
            for sock in near:
                nursery.start_soon(victim, sock)
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            held = tracemalloc.get_traced_memory()[0] - before
            assert ends == 0
        gc.collect()
        after = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert ends == 1000
    assert held / 1000 < 12_000  # a trio task with its coroutines and cancel scopes
    assert after / 1000 < 2_000
    for attacker, _ in pairs:
        attacker.close()


async def test_a_hello_of_the_largest_size_and_one_byte_more() -> None:
    for size, reason in ((8192, "protocol"), (8193, "garbage")):
        near, far = tcp_pair()

        async def greets(sock: socket.socket, size: int) -> None:
            initiator = Initiator(ME.private, ME.token)
            async with trio.SocketStream(trio.socket.from_stdlib_socket(sock)) as stream:
                await stream.send_all(initiator.start())
                reply = await stream.receive_some()
                message_3 = initiator.reply(reply[2:])
                assert initiator.session is not None
                await stream.send_all(message_3 + initiator.session.encrypt(HELLO, b" " * size))
                with contextlib.suppress(trio.BrokenResourceError):
                    while await stream.receive_some():
                        pass

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(greets, near, size)
                with pytest.raises(HandshakeFailed) as caught:
                    await accept(far, b"", ME, welcome(ME), believe)
                assert caught.value.reason == reason
