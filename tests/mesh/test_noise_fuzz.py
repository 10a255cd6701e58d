"""Hypothesis against the listener, the dialler and the stream: any bytes, and any change of good ones."""

from __future__ import annotations

import os
import socket

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from llamesh.mesh.noise import (
    HINT_TOKEN,
    HINT_VERSION,
    MAGIC,
    PREAMBLE,
    HandshakeFailed,
    Initiator,
    Responder,
)
from llamesh.mesh.records import DATA, END, HELLO, REFUSED, WELCOME, RecordBroken, Records, Session
from llamesh.mesh.stream import Refused, accept, dial
from llamesh.mesh.trust import Claim, NotTrusted
from tests.mesh.noise_pairs import Me, believe, hello, welcome

ME = Me("me", private=b"\x05" * 32)
OTHER = Me("other", private=b"\x06" * 32)

# What looks right for a while, in any order, between bytes that don't.
_start = Initiator(OTHER.private, OTHER.token).start()
_answer = Responder(OTHER.private, [OTHER.token]).first(_start[len(PREAMBLE) + 2 :])
PLAUSIBLE = [
    MAGIC, PREAMBLE, _start, _start[:-1], _answer, HINT_TOKEN, HINT_VERSION,
    b"\x00\x30", b"\x00\x60", b"\x00\x40", bytes(48), bytes(64), bytes(96),
    b"\x02\x00\x20", b"\x03\x00\x20", b"\x04\x00\x20", bytes(32), b"\xff" * 4,
]  # fmt: skip
wires = st.lists(st.one_of(st.sampled_from(PLAUSIBLE), st.binary(max_size=100)), max_size=8).map(b"".join)


def never(_claim: Claim) -> None:
    raise AssertionError("nobody was proven to be anybody")


@given(wires, st.integers(0, 100))
@settings(deadline=None)
async def test_an_acceptor_and_any_bytes(wire: bytes, read_before: int) -> None:
    near, far = socket.socketpair()
    with far, trio.fail_after(20):
        far.sendall(wire[read_before:])
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(HandshakeFailed):
            await accept(near, wire[:read_before], ME, welcome(ME), never)
    assert near.fileno() == -1


@given(wires)
@settings(deadline=None)
async def test_a_dialler_and_any_bytes(wire: bytes) -> None:
    near, far = socket.socketpair()
    with far, trio.fail_after(20):
        far.sendall(wire)
        far.shutdown(socket.SHUT_WR)
        with pytest.raises(HandshakeFailed):
            await dial(near, ME, hello(ME), never)
    assert near.fileno() == -1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=6,
)
MEMBERS = [
    "node_id", "purpose", "version", "epoch", "port", "addresses", "previous_key", "proof", "seen_from",
    "message", "itself",
]  # fmt: skip
said = st.one_of(
    st.binary(max_size=200),
    st.dictionaries(st.sampled_from(MEMBERS) | st.text(max_size=8), json_values, max_size=11).map(
        lambda value: repr(value).replace("'", '"').replace("None", "null").encode("utf-8", "surrogatepass")
    ),
)


async def take(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        await trio.lowlevel.wait_readable(sock)
        data += sock.recv(size - len(data))
    return data


@given(said)
@settings(deadline=None)
async def test_an_acceptor_and_any_hello_of_somebody_with_the_token(data: bytes) -> None:
    """It is refused, encrypted, with a reason; nothing else comes of it."""
    near, far = socket.socketpair()
    far.setblocking(False)
    told: list[bytes] = []

    async def dials() -> None:
        initiator = Initiator(OTHER.private, OTHER.token)
        far.sendall(initiator.start())
        message_3 = initiator.reply((await take(far, 98))[2:])
        session = initiator.session
        assert session is not None
        # An empty record isn't answered: it is no record of a handshake.
        far.sendall(message_3 + session.encrypt(HELLO, data or b" "))
        header = await take(far, 3)
        assert header[0] == REFUSED
        told.append(session.decrypt(header, await take(far, int.from_bytes(header[1:], "big"))))

    with far, trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dials)
            with pytest.raises((HandshakeFailed, NotTrusted)):
                await accept(near, b"", ME, welcome(ME), never)
    assert told[0].startswith(b'{"message":"')
    assert near.fileno() == -1


@given(st.sampled_from([WELCOME, REFUSED, HELLO, DATA, END]), said)
@settings(deadline=None)
async def test_a_dialler_and_any_answer_of_somebody_with_the_token(kind: int, data: bytes) -> None:
    near, far = socket.socketpair()
    far.setblocking(False)

    async def accepts() -> None:
        responder = Responder(OTHER.private, [OTHER.token])
        await take(far, len(PREAMBLE) + 2)
        far.sendall(responder.first(await take(far, 48)))
        session = responder.last((await take(far, 66))[2:])
        far.sendall(session.encrypt(kind, data))

    with far, trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepts)
            with pytest.raises((HandshakeFailed, NotTrusted, Refused)) as caught:
                await dial(near, ME, hello(ME), believe)
    assert str(caught.value).isprintable()
    assert near.fileno() == -1


# The stream afterwards.


@given(st.lists(st.binary(max_size=400), max_size=5))
def test_any_bytes_instead_of_records(pieces: list[bytes]) -> None:
    taking = Records(Session(os.urandom(32), os.urandom(32), b"", b""))
    try:
        for piece in pieces:
            assert taking.feed(piece) == b""
    except RecordBroken:
        assert taking.broken
    assert not taking.ended
    assert len(taking._partial) <= 65_538


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]), st.integers(0, 10_000), st.integers(1, 60)
    ),
    min_size=1,
    max_size=4,
)


@given(st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=6), EDITS, st.integers(1, 500))
def test_any_change_of_a_stream(parts: list[bytes], edits: list[tuple[str, int, int]], piece: int) -> None:
    """What comes out is always a beginning of what was sent, and an end only after all of it."""
    one, two = os.urandom(32), os.urandom(32)
    sender = Session(one, two, b"", b"")
    good = b"".join(sender.seal(part) for part in parts) + sender.encrypt(END, b"")
    wire = good
    for what, place, size in edits:
        at = place % (len(wire) + 1)
        if what == "flip":
            wire = wire[:at] + bytes(byte ^ size for byte in wire[at : at + 1]) + wire[at + 1 :]
        elif what == "cut":
            wire = wire[:at] + wire[at + size :]
        elif what == "insert":
            wire = wire[:at] + os.urandom(size) + wire[at:]
        else:
            wire = wire[: at + size] + wire[at:]
    taking = Records(Session(two, one, b"", b""))
    got = b""
    try:
        for at in range(0, len(wire), piece):
            got += taking.feed(wire[at : at + piece])
    except RecordBroken:
        assert wire != good
    sent = b"".join(parts)
    assert sent.startswith(got)
    if taking.ended and not taking.broken:
        assert (got, wire) == (sent, good)
