"""Dialling: several addresses at once, whoever answers there, and what is left behind."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.config.values import Address
from llamesh.mesh import dialler as module
from llamesh.mesh.dialler import CantReach, Dialler
from llamesh.mesh.stream import HandshakeFailed, Hello, NoiseTransport, Welcome, accept
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted
from tests.mesh.noise_pairs import OTHER_TOKEN, Me, believe, hello, welcome

Behaviour = Callable[[socket.socket], Awaitable[None]]


class Port:
    """A listening socket on loopback, and what happens to whoever comes."""

    def __init__(self, stack: ExitStack) -> None:
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.listener.setblocking(False)
        self.address = Address("127.0.0.1", self.listener.getsockname()[1])
        self.came = 0

    async def serve(self, behave: Behaviour) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    sock, _ = self.listener.accept()
                except BlockingIOError:
                    await trio.lowlevel.wait_readable(self.listener)
                    continue
                self.came += 1
                nursery.start_soon(self._one, sock, behave)

    async def _one(self, sock: socket.socket, behave: Behaviour) -> None:
        with sock:
            sock.setblocking(False)
            await behave(sock)

    async def node(self, me: Me, check: Callable[[Claim], None] = believe, **said: Any) -> None:
        """Be that node."""

        def answer(greeting: Hello, address: str) -> Welcome:
            return Welcome(**{**_fields(welcome(me)(greeting, address)), **said})

        async def behave(sock: socket.socket) -> None:
            try:
                stream = await accept(sock.dup(), b"", me, answer, check)
            except (NotTrusted, HandshakeFailed, OSError):
                return
            try:
                await stream.receive()
            except OSError:
                return
            finally:
                stream.close()

        await self.serve(behave)


def _fields(answer: Welcome) -> dict[str, Any]:
    return {name: getattr(answer, name) for name in Welcome.__slots__}


async def silent(sock: socket.socket) -> None:
    await trio.sleep_forever()


async def http(sock: socket.socket) -> None:
    """A web server: it takes what comes for a bad request."""
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock.dup()))
    async with stream:
        heard = await stream.receive_some()
        assert heard[:1] == b"\0"
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")


def dialler(
    me: Me | None = None,
    check: Callable[[Claim], None] = believe,
    accept_version: Callable[[Welcome], None] = lambda welcome: None,
) -> Dialler:
    me = me or Me("me")
    return Dialler(me, lambda purpose: hello(me, purpose), check, accept_version)  # type: ignore[arg-type]


@pytest.fixture
def stack() -> Any:
    with ExitStack() as opened:
        yield opened


async def test_the_first_that_answers_is_taken(stack: ExitStack, nursery: trio.Nursery) -> None:
    dead, mute, good = Port(stack), Port(stack), Port(stack)
    dead.listener.close()
    nursery.start_soon(mute.serve, silent)
    nursery.start_soon(good.node, Me("other"))
    calls = dialler()
    stream = await calls.dial([dead.address, mute.address, good.address], node="other")
    assert stream.remote.node_id == "other"
    assert stream.address == str(good.address)
    assert (calls.handshakes, calls.failures) == (1, 0)
    stream.close()


async def test_each_address_says_why_not(stack: ExitStack, nursery: trio.Nursery) -> None:
    dead, web, other, stranger = Port(stack), Port(stack), Port(stack), Port(stack)
    dead.listener.close()
    nursery.start_soon(web.serve, http)
    nursery.start_soon(other.node, Me("third"))
    nursery.start_soon(stranger.node, Me("other", token=OTHER_TOKEN))
    calls = dialler()
    addresses = [dead.address, web.address, other.address, stranger.address]
    with pytest.raises(CantReach) as refused:
        await calls.dial(addresses, node="other")
    text = str(refused.value)
    assert all(str(address) in text for address in addresses)
    assert "doesn't speak as a llamesh node does" in text
    assert f"{other.address} is node third now, not other" in text
    assert "cluster tokens differ" in text
    assert (calls.handshakes, calls.failures) == (0, 1)
    # Who never stood isn't a handshake.
    assert dict(calls.outcomes) == {"garbage": 1, "untrusted": 1, "token": 1}


async def test_no_address_is_said() -> None:
    with pytest.raises(CantReach, match="no address of it is known"):
        await dialler().dial([])


async def test_an_address_of_this_node_is_told(stack: ExitStack, nursery: trio.Nursery) -> None:
    me = Me("me")

    def check(claim: Claim) -> None:
        if claim.key == me.public:
            raise ItsMe(f"the node at {claim.address} is me itself")

    here = Port(stack)
    nursery.start_soon(here.node, me, check)
    with pytest.raises(CantReach) as refused:
        await dialler(me, check).dial([here.address])
    assert refused.value.its_me == (here.address,)


@pytest.mark.parametrize("behave", [silent, http])
async def test_who_answers_nothing_right_is_given_up(
    stack: ExitStack, nursery: trio.Nursery, behave: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamesh.mesh.stream.HANDSHAKE_SECONDS", 0.2)
    port = Port(stack)
    nursery.start_soon(port.serve, behave)
    with pytest.raises(CantReach):
        await dialler().dial([port.address])
    assert port.came == 1


async def test_what_the_version_says_counts(stack: ExitStack, nursery: trio.Nursery) -> None:
    port = Port(stack)
    nursery.start_soon(port.node, Me("other"))

    def refuse(greeting: Welcome) -> None:
        raise NotTrusted(f"{greeting.node_id} is too old")

    with pytest.raises(CantReach, match="other is too old"):
        await dialler(accept_version=refuse).dial([port.address])


@pytest.mark.parametrize("steps", range(12))
async def test_wherever_it_is_cancelled_nothing_is_left_open(
    stack: ExitStack, nursery: trio.Nursery, steps: int
) -> None:
    ports = [Port(stack) for _ in range(3)]
    for port in ports:
        nursery.start_soon(port.node, Me("other"))
    opened: list[NoiseTransport] = []
    with trio.CancelScope() as scope:

        async def stop() -> None:
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        nursery.start_soon(stop)
        opened.append(await dialler().dial([port.address for port in ports]))
    for stream in opened:
        stream.close()
    # A ResourceWarning of a socket that was left is an error in these tests.
    import gc

    gc.collect()


async def test_a_name_is_looked_up_in_a_thread_and_never_leads_to_this_machine(
    stack: ExitStack, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = Port(stack)
    nursery.start_soon(port.node, Me("other"))
    asked: list[tuple[str, bool]] = []
    answers = {"localhost": "127.0.0.1", "node.example": "127.0.0.1"}

    def getaddrinfo(host: str, number: int, *_: Any, **__: Any) -> list[Any]:
        try:
            trio.lowlevel.current_task()
        except RuntimeError:
            asked.append((host, True))
        else:
            asked.append((host, False))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[host], number))]

    monkeypatch.setattr(module.socket, "getaddrinfo", getaddrinfo)
    stream = await dialler().dial([Address("localhost", port.address.port)])
    stream.close()
    with pytest.raises(CantReach, match=r"node\.example"):
        await dialler().dial([Address("node.example", port.address.port)])
    assert asked == [("localhost", True), ("node.example", True)]
    assert port.came == 1


async def test_a_look_up_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import threading

    over = threading.Event()
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: over.wait(20))
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.1)
    try:
        with pytest.raises(CantReach, match=r"no connection within 0\.1 s"):
            await dialler().dial([Address("node.example", 1)])
    finally:
        over.set()
