"""The mesh as one node sees it: who is there, connections with them, news in both directions.

    handshakes   -> `introduce` to the membership, addresses and connections to `Peer`
    each round   -> own entries into the membership; gossip with some, probe some, act on what that shows
    requests     -> `answer` the mesh's own routes of peers

Decisions are the membership's (`core.membership`); this carries them out. Whatever a peer does wrong ends
one exchange with it, and is said once.
"""

from __future__ import annotations

import random
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial

import trio

from llamesh.config.settings import Settings
from llamesh.config.values import Address
from llamesh.core.membership import (
    BadMessage,
    Joined,
    Membership,
    Options,
    Recovered,
    Restarted,
    Status,
    Updated,
)
from llamesh.core.offers import NODE_KEY, News, decode_news, encode
from llamesh.errors import InvalidRequest
from llamesh.mesh.calls import call
from llamesh.mesh.dialler import Dialler
from llamesh.mesh.greeting import Greeting
from llamesh.mesh.identity import Identity
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.known_peers import KnownPeers
from llamesh.mesh.narration import narrate
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.parking import Parking
from llamesh.mesh.peer import Peer
from llamesh.mesh.peers import Peers
from llamesh.mesh.seeker import Seeker
from llamesh.mesh.trust import NotTrusted
from llamesh.mesh.waking import wake_up
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# So many failed probes in a row end what is in flight to a peer, even when others still reach it.
_CUT_AFTER = 3

# Nodes that this one can't reach and says so; beyond that it is rather this node that is cut off.
_MOST_CUT = 64

_LEAVE_SECONDS = 1.0

# Between two looks at known_peers.
_REREAD_SECONDS = 5.0


class Mesh:
    """See the module. Set before `run`: `entries()`, this node's offers by key; `news(asker)`, how it is now;
    `serve(stream, on_first_request)`, which answers requests on a connection that we dialled.
    """

    def __init__(self, settings: Settings, identity: Identity, known: KnownPeers) -> None:
        cluster = settings.cluster
        self.entries: Callable[[], Mapping[str, bytes]] = dict
        self.news: Callable[[str], News] = lambda asker: News()
        self.serve: Callable[[NoiseTransport, Callable[[], None]], Awaitable[None]]
        self.identity = identity
        self.interval = float(cluster.gossip_interval_seconds)
        self.epoch = time.time_ns() // 1_000_000
        self._cluster = cluster
        self._known = known
        self._patience = max(0.25, self.interval / 2)  # for a probe's answer
        self._limit = trio.CapacityLimiter(cluster.max_concurrent_gossip)
        options = Options(interval=self.interval)
        self.membership = Membership(
            settings.node_id,
            self.epoch,
            options,
            random.Random(secrets.randbits(128)),  # noqa: S311
        )
        self.peers = Peers(self._make_peer, partial(wake_up, interfaces=cluster.discovery.interfaces))
        self.greeting = Greeting(settings, identity, self.epoch)
        self.dialler = Dialler(identity, self.greeting.hello, self._check, self.greeting.check_version)
        self.seeker = Seeker(self.dialler, self._is_alive, self._found)
        self.parking = Parking(self._dial_to_park, lambda stream, taken: self.serve(stream, taken))
        self._nursery: trio.Nursery | None = None
        self._told: set[str] = set()

    # Life.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be part of the mesh, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self.parking.run)
                nursery.start_soon(self.seeker.run)
                nursery.start_soon(self._rounds)
                nursery.start_soon(self._reread_pins)
                task_status.started()
        finally:
            for peer in self.peers:
                peer.links.close_all()

    async def leave(self) -> None:
        """Say aloud that this node goes; bounded."""
        message = self.membership.leave(trio.current_time())
        with trio.move_on_after(_LEAVE_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer in self.peers:
                    if peer.alive and peer.links:
                        nursery.start_soon(self._say, peer, message)

    async def _rounds(self) -> None:
        while True:
            start = trio.current_time()
            try:
                self._round(start)
            except Exception:
                # A defect in one round must not end the mesh.
                log.exception("defect", during="gossip")
            await trio.sleep_until(start + self.interval * random.uniform(0.9, 1.1))  # noqa: S311

    def _round(self, now: float) -> None:
        assert self._nursery is not None  # noqa: S101
        self._publish()
        self.membership.use(p.node for p in self.peers if p.in_flight and p.alive)
        due = self.membership.start_round(now)
        self._act()
        for node, message in due.gossip:
            self._nursery.start_soon(self._gossip, self.peers.of(node), message)
        for node in due.probes:
            self._nursery.start_soon(self._probe, self.peers.of(node))
        for peer in self.peers:
            peer.links.sweep()
            self.parking.want(peer, peer.alive and peer.news.dial_back is False)

    def _publish(self) -> None:
        """Own entries that have changed; the membership sees to it that others hear."""
        cut = sorted(p.node for p in self.peers if p.alive and not (p.direct and p.links.reachable))
        entry = self.greeting.entry(tuple(cut[:_MOST_CUT]))
        wanted = {NODE_KEY: encode(entry), **self.entries()}
        own = self.membership.members()[self.identity.node_id].state
        for key, value in wanted.items():
            if own.get(key) != value:
                self.membership.set(key, value)
        for key in own.keys() - wanted.keys():
            self.membership.set(key, None)

    # Connections.

    async def accept(self, sock: socket.socket, read_before: bytes) -> NoiseTransport | None:
        """Let a peer in. None: it wasn't let in, which is logged, or it parked the connection with us."""
        stream = await self.greeting.accept(sock, read_before, self._check)
        if stream is None:
            return None
        remote, peer = stream.remote, self._met(stream)
        if peer is None:
            return None
        heard = [Address.parse(text) for text in _valid(remote.addresses)]
        host = stream.address.rpartition(":")[0].strip("[]")
        if remote.port:
            heard.append(Address(host, remote.port))
        peer.learn_addresses(heard)
        if getattr(remote, "purpose", "send") == "park":
            peer.links.add(stream, parked=True)
            return None
        if peer.links.can_dial is None and self._nursery is not None:
            self._nursery.start_soon(self._dial_back, peer)
        return stream

    def sighted(self, node: str, addresses: Iterable[Address]) -> None:
        """It was seen on the local network."""
        if node != self.identity.node_id:
            self.seeker.seek(node, addresses)

    def _found(self, stream: NoiseTransport, addresses: tuple[Address, ...]) -> None:
        peer = self._met(stream)
        if peer is None:
            return
        peer.learn_addresses(addresses, first=True)
        peer.learn_addresses(Address.parse(text) for text in _valid(stream.remote.addresses))
        peer.links.add(stream)

    def _met(self, stream: NoiseTransport) -> Peer | None:
        """Somebody has proven who it is. None: another one has taken that id a moment ago."""
        node = stream.remote.node_id
        try:
            is_new = self._known.note(self.greeting.claim(stream))
        except NotTrusted as error:
            log.warning("a node wasn't let in", problem=str(error))
            stream.close()
            return None
        if is_new and self._nursery is not None:
            self._nursery.start_soon(self._save_pins)
        peer = self.peers.of(node)
        self.membership.introduce(node)
        seen_from = getattr(stream.remote, "seen_from", "")
        if seen_from:
            self.greeting.seen_from(seen_from)
        return peer

    async def _dial_back(self, peer: Peer) -> None:
        """Whether we can reach a node that has reached us: it parks connections here if we can't."""
        try:
            connection = await peer.links.take()
        except UpstreamBroken as error:
            log.debug("can't dial back", peer=peer.node, error=str(error))
        else:
            peer.links.keep_unused(connection)

    async def _dial_to_park(self, peer: Peer) -> NoiseTransport:
        return await self.dialler.dial(peer.addresses, "park", node=peer.node)

    def _make_peer(self, node: str) -> Peer:
        async def dial(peer: Peer) -> NoiseTransport:
            return await self.dialler.dial(peer.addresses, node=peer.node)

        cluster = self._cluster
        peer = Peer(node, dial, cluster.circuit_breaker, cluster.noise.session_ttl_seconds)
        for entry in cluster.peers:
            if entry.node_id == node:
                peer.wake_mac = entry.wake_mac
        return peer

    def _check(self, claim: object) -> None:
        self._known.check(claim, self.identity)  # type: ignore[arg-type]

    async def _save_pins(self) -> None:
        try:
            lost = await trio.to_thread.run_sync(self._known.save)
        except (OSError, IdentityError) as error:
            log.warning("who was met can't be written down", error=str(error))
            return
        for claim in lost:
            log.warning("another node with this id was written down meanwhile", peer=claim.node_id)

    async def _reread_pins(self) -> None:
        """Lines that somebody edits by hand count at once, more or less."""
        while True:
            await trio.sleep(_REREAD_SECONDS)
            try:
                await trio.to_thread.run_sync(self._known.refresh)
            except (OSError, IdentityError) as error:
                self._mention(f"known_peers can't be read: {error}")
            for warning in self._known.warnings:
                self._mention(warning)

    def _mention(self, problem: str) -> None:
        if problem not in self._told and len(self._told) < 1000:
            self._told.add(problem)
            log.warning("trouble with known_peers", problem=problem)

    # News.

    async def _gossip(self, peer: Peer, message: bytes | None) -> None:
        try:
            async with self._limit:
                while message is not None:
                    path = "/mesh/gossip"
                    status, reply = await call(peer.links, "POST", path, message, seconds=5 * self._patience)
                    if status != 200:
                        self._say_once(peer, f"refused gossip with status {status}")
                        return
                    message = self.membership.take_reply(peer.node, reply, trio.current_time())
        except UpstreamBroken as error:
            log.debug("gossip failed", peer=peer.node, error=str(error))
        except BadMessage as error:
            self._say_once(peer, f"gossip that can't be read: {error}")
        self._act()

    async def _probe(self, peer: Peer) -> None:
        began = trio.current_time()
        try:
            status, data = await call(peer.links, "GET", "/mesh/probe", seconds=self._patience)
        except UpstreamBroken as error:
            log.debug("probe failed", peer=peer.node, error=str(error))
            await self._probe_failed(peer)
            return
        now = trio.current_time()
        peer.failed_probes = 0
        news = decode_news(data) if status == 200 else None
        if news is None:
            self._say_once(peer, f"answered a probe with status {status} and what isn't understood")
        else:
            peer.note_rtt(now - began)
            peer.note_news(news)
            self.peers.on_change()
        self.membership.probe_result(peer.node, True, now)
        self._act()

    async def _probe_failed(self, peer: Peer) -> None:
        peer.failed_probes += 1
        if peer.failed_probes == _CUT_AFTER:
            # Alive or not: nothing comes through any more, and who waits had better ask elsewhere.
            peer.links.close_all()
        helpers = self.membership.probe_result(peer.node, False, trio.current_time())
        self._act()
        if not helpers:
            return
        reached = False
        async with trio.open_nursery() as nursery:

            async def ask(helper: Peer) -> None:
                nonlocal reached
                path = f"/mesh/probe/{peer.node}"
                try:
                    status, _ = await call(helper.links, "POST", path, seconds=2 * self._patience)
                except UpstreamBroken as error:
                    log.debug("indirect probe failed", peer=peer.node, by=helper.node, error=str(error))
                    return
                reached = reached or status == 200

            for helper in helpers:
                nursery.start_soon(ask, self.peers.of(helper))
        self.membership.indirect_result(peer.node, reached, trio.current_time())
        self._act()

    async def answer(self, peer: str, method: bytes, path: bytes, body: bytes) -> tuple[int, bytes] | None:
        """The mesh's own routes, asked by a peer that has proven who it is. Raises LlameshError."""
        if path == b"/mesh/probe" and method == b"GET":
            news = self.news(peer)
            asking = self.peers.get(peer)
            news.dial_back = asking.links.can_dial if asking is not None else None
            return 200, encode(news)
        if path == b"/mesh/gossip" and method == b"POST":
            try:
                reply = self.membership.answer(peer, body, trio.current_time())
            except BadMessage as error:
                raise InvalidRequest(f"a gossip message that can't be read: {error}") from None
            self._act()
            return 200, reply
        if path.startswith(b"/mesh/probe/") and method == b"POST":
            other = self.peers.get(path.removeprefix(b"/mesh/probe/").decode("latin-1"))
            if other is None:
                return 404, b"{}"
            try:
                await call(other.links, "GET", "/mesh/probe", seconds=self._patience)
            except UpstreamBroken:
                return 504, b"{}"
            return 200, b"{}"
        return None

    async def _say(self, peer: Peer, message: bytes) -> None:
        try:
            await call(peer.links, "POST", "/mesh/gossip", message, seconds=_LEAVE_SECONDS)
        except UpstreamBroken as error:
            log.debug("couldn't say goodbye", peer=peer.node, error=str(error))

    # What the membership found out.

    def _is_alive(self, node: str) -> bool:
        member = self.membership.members().get(node)
        return member is not None and member.status in (Status.ALIVE, Status.SUSPECT)

    def _act(self) -> None:
        events = self.membership.take_events()
        if not events:
            return
        members = self.membership.members()
        for event in events:
            narrate(event)
            if event.id == self.identity.node_id:
                continue
            member = members.get(event.id)
            if member is None or member.status in (Status.DEAD, Status.LEFT):
                peer = self.peers.get(event.id)
                if peer is not None:
                    if member is not None and member.status is Status.LEFT:
                        self.seeker.drop(event.id)
                    else:
                        # It may only be cut off: look for it where it was.
                        self.seeker.seek(event.id, peer.addresses)
                    self.peers.forget(event.id)
                continue
            if isinstance(event, Joined | Updated | Recovered | Restarted):
                entry = self.peers.update(event.id, member.state)
                self.peers.of(event.id).learn_addresses(Address.parse(a) for a in _valid(entry.addresses))
            self.peers.set_alive(event.id, member.status is Status.ALIVE, direct=member.direct)

    def _say_once(self, peer: Peer, what: str) -> None:
        text = f"{peer.node}: {what}"
        if text not in self._told and len(self._told) < 1000:
            self._told.add(text)
            log.warning("trouble with a peer", peer=peer.node, problem=what)


def _valid(addresses: Iterable[str]) -> Iterable[str]:
    """Those that can be dialled; the rest is a peer's mistake."""
    for text in addresses:
        try:
            Address.parse(text)
        except ValueError:
            continue
        yield text
