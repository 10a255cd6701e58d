"""Dialling the addresses of an invitation: who answers, and what people are told when nobody does."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio

from llamesh.commands.shared import dialling
from llamesh.commands.shared.dialling import Outcome, explain, reach
from llamesh.config.settings import Address
from llamesh.mesh import stream
from llamesh.mesh.hello import Hello, Welcome
from llamesh.mesh.identity import Identity
from llamesh.mesh.noise import HandshakeFailed
from llamesh.mesh.stream import accept
from llamesh.mesh.trust import Claim, NotTrusted

TOKEN = b"t" * 32
ME = Identity("me", os.urandom(32), TOKEN)
OTHER = Identity("other", os.urandom(32), TOKEN)
HERE = Address("127.0.0.1", 8080)

Serve = Callable[[socket.socket], Awaitable[None]]


def believe(_: Claim) -> None:
    pass


def welcome(identity: Identity) -> Callable[[Hello, str], Welcome]:
    return lambda hello, address: Welcome(identity.node_id, "1.2.3", 1, address)


def node(identity: Identity, check: Callable[[Claim], None] = believe) -> Serve:
    """The mesh's side of an opening, as a node does it; then it waits until the other side hangs up."""

    async def serve(sock: socket.socket) -> None:
        with contextlib.suppress(HandshakeFailed, NotTrusted, OSError):
            transport = await accept(sock, b"", identity, welcome(identity), check)
            with contextlib.closing(transport):
                assert await transport.receive() == b""

    return serve


def saying(answer: bytes) -> Serve:
    """A program of another kind: reads something and answers."""

    async def serve(sock: socket.socket) -> None:
        await trio.lowlevel.wait_readable(sock)
        sock.recv(65_536)
        sock.send(answer)

    return serve


async def silent(sock: socket.socket) -> None:
    await trio.sleep_forever()


@contextlib.asynccontextmanager
async def listening(serve: Serve) -> AsyncIterator[Address]:
    async with trio.open_nursery() as nursery:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)

            async def one(sock: socket.socket) -> None:
                with sock:
                    await serve(sock)

            async def run() -> None:
                while True:
                    await trio.lowlevel.wait_readable(listener)
                    sock, _ = listener.accept()
                    sock.setblocking(False)
                    nursery.start_soon(one, sock)

            nursery.start_soon(run)
            yield Address("127.0.0.1", listener.getsockname()[1])
            nursery.cancel_scope.cancel()


async def outcome_of(
    serve: Serve, identity: Identity = ME, check: Callable[[Claim], None] = believe
) -> Outcome:
    async with listening(serve) as address:
        [outcome] = await trio.to_thread.run_sync(reach, [address], identity, check)
    assert outcome.address == address
    return outcome


async def test_a_node_that_answers() -> None:
    outcome = await outcome_of(node(OTHER))
    assert outcome.words == "reached other, which runs llamesh 1.2.3"
    assert outcome.claim is not None
    assert (outcome.claim.node_id, outcome.claim.key) == ("other", OTHER.public)


async def test_addresses_are_dialled_at_once_and_told_in_their_order() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # doesn't listen: whoever connects is refused
        nobody = Address("127.0.0.1", taken.getsockname()[1])
        async with listening(node(OTHER)) as somebody:
            found = await trio.to_thread.run_sync(reach, [nobody, somebody], ME, believe)
    assert [outcome.address for outcome in found] == [nobody, somebody]
    assert [outcome.claim is None for outcome in found] == [True, False]
    assert "connection refused" in found[0].words
    assert f"port {nobody.port}" in found[0].words


async def test_another_token() -> None:
    stranger = Identity("other", OTHER.private, b"u" * 32)
    outcome = await outcome_of(node(stranger))
    assert outcome.claim is None
    assert "the token is refused" in outcome.words


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9\r\n", b"\x00" * 400]
)
async def test_another_program(answer: bytes) -> None:
    outcome = await outcome_of(saying(answer))
    assert outcome.claim is None
    assert "another program's" in outcome.words
    assert "cluster.enabled: true" in outcome.words


async def test_a_node_outside_the_mesh_hangs_up() -> None:
    outcome = await outcome_of(saying(b""))
    assert outcome.claim is None
    assert "cluster.enabled: true" in outcome.words


async def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "HANDSHAKE_SECONDS", 0.05)
    outcome = await outcome_of(silent)
    assert outcome.claim is None
    assert "no answer" in outcome.words
    assert "firewall" in outcome.words


async def test_a_backlog_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system there answers nothing, as behind a firewall that drops."""
    monkeypatch.setattr(dialling, "STEP_SECONDS", 0.05)
    with socket.socket() as listener, contextlib.ExitStack() as filling:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            one = filling.enter_context(socket.socket())
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(listener.getsockname())
        address = Address("127.0.0.1", listener.getsockname()[1])
        [outcome] = await trio.to_thread.run_sync(reach, [address], ME, believe)
    assert "no answer" in outcome.words


async def test_a_node_that_refuses_says_why() -> None:
    def refuse(_: Claim) -> None:
        raise NotTrusted("add this line to known_peers")

    outcome = await outcome_of(node(OTHER, refuse))
    assert outcome.claim is None
    assert "add this line to known_peers" in outcome.words


async def test_a_node_that_we_dont_believe() -> None:
    def refuse(claim: Claim) -> None:
        raise NotTrusted(f"{claim.node_id} isn't whom we want")

    outcome = await outcome_of(node(OTHER), check=refuse)
    assert (outcome.claim, outcome.words) == (None, "other isn't whom we want")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
            "127.0.0.1 can't be resolved: Name",
        ),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "no way to that address"),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), "no way to that address"),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), "the connection was cut"),
        (HandshakeFailed("version", "another version of the wire"), "another version of the wire"),
    ],
)
def test_words(error: Exception, words: str) -> None:
    assert words in explain(error, HERE)
