"""Several `Mesh` objects in one trio run, over real sockets on loopback and without nodes around them.

    async with lives(tmp_path) as world:
        a, b = await world.start("a"), await world.start("b", peers=["a"])
        await world.joined(a, b)
        await b.kill()
        await world.until(lambda: not a.sees("b"), "a misses b")

What a node would do around its mesh is a few lines here: it accepts, answers the mesh's routes and "/echo",
and offers one model by its own name. Each one listens behind a `Tap`, which is the address that others
get, so that what goes to it can be stopped.
"""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import trio

from llamesh.config.settings import Settings
from llamesh.config.values import Address
from llamesh.core.membership import Status
from llamesh.core.offers import News, Offer, encode
from llamesh.errors import LlameshError
from llamesh.mesh.calls import call
from llamesh.mesh.dialler import CantReach
from llamesh.mesh.identity import Identity
from llamesh.mesh.known_peers import KnownPeers
from llamesh.mesh.links import Links
from llamesh.mesh.mesh import Mesh
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.static_peers import Target
from llamesh.telemetry import logs
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS
from tests.support.tap import Tap

TOKEN = b"t" * 32
INTERVAL = 0.1


class Life:
    """One life of a node: `mesh` and what a node would be around it. `served`: requests on "/echo"."""

    def __init__(self, world: World, settings: Settings, identity: Identity, tap: Tap) -> None:
        self.id = settings.node_id
        self.tap = tap
        self.served = 0
        self.offers = {f"p:{self.id}:default": encode(Offer(model=self.id))}
        self.closed = ""  # what it tells about taking requests
        path = world.directory / f"{self.id}.known_peers"
        self.known = KnownPeers(path, (), settings.cluster.noise.tofu)
        self.mesh = Mesh(settings, identity, self.known)
        self.mesh.entries = lambda: self.offers
        self.mesh.news = lambda _asker: News(node_id=self.id, closed=self.closed)
        self.mesh.serve = self.serve
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.listener.setblocking(False)
        tap.target = self.own_address
        self.scope = trio.CancelScope()
        self.over = trio.Event()
        self._settings = settings

    @property
    def own_address(self) -> str:
        """Where it listens, behind its tap."""
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    @property
    def address(self) -> str:
        """Where others dial it."""
        return self.tap.address

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Live until `kill`."""
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    self.mesh.greeting.listens([("127.0.0.1", self.tap.port)])
                    targets = [Target(entry, entry.address) for entry in self._settings.cluster.peers]
                    await nursery.start(self.mesh.run)
                    self.mesh.set_static(targets)
                    nursery.start_soon(self._accept, nursery)
                    task_status.started()
        finally:
            self.listener.close()
            self.over.set()

    async def kill(self) -> None:
        """End without a word."""
        self.scope.cancel()
        await self.over.wait()

    async def leave(self) -> None:
        """End with a goodbye."""
        await self.mesh.leave()
        await self.kill()

    def sees(self, *others: str) -> bool:
        """Whether exactly these are alive in its eyes (with none: whether anybody is)."""
        alive = {
            m.id
            for m in self.mesh.membership.members().values()
            if m.status is Status.ALIVE and m.id != self.id
        }
        return alive == set(others) if others else bool(alive)

    def status(self, other: str) -> str:
        """What it thinks of another one; "" when it knows nothing."""
        member = self.mesh.membership.members().get(other)
        return "" if member is None else member.status.value

    async def ask(self, other: str, path: str = "/echo", body: bytes = b"hello") -> tuple[int, bytes]:
        """A request to another one. Raises UpstreamBroken."""
        return await call(self.mesh.peers.of(other).links, "POST", path, body, seconds=PATIENCE_SECONDS)

    async def _accept(self, nursery: trio.Nursery) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.listener)
                continue
            nursery.start_soon(self._let_in, sock)

    async def _let_in(self, sock: socket.socket) -> None:
        try:
            stream = await self.mesh.accept(sock, b"")
        except BaseException:
            sock.close()
            raise
        if stream is not None:
            await self.serve(stream, lambda: None)

    async def serve(self, stream: NoiseTransport, on_request: Callable[[], None]) -> None:
        """Answer requests on a connection to its end, as a node does."""
        unread = b""
        try:
            while True:
                while b"\r\n\r\n" not in unread:
                    data = await stream.receive()
                    if not data:
                        return
                    on_request()
                    unread += data
                head, _, unread = unread.partition(b"\r\n\r\n")
                method, path, _ = head.split(b"\r\n")[0].split(b" ")
                length = int(head.rpartition(b"content-length: ")[2])
                while len(unread) < length:
                    unread += await stream.receive()
                body, unread = unread[:length], unread[length:]
                status, answer = await self._answer(stream.remote.node_id, method, path, body)
                answer_head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(answer)}\r\n\r\n"
                await stream.send(answer_head.encode() + answer)
        except (OSError, trio.ClosedResourceError):
            pass
        finally:
            stream.close()

    async def _answer(self, peer: str, method: bytes, path: bytes, body: bytes) -> tuple[int, bytes]:
        if path == b"/echo":
            self.served += 1
            return 200, body
        try:
            return await self.mesh.answer(peer, method, path, body) or (404, b"{}")
        except LlameshError as error:
            return error.status, error.body()


class World:
    """All lives of one test. `said()` is what they logged."""

    def __init__(self, directory: Path, nursery: trio.Nursery, stream: io.StringIO) -> None:
        self.directory = directory
        self.lives: list[Life] = []
        self.privates: dict[str, bytes] = {}
        self.taps: dict[str, Tap] = {}
        self.may_fail = False
        self._nursery = nursery
        self._stream = stream

    def forgive(self) -> None:
        """The test wanted the defects that were logged."""
        self.may_fail = True

    def address(self, name: str) -> str:
        """Where that node is or will be dialled."""
        if name not in self.taps:
            self.taps[name] = Tap("127.0.0.1:9")
        return self.taps[name].address

    async def start(
        self,
        name: str,
        peers: Sequence[str | Mapping[str, Any]] = (),
        *,
        place: str = "",
        token: bytes = TOKEN,
        private: bytes | None = None,
        interval: float = INTERVAL,
        prepare: Callable[[Life], None] = lambda life: None,
        **cluster: Any,
    ) -> Life:
        """Begin a life. `peers`: names of nodes, addresses, or entries of the configuration. `place`: of its
        tap, where that isn't its name."""
        private = private or self.privates.setdefault(name, secrets.token_bytes(32))
        place = place or name
        self.address(place)
        known = [self.address(peer) if isinstance(peer, str) and ":" not in peer else peer for peer in peers]
        document = {"peers": known, "gossip_interval_seconds": interval, **cluster}
        settings = Settings.model_validate({"node_id": name, "cluster": document})
        life = Life(self, settings, Identity(name, private, token), self.taps[place])
        self.lives.append(life)
        prepare(life)
        await self._nursery.start(life.run)
        return life

    async def joined(self, *group: Life) -> None:
        """Wait until each of these sees exactly the others, and their models."""
        names = {life.id for life in group}
        for life in group:
            others = names - {life.id}
            await self.until(lambda life=life, others=others: life.sees(*others), f"{life.id} sees {others}")  # type: ignore[misc]
            for other in others:
                await self.until(
                    lambda life=life, other=other: life.mesh.peers.has(f"{other}:default"),  # type: ignore[misc]
                    f"{life.id} knows the model of {other}",
                )

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for it; fails when patience runs out."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while not condition():
                await trio.sleep(POLL_SECONDS)
            return
        views = "\n".join(repr(life.mesh.membership) for life in self.lives if not life.over.is_set())
        raise AssertionError(f"never: {what}\n{views}\n{self._stream.getvalue()[-4000:]}")

    async def rounds(self, life: Life, count: int) -> None:
        """Let so many rounds of a node go by."""
        seen = 0
        after = life.mesh.gossip.end_round

        def count_one() -> None:
            nonlocal seen
            seen += 1
            after()

        life.mesh.gossip.end_round = count_one
        await self.until(lambda: seen >= count, f"{count} rounds of {life.id}")
        life.mesh.gossip.end_round = after

    def said(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The lines of all logs with that event and these fields."""
        lines = [json.loads(line) for line in self._stream.getvalue().splitlines()]
        return [
            line
            for line in lines
            if line["event"] == event and all(line.get(key) == value for key, value in fields.items())
        ]


@contextlib.asynccontextmanager
async def lives(directory: Path) -> AsyncIterator[World]:
    """A world; all in it ends with the block, and nothing of it may have logged a defect."""
    stream = io.StringIO()
    log = logs.configure(Settings().logging, level="debug", stream=stream)
    world: World | None = None
    try:
        with trio.fail_after(4 * PATIENCE_SECONDS):
            async with trio.open_nursery() as nursery:
                world = World(directory, nursery, stream)
                yield world
                nursery.cancel_scope.cancel()
    finally:
        for tap in world.taps.values() if world is not None else ():
            await trio.to_thread.run_sync(tap.close)
        log.close()
    assert world.may_fail or not world.said("defect"), world.said("defect")


@contextlib.contextmanager
def cut_between(one: Life, other: Life) -> Iterator[None]:
    """While in the block, neither of the two reaches the other; everybody else does."""
    with contextlib.ExitStack() as stack:
        for life, far in ((one, other), (other, one)):
            ways = life.mesh.peers.of(far.id).links
            dialler, places = life.mesh.dialler, {far.address, far.own_address}

            async def dial(
                addresses: Iterable[Address],
                purpose: str = "send",
                *,
                node: str | None = None,
                dial: Any = dialler.dial,
                places: set[str] = places,
                name: str = far.id,
            ) -> NoiseTransport:
                left = [address for address in addresses if str(address) not in places]
                if node == name or not left:
                    raise CantReach("the cable is cut")
                found: NoiseTransport = await dial(left, purpose, node=node)
                return found

            def cut(
                links: Links = ways,
                after: Callable[[], None] = life.mesh.gossip.end_round,
            ) -> None:
                links.close_all()  # one may have been under way
                after()

            stack.callback(setattr, dialler, "dial", dialler.dial)
            stack.callback(setattr, life.mesh.gossip, "end_round", life.mesh.gossip.end_round)
            dialler.dial = dial  # type: ignore[method-assign]
            life.mesh.gossip.end_round = cut
            cut()
        yield
