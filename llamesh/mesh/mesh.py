"""The mesh as one node sees it: who is there, and connections with them in both directions.

    handshakes   -> `introduce` to the membership, addresses and connections to `Peer`
    rounds       -> `gossip`: the membership's events say who is there, and what they have
    what is lost -> `seeker`, which dials it until it is back

Nothing that a peer or a caller's function does ends the mesh.
"""

from __future__ import annotations

import random
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio

from llamesh.config.settings import Settings
from llamesh.config.values import Address
from llamesh.core.membership import (
    Event,
    Joined,
    Member,
    Membership,
    Options,
    Recovered,
    Restarted,
    Status,
    Updated,
)
from llamesh.core.offers import NODE_KEY, News, decode_entry, encode
from llamesh.mesh.dialler import CantReach, Dialler
from llamesh.mesh.gossip import Gossip
from llamesh.mesh.greeting import Greeting
from llamesh.mesh.hearsay import is_near, worth_dialling
from llamesh.mesh.identity import Identity
from llamesh.mesh.known_peers import KnownPeers
from llamesh.mesh.narration import narrate
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.parking import Parking
from llamesh.mesh.peer import Peer
from llamesh.mesh.peers import Peers
from llamesh.mesh.pins import Pins
from llamesh.mesh.seeker import Seeker
from llamesh.mesh.static_peers import Target
from llamesh.mesh.trust import Claim, NotTrusted
from llamesh.mesh.waking import Waker
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# Nodes that this one can't reach and says so; beyond that it is rather this node that is cut off.
_MOST_CUT = 64

_HERE = (Status.ALIVE, Status.SUSPECT)

# A node that is no member, not even a dead one, is forgotten after so many seconds.
_FORGET = 60.0


class Mesh:
    """See the module. Set before `run`: `entries()`, this node's offers by key; `news(asker)`, how it is now;
    `serve(stream, on_first_request)`, which answers requests on a connection that we dialled; `heard(node,
    state)`, which is told of another node's entries, or None when it is gone.
    """

    def __init__(self, settings: Settings, identity: Identity, known: KnownPeers) -> None:
        cluster = settings.cluster
        self.entries: Callable[[], Mapping[str, bytes]] = dict
        self.news: Callable[[str], News] = lambda asker: News()
        self.heard: Callable[[str, Mapping[str, bytes] | None], None] = lambda node, state: None
        self.serve: Callable[[NoiseTransport, Callable[[], None]], Awaitable[None]]
        self.identity = identity
        self.interval = float(cluster.gossip_interval_seconds)
        self.epoch = time.time_ns() // 1_000_000
        self.membership = Membership(
            settings.node_id,
            self.epoch,
            Options(interval=self.interval),
            random.Random(secrets.randbits(128)),  # noqa: S311
        )
        self.peers = Peers(self._make_peer, Waker(cluster.discovery.interfaces).wake)
        self.greeting = Greeting(settings, identity, self.epoch)
        self.pins = Pins(known, identity, self._contradicted)
        self.dialler = Dialler(identity, self.greeting.hello, self.pins.check, self.greeting.check_version)
        self.seeker = Seeker(self.dialler, self._is_alive, self._found)
        self.parking = Parking(self._dial_to_park, lambda stream, taken: self.serve(stream, taken))
        at_once = cluster.max_concurrent_gossip
        gossip = Gossip(self.membership, self.peers, interval=self.interval, at_once=at_once)
        gossip.entries = self._own_entries
        gossip.news = lambda asker: self.news(asker)
        gossip.act, gossip.end_round = self._act, self._end_round
        self.gossip = gossip
        self.answer, self.leave = gossip.answer, gossip.leave
        self._cluster = cluster
        self._nursery: trio.Nursery | None = None
        self._wake_macs: dict[Address, str] = {}  # of configured addresses, where the node may be anybody
        self._inbound: set[NoiseTransport] = set()
        self._strangers: dict[str, float] = {}  # who is no member, and since when
        self._dialling_back: set[str] = set()
        self._hosts: tuple[str, ...] = ()
        self._is_near = False  # somebody else is on this machine
        for entry in cluster.peers:
            if entry.node_id is not None and entry.wake_mac is not None:
                self.peers.of(entry.node_id)  # it may be asleep, and is listed from the start

    # Life.

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Be part of the mesh, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self.parking.run)
                nursery.start_soon(self.seeker.run)
                nursery.start_soon(self.gossip.run)
                nursery.start_soon(self.pins.run)
                task_status.started()
        finally:
            self._nursery = None
            for peer in self.peers:
                peer.links.close_all()

    def _own_entries(self) -> dict[str, bytes]:
        cut = sorted(p.node for p in self.peers if p.alive and not (p.direct and p.links.reachable))
        return {NODE_KEY: encode(self.greeting.entry(tuple(cut[:_MOST_CUT]))), **self.entries()}

    def _end_round(self) -> None:
        members, now = self.membership.members(), trio.current_time()
        for peer in tuple(self.peers):
            peer.links.sweep()
            self._keep_true(peer, members.get(peer.node))
            if peer.alive:
                self.parking.want(peer, peer.news.dial_back)
            if peer.node in members:
                self._strangers.pop(peer.node, None)
            elif now - self._strangers.setdefault(peer.node, now) > _FORGET and self.peers.discard(peer.node):
                del self._strangers[peer.node]
        self._inbound = {stream for stream in self._inbound if not stream.closed}
        if (hosts := self.greeting.hosts()) != self._hosts:
            self._hosts = hosts
            self.seeker.forget_own()

    def _keep_true(self, peer: Peer, member: Member | None) -> None:
        """Whether it is reached directly changes without an event."""
        alive = member is not None and member.status is Status.ALIVE
        direct = member.direct if member is not None else True
        if peer.alive == alive and peer.direct == direct:
            return
        changed = peer.alive == alive
        self.peers.set_alive(peer.node, alive, direct=direct)
        if changed:
            self.peers.on_change()

    # Connections.

    async def accept(self, sock: socket.socket, read_before: bytes) -> NoiseTransport | None:
        """Let a peer in. None: it wasn't let in, which is logged, or it parked the connection with us."""
        stream = await self.greeting.accept(sock, read_before, self.pins.check)
        if stream is None:
            return None
        peer = self._met(stream)
        if peer is None:
            return None
        remote = stream.remote
        peer.learn_addresses(self._believed(remote.addresses, near=is_near(stream.address)))
        if remote.port:
            peer.learn_addresses([Address(Address.parse(stream.address).host, remote.port)])
        if getattr(remote, "purpose", "send") == "park":
            peer.links.add(stream, parked=True)
            return None
        self._inbound.add(stream)
        idle = peer.links.can_dial is None and peer.node not in self._dialling_back
        if idle and self._nursery is not None:
            self._dialling_back.add(peer.node)
            self._nursery.start_soon(self._dial_back, peer)
        return stream

    def sighted(self, node: str, addresses: Iterable[Address]) -> None:
        """It was seen on the local network."""
        if node != self.identity.node_id:
            self.seeker.sighted(node, addresses)

    def set_static(self, targets: Iterable[Target]) -> None:
        """These addresses are configured."""
        targets = tuple(targets)
        self._wake_macs = {
            t.address: t.entry.wake_mac
            for t in targets
            if t.entry.wake_mac is not None and t.entry.node_id is None
        }
        self.seeker.set_static((t.address, t.entry.node_id) for t in targets)

    def _found(self, stream: NoiseTransport) -> None:
        peer = self._met(stream)
        if peer is None:
            return
        where = Address.parse(stream.address)
        peer.learn_addresses([where], first=True)
        peer.learn_addresses(self._believed(stream.remote.addresses, near=where.is_loopback))
        peer.wake_mac = peer.wake_mac or self._wake_macs.get(where)
        peer.links.add(stream)

    def _met(self, stream: NoiseTransport) -> Peer | None:
        """Somebody has proven who it is. None: another one has taken that id a moment ago."""
        node = stream.remote.node_id
        if not self._pinned(stream):
            return None
        peer = self.peers.of(node)
        self.membership.introduce(node)
        self._is_near = self._is_near or is_near(stream.address)
        self.greeting.seen_from(getattr(stream.remote, "seen_from", ""))
        return peer

    def _pinned(self, stream: NoiseTransport) -> bool:
        try:
            self.pins.note(self.greeting.claim(stream))
        except NotTrusted as error:
            log.warning("a node wasn't let in", problem=str(error))
            stream.close()
            return False
        return True

    def _contradicted(self, claim: Claim) -> None:
        """A node that shares our known_peers met another one by that id first."""
        log.warning("another node with this id was written down meanwhile", peer=claim.node_id)
        for stream in self._inbound:
            if stream.remote.node_id == claim.node_id and stream.remote_key == claim.key:
                stream.close()
        peer = self.peers.get(claim.node_id)
        if peer is not None:
            peer.links.close_all()

    async def _dial_back(self, peer: Peer) -> None:
        """Whether we can reach a node that has reached us: it parks connections here if we can't."""
        try:
            connection = await peer.links.take()
        except UpstreamBroken as error:
            log.debug("can't dial back", peer=peer.node, error=str(error))
        else:
            peer.links.keep_unused(connection)
        finally:
            self._dialling_back.discard(peer.node)

    async def _dial_to_park(self, peer: Peer) -> NoiseTransport:
        return await self._dial(peer, "park")

    async def _dial(self, peer: Peer, purpose: str = "send") -> NoiseTransport:
        addresses = peer.addresses
        if not addresses and (state := self.membership.remembered(peer.node)):
            entry = decode_entry(state.get(NODE_KEY, b""))
            addresses = self._believed(entry.addresses if entry is not None else (), near=self._is_near)
        stream = await self.dialler.dial(addresses, purpose, node=peer.node)
        if not self._pinned(stream):
            raise CantReach(f"another node has taken the id {peer.node}")
        peer.learn_addresses([Address.parse(stream.address)], first=True)
        return stream

    def _believed(self, addresses: Iterable[str], *, near: bool) -> tuple[Address, ...]:
        return worth_dialling(addresses, near=near, own=self.greeting.addresses())

    def _make_peer(self, node: str) -> Peer:
        cluster = self._cluster
        peer = Peer(node, self._dial, cluster.circuit_breaker, cluster.noise.session_ttl_seconds)
        for entry in cluster.peers:
            if entry.node_id == node:
                peer.wake_mac = peer.wake_mac or entry.wake_mac
        return peer

    # What the membership found out.

    def _is_alive(self, node: str) -> bool:
        member = self.membership.members().get(node)
        return member is not None and member.status in _HERE

    def _act(self) -> None:
        events = self.membership.take_events()
        if not events:
            return
        members = self.membership.members()
        for event in events:
            narrate(event)
            if event.id != self.identity.node_id:
                try:
                    self._follow(event, members.get(event.id))
                except Exception:
                    log.exception("defect", during=f"taking in news of {event.id}")

    def _follow(self, event: Event, member: Member | None) -> None:
        node = event.id
        here = member is not None and member.status in _HERE
        self.heard(node, member.state if here and member is not None else None)
        if member is None or member.status not in _HERE:
            peer = self.peers.get(node)
            if peer is None:
                return
            left = member is not None and member.status is Status.LEFT
            if left:
                self.seeker.drop(node)
            else:
                self.seeker.lost(node, peer.addresses)
            self.parking.end(node)
            self.peers.forget(node, left=left)
            return
        if isinstance(event, Joined | Updated | Recovered | Restarted):
            peer = self.peers.of(node)
            before = peer.entry.addresses
            entry = self.peers.update(node, member.state)
            if entry.addresses != before or not peer.addresses:
                # Where it answered stays: it may be seen there under another address than it knows.
                near = self._is_near
                peer.set_addresses(self._believed(entry.addresses, near=near), peer.addresses[:4])
        self.peers.set_alive(node, member.status is Status.ALIVE, direct=member.direct)
