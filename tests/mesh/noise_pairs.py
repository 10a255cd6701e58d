"""What the tests of the encrypted stream share: identities without files, and pairs of connected sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from llamesh.mesh.noise import public_key
from llamesh.mesh.stream import Hello, NoiseTransport, Welcome, accept, dial
from llamesh.mesh.trust import Claim

TOKEN = b"t" * 32
OTHER_TOKEN = b"u" * 32


@dataclass
class Me:
    """An identity; as `identity.Identity`, without its files."""

    node_id: str = "node"
    token: bytes = TOKEN
    previous_token: bytes | None = None
    private: bytes = field(default_factory=lambda: os.urandom(32))
    previous_private: bytes | None = None

    @property
    def public(self) -> bytes:
        return public_key(self.private)


def hello(me: Me, purpose: str = "send") -> Hello:
    return Hello(me.node_id, purpose, "1.2.3", 7, 8080, ("10.0.0.1:8080", "[::1]:8080"))


def welcome(me: Me) -> Callable[[Hello, str], Welcome]:
    def answer(_hello: Hello, address: str) -> Welcome:
        return Welcome(me.node_id, "1.2.3", 9, address, 8081, ("10.0.0.2:8081",))

    return answer


def believe(_claim: Claim) -> None:
    """A check that takes everybody for who they say they are."""


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a loopback connection: who connected, who accepted."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    return one, two


@dataclass
class Outcome:
    """How both sides of an opening ended: a transport or an error each."""

    dialled: NoiseTransport | BaseException | None = None
    accepted: NoiseTransport | BaseException | None = None

    @property
    def transports(self) -> tuple[NoiseTransport, NoiseTransport]:
        assert isinstance(self.dialled, NoiseTransport), self.dialled
        assert isinstance(self.accepted, NoiseTransport), self.accepted
        return self.dialled, self.accepted

    @property
    def errors(self) -> tuple[Exception, Exception]:
        assert isinstance(self.dialled, Exception), self.dialled
        assert isinstance(self.accepted, Exception), self.accepted
        return self.dialled, self.accepted

    def close(self) -> None:
        for side in (self.dialled, self.accepted):
            if isinstance(side, NoiseTransport):
                side.close()


async def open_both(
    dialler: Me,
    acceptor: Me,
    sockets: tuple[socket.socket, socket.socket] | None = None,
    *,
    dialler_checks: Callable[[Claim], None] = believe,
    acceptor_checks: Callable[[Claim], None] = believe,
    greeting: Hello | None = None,
    answer: Callable[[Hello, str], Welcome] | None = None,
) -> Outcome:
    """Both sides of an opening at once, each to its end."""
    one, two = sockets or tcp_pair()
    outcome = Outcome()

    async def dials() -> None:
        try:
            outcome.dialled = await dial(one, dialler, greeting or hello(dialler), dialler_checks)
        except Exception as error:
            outcome.dialled = error

    async def accepts() -> None:
        try:
            outcome.accepted = await accept(two, b"", acceptor, answer or welcome(acceptor), acceptor_checks)
        except Exception as error:
            outcome.accepted = error

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(dials)
            nursery.start_soon(accepts)
    return outcome


async def open_pair(
    sockets: tuple[socket.socket, socket.socket] | None = None,
) -> tuple[NoiseTransport, NoiseTransport]:
    """An established connection: the dialler's transport and the acceptor's."""
    return (await open_both(Me("one"), Me("two"), sockets)).transports
