"""The mesh's side of the composition root: what joins a node to others, where that is switched on."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import trio

from llamesh.config.cookbook import ModelPath
from llamesh.config.current import Current
from llamesh.config.settings import Settings
from llamesh.dispatch import Dispatch
from llamesh.dispatch.offering import Offering
from llamesh.dispatch.router import Router
from llamesh.local.owner import Owner
from llamesh.local.pool import Pool
from llamesh.local.weights.hashes import Hashes
from llamesh.local.weights.shared import Shared
from llamesh.mesh.discovery import Discovery, Sighting
from llamesh.mesh.identity import Identity, load_identity
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import KeyStore
from llamesh.mesh.known_peers import KnownPeers
from llamesh.mesh.mesh import Mesh
from llamesh.mesh.static_peers import StaticPeers
from llamesh.sharing.peer_weights import PATH as WEIGHTS
from llamesh.sharing.peer_weights import PeerWeights
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger
from llamesh.web.admin import Administration
from llamesh.web.audited import audited, peers_order
from llamesh.web.fast_lane import FastLane
from llamesh.web.mesh_pages import MeshPages
from llamesh.web.mesh_state import MeshRoute
from llamesh.web.pages import CREATED, Pages
from llamesh.web.peer_acts import PeerActs
from llamesh.web.peer_files import PeerFiles
from llamesh.web.peer_lane import PeerLane

__all__ = ["Cluster", "IdentityError", "Member", "load_member"]

log = get_logger("mesh")

Member = tuple[Identity, KnownPeers]


def load_member(settings: Settings, environ: Mapping[str, str]) -> Member:
    """Who this node is in the mesh, and whom it knows; what is missing is created. Raises IdentityError."""
    noise = settings.cluster.noise
    identity = load_identity(settings, environ)
    known = KnownPeers(KeyStore(settings, environ).known_peers_path, noise.allowed_keys, noise.tofu)
    for warning in known.warnings:
        log.warning("known_peers has a line that isn't understood", problem=warning)
    return identity, known


class Cluster:
    """Joins the parts of a node to the mesh; made only where `cluster.enabled` is on."""

    def __init__(
        self,
        current: Current,
        member: Member,
        pool: Pool,
        dispatch: Dispatch,
        learned: LearnedValues,
        pages: Pages,
        lane: FastLane,
        administration: Administration,
    ) -> None:
        self._current = current
        settings = self._settings = current.settings
        self.leaving = ""  # why nothing is done for peers any more
        self.mesh = Mesh(settings, *member)
        self.owner = Owner()
        router = Router(current, pool, learned, self.mesh.peers)
        router.queue_length = dispatch.queue_length
        self.offering = Offering(
            current,
            pool,
            dispatch,
            router,
            learned,
            status=lambda profile: str(pages.status(profile)["value"]),
            summary=pages.summary,
            unwilling=self.unwilling,
        )
        router.fingerprint = self.offering.fingerprint
        dispatch.router = router
        dispatch.unwilling = self.unwilling
        meters = lane.gateway.access.meters
        self.mesh.entries = lambda: {**self.offering.entries(), **meters.entries()}
        self.mesh.heard = meters.hear
        self.mesh.news = self.offering.news
        self.mesh.peers.on_change = dispatch.settle
        self.mesh.greeting.engine, self.mesh.greeting.engine_version = pool.engine.origin, pool.engine.version
        shared = Shared(
            pool.weights.cache, Hashes(pool.weights.cache.own / "hashes.json"), lambda: _paths(current)
        )
        self.weights = PeerWeights(self.mesh.peers, shared, self.unwilling)
        pool.weights.ask(self.weights)
        self._audit, stats = lane.gateway.audit, lane.gateway.stats
        files = PeerFiles(self.weights.open, self.unwilling, lambda: stats.current_requests)
        self.lane = PeerLane(lane, self.mesh, self._administer, files)
        self.mesh.serve = self.lane.serve_parked
        if settings.cluster.listen_addr is None:
            lane.serve_peer = self.lane.serve
        pages.mesh = MeshPages(self.mesh, CREATED)
        administration.peers = PeerActs(self.mesh, administration.own, self.unwilling)
        # What other parts answer to peers, by path.
        self.routes: dict[str, MeshRoute] = administration.peers.routes()

    def unwilling(self) -> str:
        """Why this node does nothing for its peers now, "" when it does."""
        return self.leaving or self.owner.willing(self._settings.cluster.serve_peers)

    async def run(self, sockets: list[socket.socket], url: str) -> None:
        """Be part of the mesh. `sockets`: those on which peers may dial; `url`: of this node's API."""
        cluster, mesh = self._settings.cluster, self.mesh
        mesh.greeting.listens([sock.getsockname() for sock in sockets])
        mesh.greeting.url = url
        log.info(
            "mesh",
            node=self._settings.node_id,
            public=mesh.identity.public_text,
            peers=len(cluster.peers),
            mdns=cluster.discovery.mdns,
            port=mesh.greeting.port,
        )
        discovery = Discovery(
            cluster.discovery,
            node_id=self._settings.node_id,
            port=mesh.greeting.port,
            txt={"key": mesh.identity.fingerprint},
            addresses=mesh.greeting.hosts,
            on_found=self._sighted,
            on_lost=mesh.seeker.unsighted,
        )
        statics = StaticPeers(cluster.peers, mesh.set_static)
        async with trio.open_nursery() as nursery:
            await nursery.start(mesh.run)
            nursery.start_soon(self.offering.run)
            nursery.start_soon(self.owner.run, lambda: self._settings.cluster.serve_peers)
            await nursery.start(statics.run)
            nursery.start_soon(discovery.run)

    def _sighted(self, sighting: Sighting) -> None:
        self.mesh.sighted(sighting.node_id, sighting.addresses)

    async def _administer(self, peer: str, path: str, body: bytes) -> tuple[int, bytes] | None:
        """What a peer asks for: weights, or what its operator wants, having been let in there."""
        order = peers_order(path, body)
        if order is None:
            return await self._answer(peer, path, body)
        with audited(self._audit, order.path, "", origin=order.asker or peer) as deed:
            deed.document, deed.quiet = order.document, order.only_looks
            answer = await self._answer(peer, path, body)
            deed.answered(*(answer or (404, b"")))
            # A request to cancel is looked for at all nodes.
            deed.quiet = deed.quiet or (order.path == "/admin/cancel" and deed.status == 404)
        return answer

    async def _answer(self, peer: str, path: str, body: bytes) -> tuple[int, bytes] | None:
        if (route := self.routes.get(path)) is not None:
            return await route(peer, body)
        if path == WEIGHTS:
            return await self.weights.answer(body)
        return None


def _paths(current: Current) -> list[str]:
    """The model files that the cookbook names. In a thread: the cookbook is replaced as a whole."""
    return [one.source.path for one in current.cookbook.profiles if isinstance(one.source, ModelPath)]
