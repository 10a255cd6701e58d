"""Opening an encrypted connection: who is believed, who is refused, and what each side gets to hear."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable

import pytest
import trio
import trio.testing

from llamesh.mesh.hello import Refused
from llamesh.mesh.noise import (
    MESSAGE_1,
    MESSAGE_2,
    MESSAGE_3,
    PREAMBLE,
    HandshakeFailed,
    Initiator,
    Responder,
    public_key,
)
from llamesh.mesh.records import HELLO, REFUSED, WELCOME, Session
from llamesh.mesh.stream import (
    Hello,
    NoiseTransport,
    Welcome,
    accept,
    dial,
    dial_any_token,
)
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted
from tests.mesh.noise_pairs import OTHER_TOKEN, TOKEN, Me, believe, hello, open_both, tcp_pair, welcome


def refuse(_claim: Claim) -> None:
    raise NotTrusted("node one has another key here: see known_peers")


def never(_claim: Claim) -> None:
    raise AssertionError("nobody was proven to be anybody")


# Who gets through.


@pytest.mark.parametrize("make", [tcp_pair, socket.socketpair])
async def test_two_nodes_with_one_token(make: Callable[[], tuple[socket.socket, socket.socket]]) -> None:
    one, two = Me("one"), Me("two")
    claims: list[Claim] = []
    outcome = await open_both(one, two, make(), dialler_checks=claims.append, acceptor_checks=claims.append)
    dialled, accepted = outcome.transports
    assert (dialled.remote_key, accepted.remote_key) == (two.public, one.public)
    assert accepted.remote == hello(one)
    assert dialled.remote == welcome(two)(hello(one), accepted.address)
    # The acceptor is asked first.
    assert claims == [
        Claim("one", one.public, None, accepted.address),
        Claim("two", two.public, None, dialled.address),
    ]
    if make is tcp_pair:
        assert accepted.address == f"127.0.0.1:{dialled.sock.getsockname()[1]}"
    assert dialled.opened_at <= trio.current_time()
    assert not dialled.closed
    await dialled.send(b"GET / HTTP/1.1\r\n\r\n")
    assert await accepted.receive() == b"GET / HTTP/1.1\r\n\r\n"
    await accepted.send(b"x" * 100)
    assert await dialled.receive() == b"x" * 100
    await accepted.send_end()
    assert await dialled.receive() == b""
    outcome.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
async def test_addresses_are_written_as_people_write_them(host: str) -> None:
    """On a socket for both families an IPv4 dialler looks like IPv6; it isn't told so."""
    family = socket.AF_INET if host == "127.0.0.1" else socket.AF_INET6
    try:
        listener = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
    except OSError:
        assert family == socket.AF_INET6  # a machine without IPv6
        return
    with listener:
        target = "::1" if host == "::1" else "127.0.0.1"
        one = socket.create_connection((target, listener.getsockname()[1]))
        two, _ = listener.accept()
    outcome = await open_both(Me("one"), Me("two"), (one, two))
    dialled, accepted = outcome.transports
    port = dialled.sock.getsockname()[1]
    assert accepted.address == (f"[::1]:{port}" if target == "::1" else f"127.0.0.1:{port}")
    assert isinstance(dialled.remote, Welcome)
    assert dialled.remote.seen_from == accepted.address
    outcome.close()


@pytest.mark.parametrize("size", [1, len(PREAMBLE), len(PREAMBLE) + 2, len(PREAMBLE) + 2 + MESSAGE_1])
async def test_bytes_that_the_listener_has_read_already(size: int) -> None:
    one, two = tcp_pair()
    accepted: list[NoiseTransport] = []
    me = Me("two")

    async def accepts() -> None:
        await trio.lowlevel.wait_readable(two)
        accepted.append(await accept(two, two.recv(size), me, welcome(me), believe))

    two.setblocking(False)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepts)
            dialled = await dial(one, Me("one"), hello(Me("one")), believe)
    dialled.close()
    accepted[0].close()


@pytest.mark.parametrize("dialler", [Me("one", OTHER_TOKEN, previous_token=TOKEN), Me("one", OTHER_TOKEN)])
async def test_an_acceptor_still_takes_its_previous_token(dialler: Me) -> None:
    outcome = await open_both(dialler, Me("two", TOKEN, previous_token=OTHER_TOKEN))
    outcome.transports[0].close()
    outcome.transports[1].close()


async def test_a_dialler_tries_its_previous_token_on_a_fresh_connection() -> None:
    one, two = Me("one", OTHER_TOKEN, previous_token=TOKEN), Me("two", TOKEN)
    accepted: list[NoiseTransport | HandshakeFailed] = []

    async def accepts(sock: socket.socket) -> None:
        try:
            accepted.append(await accept(sock, b"", two, welcome(two), believe))
        except HandshakeFailed as error:
            accepted.append(error)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            async def connect() -> socket.socket:
                near, far = tcp_pair()
                nursery.start_soon(accepts, far)
                return near

            dialled = await dial_any_token(connect, one, hello(one), believe)
            with pytest.raises(HandshakeFailed) as caught:
                await dial_any_token(connect, Me("three", OTHER_TOKEN), hello(one), believe)
    assert caught.value.reason == "token"
    first, second, third = accepted
    assert isinstance(first, HandshakeFailed)
    assert isinstance(third, HandshakeFailed)
    assert isinstance(second, NoiseTransport)
    dialled.close()
    second.close()


# A changed key.


@pytest.mark.parametrize("who", ["dialler", "acceptor"])
async def test_a_changed_key_comes_with_a_proof_of_the_previous_one(who: str) -> None:
    previous = b"\x07" * 32
    one, two = Me("one"), Me("two")
    (one if who == "dialler" else two).previous_private = previous
    heard: dict[str, Claim] = {}
    outcome = await open_both(
        one,
        two,
        dialler_checks=lambda claim: heard.__setitem__("acceptor", claim),
        acceptor_checks=lambda claim: heard.__setitem__("dialler", claim),
    )
    assert heard[who].previous_key == public_key(previous)
    assert heard["acceptor" if who == "dialler" else "dialler"].previous_key is None
    outcome.close()


async def raw_acceptor(sock: socket.socket, me: Me, answer: Callable[[Session], bytes]) -> bytes:
    """An acceptor that follows the protocol up to its answer, and answers what it likes."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    wire = b""

    async def take(size: int) -> bytes:
        nonlocal wire
        while len(wire) < size:
            wire += await stream.receive_some()
        data, wire = wire[:size], wire[size:]
        return data

    responder = Responder(me.private, [me.token])
    await take(len(PREAMBLE) + 2)
    await stream.send_all(responder.first(await take(MESSAGE_1)))
    await take(2)
    session = responder.last(await take(MESSAGE_3))
    header = await take(3)
    hello_json = session.decrypt(header, await take(int.from_bytes(header[1:], "big")))
    await stream.send_all(answer(session))
    with trio.move_on_after(10):
        while data := await stream.receive_some():
            wire += data
    await stream.aclose()
    return hello_json + b"|" + wire


async def raw_dialler(sock: socket.socket, me: Me, greet: Callable[[Session], bytes]) -> tuple[int, bytes]:
    """A dialler that follows the protocol up to its HELLO, and says there what it likes."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    initiator = Initiator(me.private, me.token)
    await stream.send_all(initiator.start())
    wire = b""
    while len(wire) < 2 + MESSAGE_2:
        wire += await stream.receive_some()
    message_3 = initiator.reply(wire[2:])
    session = initiator.session
    assert session is not None
    await stream.send_all(message_3 + greet(session))
    wire = b""
    while data := await stream.receive_some():
        wire += data
    await stream.aclose()
    return wire[0], session.decrypt(wire[:3], wire[3:])


GREETING: dict[str, object] = {"node_id": "one", "purpose": "send", "version": "1", "epoch": 1}
PREVIOUS = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="  # base64 of 32 bytes 7
ZEROES = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="


async def met_with(greeting: bytes, checks: Callable[[Claim], None] = never) -> tuple[str, Exception]:
    """What an acceptor tells a dialler that greets with this, and what it raises itself."""
    near, far = tcp_pair()
    two = Me("two")
    told: list[tuple[int, bytes]] = []

    async def dials() -> None:
        told.append(await raw_dialler(near, Me("one"), lambda session: session.encrypt(HELLO, greeting)))

    raised: Exception | None = None
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dials)
            try:
                await accept(far, b"", two, welcome(two), checks)
            except (HandshakeFailed, NotTrusted) as error:
                raised = error
    [(kind, data)] = told
    assert kind == REFUSED
    assert far.fileno() == -1
    assert raised is not None
    return json.loads(data)["message"], raised


@pytest.mark.parametrize("previous", [PREVIOUS, ZEROES])
async def test_a_wrong_proof_of_a_previous_key_is_refused(previous: str) -> None:
    message, error = await met_with(
        json.dumps({**GREETING, "previous_key": previous, "proof": PREVIOUS}).encode()
    )
    assert "doesn't prove" in message
    assert isinstance(error, NotTrusted)


async def test_a_wrong_proof_of_the_acceptor_is_refused() -> None:
    near, far = tcp_pair()
    heard: list[bytes] = []
    reply = {
        "node_id": "two",
        "version": "1",
        "epoch": 1,
        "seen_from": "a:1",
        "previous_key": PREVIOUS,
        "proof": ZEROES,
    }

    async def accepts() -> None:
        answer = json.dumps(reply).encode()
        heard.append(await raw_acceptor(far, Me("two"), lambda session: session.encrypt(WELCOME, answer)))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepts)
            with pytest.raises(NotTrusted, match="doesn't prove"):
                await dial(near, Me("one"), hello(Me("one")), never)
    assert near.fileno() == -1
    [wire] = heard
    assert wire.startswith(b'{"node_id":"one"')
    assert wire.partition(b"|")[2][0] == REFUSED


# Who is refused.


@pytest.mark.parametrize(
    ("dialler", "acceptor"), [(OTHER_TOKEN, TOKEN), (TOKEN, OTHER_TOKEN)], ids=["dialler", "acceptor"]
)
async def test_another_token_is_said_on_both_sides(dialler: bytes, acceptor: bytes) -> None:
    outcome = await open_both(
        Me("one", dialler), Me("two", acceptor), dialler_checks=never, acceptor_checks=never
    )
    for error in outcome.errors:
        assert isinstance(error, HandshakeFailed)
        assert error.reason == "token"
        assert "tokens differ" in str(error)
        assert "compare `llamesh token` on both nodes" in str(error)
        assert str(error).startswith("127.0.0.1:")


async def test_an_acceptor_that_does_not_believe() -> None:
    outcome = await open_both(Me("one"), Me("two"), dialler_checks=never, acceptor_checks=refuse)
    refused, refusing = outcome.errors
    assert isinstance(refused, Refused)
    assert str(refused).endswith("refuses this node: node one has another key here: see known_peers")
    assert isinstance(refusing, NotTrusted)


async def test_an_acceptor_that_has_no_welcome() -> None:
    def full(_hello: Hello, _address: str) -> Welcome:
        raise NotTrusted("version 1 and version 2 don't mix here")

    outcome = await open_both(Me("one"), Me("two"), dialler_checks=never, answer=full)
    refused, refusing = outcome.errors
    assert isinstance(refused, Refused)
    assert "don't mix here" in str(refused)
    assert isinstance(refusing, NotTrusted)


async def test_a_dialler_that_does_not_believe_says_so() -> None:
    """The acceptor has an open connection by then, and reads the refusal instead of a request."""
    outcome = await open_both(Me("one"), Me("two"), dialler_checks=refuse)
    assert isinstance(outcome.dialled, NotTrusted)
    assert isinstance(outcome.accepted, NoiseTransport)
    with pytest.raises(Refused, match="has another key here"):
        await outcome.accepted.receive()
    outcome.close()


async def test_dialling_oneself() -> None:
    me = Me("one")

    def mine(claim: Claim) -> None:
        if claim.node_id == me.node_id and claim.key == me.public:
            raise ItsMe("this is me")

    outcome = await open_both(me, me, dialler_checks=never, acceptor_checks=mine)
    assert [type(error) for error in outcome.errors] == [ItsMe, ItsMe]


async def test_only_my_own_key_can_tell_me_that_it_is_me() -> None:
    def mine(_claim: Claim) -> None:
        raise ItsMe("this is me")

    refused, _ = (await open_both(Me("one"), Me("two"), dialler_checks=never, acceptor_checks=mine)).errors
    assert isinstance(refused, Refused)


async def test_nothing_but_the_hello_is_sent_to_an_acceptor_without_the_token() -> None:
    """It gets that far; it can't open the HELLO, nor answer so that the dialler believes it."""
    near, far = tcp_pair()
    opened: list[bytes] = []

    async def accepts() -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(far))
        responder = Responder(Me("two").private, [OTHER_TOKEN])
        wire = await stream.receive_some()
        await stream.send_all(responder.first(wire[len(PREAMBLE) + 2 :]))
        opened.append(await stream.receive_some())
        made_up = Session(b"a" * 32, b"b" * 32, b"", b"")
        await stream.send_all(made_up.encrypt(WELCOME, b"{}"))
        with contextlib.suppress(trio.BrokenResourceError):
            while data := await stream.receive_some():
                opened.append(data)
        await stream.aclose()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accepts)
            with pytest.raises(HandshakeFailed) as caught:
                await dial(near, Me("one"), hello(Me("one")), never)
    assert caught.value.reason == "garbage"
    assert len(opened) == 1
    assert b"one" not in opened[0]
