"""Nodes of a mesh in one process, on the virtual clock: everything is real but the machines.

The queues, the router, the peers' book-keeping, the relay and the server of peers' connections are the real
ones. An instance, or a peer, is a function of the test that talks HTTP over a socket pair (`Talk`); where
the other node is to be the real thing, `serve_peers` gives the pair to its server. Encryption is left
out: `PlainStream` behaves as `NoiseTransport` does.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import trio
import trio.testing

from llamesh.config.cookbook import Elsewhere, Profile
from llamesh.config.sections import CircuitBreaker
from llamesh.core.lifecycle import State
from llamesh.core.offers import NODE_KEY, OFFER_PREFIX, News, NodeEntry, Offer, Situation, encode
from llamesh.dispatch.lease import AT_HOME, Travel
from llamesh.dispatch.router import Router
from llamesh.mesh.noise_transport import NoiseTransport, Truncated
from llamesh.mesh.peer import Peer
from llamesh.mesh.peers import Peers
from llamesh.net.exchange import Headers, UpstreamBroken, UpstreamConnection
from llamesh.net.transport import SocketTransport
from llamesh.web.answer import Inbound
from llamesh.web.body import Body
from llamesh.web.gateway import Gateway
from llamesh.web.lane import Lane, SlowLane
from llamesh.web.openai import ROUTES
from llamesh.web.peer_connection import PeerConnection
from tests.support.scripted import Play, Scripted, World, world

CHAT = b"/v1/chat/completions"


class PlainStream(SocketTransport):
    """A peer's connection without its encryption. An end that wasn't said is an error here, too."""

    def __init__(self, sock: socket.socket, node: str) -> None:
        super().__init__(sock)
        self.opened_at = trio.current_time()
        self.remote = SimpleNamespace(node_id=node)

    async def receive(self) -> bytes:
        if self.closed:
            raise trio.ClosedResourceError
        data = await super().receive()
        if not data:
            raise Truncated("the connection was cut")
        return data

    def send_now(self, data: bytes) -> bool:
        try:
            return self.sock.send(data) == len(data)
        except OSError:
            return False


def noise(stream: PlainStream) -> NoiseTransport:
    """For those who want to see that type."""
    return cast(NoiseTransport, stream)


@dataclass
class Talk:
    """The server's end of a connection, steered by the test. `head` and `body` are of the present request."""

    transport: SocketTransport
    head: bytes = b""
    body: bytes = b""
    unread: bytes = b""

    async def request(self) -> None:
        """Read the next request. Raises OSError when the client closes instead."""
        while b"\r\n\r\n" not in self.unread:
            await self._fill()
        head, _, self.unread = self.unread.partition(b"\r\n\r\n")
        self.head = head
        length = int(self.headers.get("content-length", "0"))
        while len(self.unread) < length:
            await self._fill()
        self.body, self.unread = self.unread[:length], self.unread[length:]

    async def _fill(self) -> None:
        data = await self.transport.receive()
        if not data:
            raise ConnectionError("the client closed")
        self.unread += data

    @property
    def headers(self) -> dict[str, str]:
        """Of the request, names in lower case."""
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}

    async def send(self, data: bytes) -> None:
        await self.transport.send(data)

    async def answer(self, status: int = 200, body: bytes = b"{}", *headers: str) -> None:
        """A whole answer with a length."""
        lines = [f"HTTP/1.1 {status} X", f"content-length: {len(body)}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode("latin-1") + body)

    async def refuse(self, kind: str, *headers: str, message: str = "no", status: int = 503) -> None:
        """What a node says that doesn't do it."""
        body = msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": kind}})
        await self.answer(status, body, f"x-llamesh-error: {kind}", *headers)

    async def begin(self) -> None:
        """The head of a stream."""
        await self.send(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def progress(self, what: str) -> None:
        """What a peer says each second while it waits."""
        await self.send(f"HTTP/1.1 102 Processing\r\nx-llamesh-waiting-for: {what}\r\n\r\n".encode())

    async def gone(self) -> None:
        """Wait until the client has closed."""
        try:
            while await self.transport.receive():
                pass
        except OSError:
            pass

    def close(self) -> None:
        self.transport.close()


Part = Callable[[Talk], Awaitable[None]]


async def answers(talk: Talk) -> None:
    """Answers whatever comes, by name."""
    while True:
        await talk.request()
        await talk.answer(200, b'{"ok":true}')


async def is_silent(talk: Talk) -> None:
    """Takes the request, and nothing more."""
    await talk.request()
    await talk.gone()


async def cut_at_once(talk: Talk) -> None:
    """Takes the request, and breaks."""
    await talk.request()


def say(*headers: str, status: int = 200, body: bytes = b'{"ok":true}') -> Part:
    """Answers whatever comes, like this."""

    async def part(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.answer(status, body, *headers)

    return part


def refuse(kind: str, *headers: str, **more: Any) -> Part:
    """Says no to whatever comes."""

    async def part(talk: Talk) -> None:
        while True:
            await talk.request()
            await talk.refuse(kind, *headers, **more)

    return part


async def play(part: Part, sock: socket.socket) -> None:
    """Act a part on one connection, and close it."""
    talk = Talk(SocketTransport(sock))
    try:
        await part(talk)
    except (OSError, trio.ClosedResourceError):
        pass
    finally:
        talk.close()


class Talking(Scripted):
    """An instance whose connections are played. `part` by the key of its profile."""

    parts: dict[str, Part]

    async def connect(self) -> UpstreamConnection:
        await trio.lowlevel.checkpoint()
        if self.crash.is_set() or self.state is State.GONE:
            raise UpstreamBroken(f"{self.id} has crashed", started=False)
        ours, theirs = socket.socketpair()
        self._nursery.start_soon(play, self.parts.get(self.profile.key, answers), theirs)
        return UpstreamConnection(SocketTransport(ours))


class Answer:
    """What a client gets; a `Sink`. `breaks`: writing fails from then on."""

    def __init__(self) -> None:
        self.started = False
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""
        self.finished = self.aborted = self.breaks = False
        self.news = trio.Event()

    def __repr__(self) -> str:
        return f"<Answer {self.status} {self.body[:300]!r} finished={self.finished} aborted={self.aborted}>"

    def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        assert not self.started
        self.started, self.status = True, status
        self.headers = {name.decode(): value.decode("latin-1") for name, value in headers}

    async def write(self, data: bytes) -> None:
        assert data
        self._take(data)

    async def flush(self) -> None:
        self._take(b"")

    async def finish(self, data: bytes = b"") -> None:
        self._take(data)
        assert not self.aborted
        assert not self.finished
        self.finished = True

    def abort(self) -> None:
        assert not self.finished
        self.aborted = True

    def _take(self, data: bytes) -> None:
        assert self.started
        if self.breaks:
            raise BrokenPipeError("the client is gone")
        self.body += data
        self.news.set()
        self.news = trio.Event()

    @property
    def error(self) -> dict[str, Any]:
        document = msgspec.json.decode(self.body)
        assert isinstance(document, dict)
        found: dict[str, Any] = document["error"]
        return found

    async def until(self, mark: bytes) -> None:
        """Wait until the body holds it."""
        while mark not in self.body:
            await self.news.wait()


@dataclass
class Far:
    """A peer as the test plays it; `part` acts on each connection. `unreachable`: nobody answers a dial."""

    node: str
    part: Part = answers
    unreachable: bool = False
    dials: int = 0
    open: int = 0
    dial_seconds: float = 0.0


@dataclass
class Neighbourhood:
    """One node of the process with its peers."""

    here: World
    peers: Peers
    router: Router
    gateway: Gateway
    lane: Lane
    nursery: trio.Nursery
    far: dict[str, Far] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)

    @property
    def node(self) -> str:
        return self.here.current.settings.node_id

    def peer(
        self,
        node: str,
        *keys: str,
        part: Part = answers,
        slots: int = 1,
        others: int = 0,
        situation: Situation | None = None,
        closed: str = "",
        cut: tuple[str, ...] = (),
        **offer: Any,
    ) -> Peer:
        """A living peer that has these profiles ("model:profile"), and was heard of just now."""
        self.far[node] = Far(node, part)
        offered = {}
        for key in keys:
            model, _, profile = key.partition(":")
            one = Offer(model=model, profile=profile, **{"n_slots": slots, "service_ms": 1000.0, **offer})
            offered[OFFER_PREFIX + key] = encode(one)
        self.peers.update(node, {NODE_KEY: encode(NodeEntry(cut=cut)), **offered})
        self.peers.set_alive(node, alive=True)
        peer = self.peers.of(node)
        now = situation or Situation(slots=slots, others=others)
        peer.note_news(News(node_id=node, closed=closed, profiles=dict.fromkeys(keys, now)))
        peer.note_rtt(0.0005)
        return peer

    async def dial(self, peer: Peer) -> NoiseTransport:
        far = self.far[peer.node]
        far.dials += 1
        await trio.sleep(far.dial_seconds)
        if far.unreachable:
            raise ConnectionRefusedError(f"{peer.node} refuses connections")
        ours, theirs = socket.socketpair()
        self.nursery.start_soon(self._play, far, theirs)
        return noise(PlainStream(ours, peer.node))

    async def _play(self, far: Far, sock: socket.socket) -> None:
        far.open += 1
        try:
            if isinstance(far.part, ServePeers):
                await far.part.serve(sock)
            else:
                await play(far.part, sock)
        finally:
            far.open -= 1

    async def ask(
        self,
        document: Any,
        sink: Answer | None = None,
        path: bytes = CHAT,
        headers: Headers | None = None,
        travel: Travel = AT_HOME,
    ) -> Answer:
        """One request of a client, to its end."""
        sink = sink or Answer()
        with Body(self.gateway.budget) as body:
            body.add(document if isinstance(document, bytes) else msgspec.json.encode(document))
            given = [(b"content-type", b"application/json"), *(headers or [])]
            inbound = Inbound(path, b"", given, body, "the-id", trio.current_time(), travel)
            await self.gateway.infer(inbound, ROUTES[path], sink)
        return sink

    def assert_nothing_left(self) -> None:
        """No seat, no request of a peer, no connection but those that are kept, no body."""
        for peer in self.peers:
            assert not peer.in_flight, peer
            assert len(peer.links) == peer.links.idle, peer
        assert not self.router.requests
        assert self.gateway.budget.used == 0
        assert sum(s.current_requests for s in self.here.stats.profiles.values()) == 0


@dataclass
class ServePeers:
    """The server of a node of the process, as the part of a peer. `peer`: who dials."""

    far: Neighbourhood
    peer: str
    open: int = 0

    async def __call__(self, talk: Talk) -> None:
        raise AssertionError("it wants the socket")

    async def serve(self, sock: socket.socket) -> None:
        async def nothing(*_: object) -> None:
            return None

        self.open += 1
        stream = PlainStream(sock, self.peer)
        try:
            await PeerConnection(
                noise(stream), self.far.lane, self.peer, cast(Any, nothing), idle_seconds=3600.0
            ).run()
        finally:
            self.open -= 1


def chat(model: str, *, stream: bool = False, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [], "stream": stream, **more}


def elsewhere(name: str = "m", **more: Any) -> Profile:
    """A profile that only peers have."""
    return Profile(name, "default", "", "", Elsewhere(), max_instances=0, **more)


@asynccontextmanager
async def neighbourhood(
    plays: dict[str, list[Play]] | None = None,
    cookbook: Iterable[Profile] = (),
    *,
    node: str = "node-a",
    breaker: CircuitBreaker | None = None,
    **settings: Any,
) -> AsyncIterator[Neighbourhood]:
    """A node with a router, whose peers the test makes; at the end nothing is left over."""
    parts: dict[str, Part] = {}
    instance_type = type("Talking", (Talking,), {"parts": parts})
    async with (
        world(plays, cookbook=cookbook, node_id=node, instance_type=instance_type, **settings) as here,
        trio.open_nursery() as nursery,
    ):
        made: list[Neighbourhood] = []

        def make(name: str) -> Peer:
            return Peer(name, made[0].dial, breaker or CircuitBreaker(), 3600)

        async def wake(peer: Peer) -> None:
            while not peer.alive:
                await trio.sleep(0.5)

        peers = Peers(make, wake)
        router = Router(here.current, here.pool, here.learned, peers)
        router.queue_length = here.dispatch.queue_length
        router.fingerprint = lambda profile: f"print of {profile.key}"
        here.dispatch.router = router
        peers.on_change = here.dispatch.settle
        gateway = Gateway(here.current, here.dispatch, here.stats)
        lane = Lane(gateway, lambda path, headers: None, cast(SlowLane, None))
        found = Neighbourhood(here, peers, router, gateway, lane, nursery, parts=parts)
        made.append(found)
        nursery.start_soon(lane.sweep.run)
        nursery.start_soon(lane.hangups.run)
        try:
            yield found
            await trio.testing.wait_all_tasks_blocked()
            found.assert_nothing_left()
        finally:
            for peer in peers:
                peer.links.close_all()
            nursery.cancel_scope.cancel()
    lane.hangups.close()
