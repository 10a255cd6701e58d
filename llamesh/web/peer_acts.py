"""Administration of other nodes: an act travels over the mesh's own links, and is performed there.

`POST /mesh/admin` carries `Order`. Who sends it has proven to be a node of the mesh, and has let its operator
in; its word for that is enough here, unless this machine's owner says otherwise
(`cluster.accept_administration`). A node that can be reached only through a third one gets it by way of that
one, as requests do; it is passed on once, so it can't go in circles. An error comes back with status, type
and words.

`POST /mesh/prewarm`, the document of a prewarm alone, is what versions before this one say and understand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import msgspec

import llamesh.errors
from llamesh.core.cost import Features
from llamesh.core.routing import route
from llamesh.errors import (
    Draining,
    Forbidden,
    InvalidRequest,
    LlameshError,
    NoCapacity,
    RequestTooLarge,
    UpstreamError,
)
from llamesh.mesh.calls import NotSent, call
from llamesh.mesh.mesh import Mesh
from llamesh.mesh.peer import Peer
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger
from llamesh.web.mesh_state import MeshRoute
from llamesh.web.own_acts import Answer, Document, OwnActs

log = get_logger("admin")

ADMIN, PREWARM = "/mesh/admin", "/mesh/prewarm"

ActName = Literal["prewarm", "unload", "drain", "undrain", "pause", "reload", "rebuild-llama", "builds"]
ACTS: tuple[str, ...] = get_args(ActName)

# Those that only look.
_READS = ("builds",)

# The longest load that anybody waits for over the mesh, and what any other act may take.
_PREWARM_SECONDS = 3600.0
_SECONDS = 15.0

# As of an admin call of a client.
_MOST_BYTES = 1 << 20

_NodeId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]

_FACES = {
    (error.status, error.type): error
    for error in vars(llamesh.errors).values()
    if isinstance(error, type) and issubclass(error, LlameshError)
}


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """act: what; node: who is to do it; document: as the operator wrote it, without `node`; asker: the node
    whose operator it is, where another one passes it on.
    """

    act: ActName
    node: _NodeId
    document: Document = {}
    asker: _NodeId | None = None


class PeerActs:
    """Both sides: `ask` another node, `routes` for what others ask of this one."""

    def __init__(self, mesh: Mesh, own: OwnActs, unwilling: Callable[[], str]) -> None:
        """`unwilling()`: why nothing is loaded for others now, "" when it is."""
        self._mesh = mesh
        self._own = own
        self._unwilling = unwilling

    def routes(self) -> dict[str, MeshRoute]:
        """What peers may ask, by path."""
        return {ADMIN: self._ordered, PREWARM: self._prewarm_ordered}

    # Who has what.

    def loaded_on(self, name: str) -> list[str]:
        """Ids of the living peers on which a model is loaded, as they said last."""
        profile = self._own.store.current.cookbook.find(name) or self._mesh.peers.find(name)
        if profile is None:
            return []
        key = profile.key.casefold()
        return sorted(
            peer.node
            for peer in self._mesh.peers
            if peer.alive and key in peer.offers and peer.offers[key].status == "loaded"
        )

    async def prewarm_anywhere(self, name: str, document: Document) -> Answer | None:
        """Load a model that this node doesn't run where it is ready soonest; None: it isn't the peers' to do.
        Raises LlameshError.
        """
        peers, profile = self._mesh.peers, self._own.store.current.cookbook.find(name)
        if profile is not None and profile.max_instances != 0:
            return None
        profile = profile or peers.find(name)
        if profile is None or not peers.has(profile.key):
            return None
        refused: set[str] = set()
        said: LlameshError | None = None
        while True:
            choice = route(None, peers.outlooks(profile.key, refused), Features())
            if not choice.node:
                why = peers.explain(profile.key, refused) or "no node that has it runs it"
                raise said or NoCapacity(f"{profile.key} can't be loaded anywhere now: {why}", param="model")
            try:
                return await self.ask(choice.node, "prewarm", document)
            except Forbidden as error:
                # Its owner lets nobody have it done; the next one may.
                said = error
                refused.add(choice.node)

    # Asking.

    async def ask(self, node: str, act: ActName, document: Document) -> Answer:
        """Have `node` do it. Raises LlameshError: what that node says, or that it can't be told."""
        peers = self._mesh.peers
        peer = peers.get(node)
        if peer is None:
            raise InvalidRequest(
                f"there is no node {node[:64]!r} in the mesh now; see GET /cluster/nodes", param="node"
            )
        order = Order(act, node, document)
        try:
            if not peer.alive and peer.wake_mac and act == "prewarm":
                await peers.wake(peer)
            if not peer.alive:
                raise UpstreamError(f"node {node} doesn't answer, is asleep or has left; {act} was not done")
            status, data = await self._send_by(peers.ways_to(peer), order)
            answer = msgspec.json.decode(data, type=dict[str, Any])
            if status == 404 and _kind(answer) == "not_found" and act == "prewarm":
                body = msgspec.json.encode(document)
                status, data = await call(peer.links, "POST", PREWARM, body, seconds=_PREWARM_SECONDS)
                answer = msgspec.json.decode(data, type=dict[str, Any])
        except (UpstreamBroken, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UpstreamError(f"it isn't known whether node {node} did it ({act}): {error}") from None
        if status >= 400:
            raise _passed_on(node, act, status, answer)
        return status, {**answer, "node": node}

    async def _send_by(self, ways: list[Peer], order: Order) -> tuple[int, bytes]:
        """By the first way that leads there. Whether one does often shows only when it is tried."""
        problems = []
        for way in ways:
            try:
                return await self._send(way, order)
            except NotSent as error:
                problems.append(f"by way of {way.node}: {error}" if way.node != order.node else str(error))
        problem = "; ".join(problems) or "no connection"
        raise UpstreamError(
            f"node {order.node} can't be reached from here ({problem}); ask node {order.node} itself"
        )

    @staticmethod
    async def _send(way: Peer, order: Order) -> tuple[int, bytes]:
        seconds = _PREWARM_SECONDS if order.act == "prewarm" else _SECONDS
        return await call(way.links, "POST", ADMIN, msgspec.json.encode(order), seconds=seconds)

    # Being asked.

    async def _ordered(self, peer: str, body: bytes) -> tuple[int, bytes]:
        if len(body) > _MOST_BYTES:
            raise RequestTooLarge(f"an order has {_MOST_BYTES} bytes at most")
        try:
            order = msgspec.json.decode(body, type=Order)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"not an order that this version understands: {error}") from None
        if order.node != self._own.node_id:
            return await self._pass_on(peer, order)
        return await self._obey(order, order.asker or peer, peer if order.asker else "")

    async def _prewarm_ordered(self, peer: str, body: bytes) -> tuple[int, bytes]:
        try:
            document = msgspec.json.decode(body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"not a JSON object: {error}") from None
        return await self._obey(Order("prewarm", self._own.node_id, document), peer, "")

    async def _pass_on(self, peer: str, order: Order) -> tuple[int, bytes]:
        """To a node that the one that asks can't reach."""
        here, target = self._own.node_id, self._mesh.peers.get(order.node)
        there = target is not None and target.alive and target.direct and target.links.reachable
        if target is None or not there or order.asker is not None:
            raise UpstreamError(f"node {order.node} can't be reached from node {here} either")
        log.info("administration passed on", act=order.act, peer=peer, node=order.node)
        try:
            return await self._send(target, msgspec.structs.replace(order, asker=peer))
        except UpstreamBroken as error:
            raise UpstreamError(f"node {here} passed it on to node {order.node}, which {error}") from None

    async def _obey(self, order: Order, asker: str, by_way_of: str) -> tuple[int, bytes]:
        """Do it as our own act. `asker`: the node whose operator wants it."""
        here, act = self._own.node_id, order.act
        said: dict[str, str] = {"act": act, "peer": asker}
        if by_way_of:
            said["by_way_of"] = by_way_of
        if "model" in order.document:
            said["model"] = str(order.document["model"])[:120]
        if act not in _READS:
            if not self._own.store.current.settings.cluster.accept_administration:
                log.warning("another node's administration was refused", **said)
                raise Forbidden(
                    f"node {here} takes no administration from other nodes "
                    "(cluster.accept_administration is false there); ask that node itself"
                )
            if act == "prewarm" and (why := self._unwilling()):
                raise Draining(f"node {here} loads nothing for others: {why}")
            log.info("administered by another node", **said)
        status, answer = await self._own.perform(act, order.document)
        return status, msgspec.json.encode(answer)


def _kind(answer: Document) -> str:
    error = answer.get("error")
    kind = error.get("type") if isinstance(error, dict) else None
    return kind if isinstance(kind, str) else ""


def _passed_on(node: str, act: str, status: int, answer: Document) -> LlameshError:
    """A peer's error, as ours: the same status, type and words, and what came with it."""
    error, kind = answer.get("error"), _kind(answer)
    told = error if isinstance(error, dict) else {}
    message, param = told.get("message"), told.get("param")
    if not isinstance(message, str) or not kind:
        return UpstreamError(f"node {node} answered {act} with status {status} and no reason")
    face = _FACES.get((status, kind))
    if face is None or kind == "not_found":
        return UpstreamError(
            f"node {node}, of another version, didn't do it ({act}, {kind[:64]}): {message[:2000]}"
        )
    extra = {name: value for name, value in answer.items() if name != "error"}
    return face(
        message[:4000], param=param if isinstance(param, str) else None, extra={**extra, "node": node}
    )
