"""The mesh's side of the composition root: what joins a node to others, where that is switched on."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from llamesh.config.cookbook import ModelPath
from llamesh.config.current import Current
from llamesh.config.settings import Settings
from llamesh.dispatch import Dispatch
from llamesh.dispatch.offering import Offering
from llamesh.dispatch.router import Router
from llamesh.errors import Draining, InvalidRequest, LlameshError
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
from llamesh.peer_weights import PATH as WEIGHTS
from llamesh.peer_weights import PeerWeights
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger
from llamesh.web.admin import Administration
from llamesh.web.audited import audited, peers_order
from llamesh.web.fast_lane import FastLane
from llamesh.web.mesh_pages import MeshPages
from llamesh.web.mesh_state import MeshRoute
from llamesh.web.pages import CREATED, Pages
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
        self.mesh.entries = self.offering.entries
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
        administration.mesh = self.mesh
        self._acts = administration
        self.routes: dict[str, MeshRoute] = {}  # what other parts answer to peers, by path

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
        if path != "/mesh/prewarm":
            return None
        try:
            document = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"not a JSON object: {error}") from None
        log.info("prewarm asked by a peer", peer=peer, model=str(document.get("model"))[:120])
        node = self._settings.node_id
        try:
            if unwilling := self.unwilling():
                raise Draining(f"node {node} loads nothing for others: {unwilling}")
            # Here and nowhere else: who asks has chosen, and nobody is to send it round in circles.
            status, answer = await self._acts.prewarm({**document, "node": node})
        except LlameshError as error:
            return error.status, error.body()
        return status, msgspec.json.encode(answer)


def _paths(current: Current) -> list[str]:
    """The model files that the cookbook names. In a thread: the cookbook is replaced as a whole."""
    return [one.source.path for one in current.cookbook.profiles if isinstance(one.source, ModelPath)]
