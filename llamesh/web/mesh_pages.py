"""What the documents of a node say about the others."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import trio

from llamesh.core.membership import Status
from llamesh.core.offers import Offer

if TYPE_CHECKING:
    from llamesh.mesh.mesh import Mesh
    from llamesh.mesh.peer import Peer

# Members of a node's entry that its own summary can't say.
_OURS = ("ready", "version", "llama_cpp_version", "address", "last_seen", "status")


class MeshPages:
    """Reads the mesh into documents; asks nobody and changes nothing."""

    def __init__(self, mesh: Mesh, created: int) -> None:
        """`created`: OpenAI's member of that name, the same for all models."""
        self._mesh = mesh
        self._created = created

    def models(self, own: Collection[str]) -> list[dict[str, Any]]:
        """Entries of `/v1/models` for what only peers have. `own`: this node's keys in lower case."""
        found = []
        for key, offers in sorted(self._mesh.peers.offered()):
            if key not in own:
                node = min(offers)
                found.append(self._model(node, offers[node], offers))
        return found

    def model(self, name: str) -> dict[str, Any] | None:
        """The entry of one that a peer has."""
        profile = self._mesh.peers.find(name)
        if profile is None:
            return None
        for key, offers in self._mesh.peers.offered():
            if key == profile.key.casefold():
                node = min(offers)
                return self._model(node, offers[node], offers)
        return None

    def _model(self, node: str, offer: Offer, offers: dict[str, Offer]) -> dict[str, Any]:
        # Of several nodes that have it, the one where it is loaded says most.
        for one, its in offers.items():
            if its.status == "loaded":
                node, offer = one, its
                break
        peer = self._mesh.peers.get(node)
        params = {"n_ctx": offer.n_ctx, "n_ctx_train": offer.n_ctx_train, "n_slots": offer.n_slots}
        entry: dict[str, Any] = {
            "id": offer.public_name,
            "object": "model",
            "created": self._created,
            "owned_by": node,
            "status": {"value": self._status(offers)},
            "metadata": {
                "model": offer.model,
                "profile_id": offer.profile,
                "description": offer.description,
                "profile_description": offer.profile_description,
                "idle_timeout_seconds": offer.idle_timeout_seconds,
                "estimated_tokens_per_second": offer.tps or None,
                "parsed_model_params": {name: value or None for name, value in params.items()},
                "source": "cluster",
                "advertised_by": node,
                "cluster_url": peer.entry.url if peer is not None else "",
                "nodes": sorted(offers),
            },
        }
        if offer.context_length:
            entry["context_length"] = offer.context_length
        return entry

    @staticmethod
    def _status(offers: dict[str, Offer]) -> str:
        states = {offer.status for offer in offers.values()}
        return "loaded" if "loaded" in states else "unloaded" if states != {"failed"} else "failed"

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The entries of `/cluster/nodes` for all peers, by node id."""
        members = self._mesh.membership.members()
        found = {}
        for peer in self._mesh.peers:
            member = members.get(peer.node)
            gone = member is None or member.status in (Status.DEAD, Status.LEFT)
            if gone and not peer.wake_mac:
                continue
            found[peer.node] = self._node(peer, "asleep" if gone or member is None else member.status.value)
        return found

    def _node(self, peer: Peer, status: str) -> dict[str, Any]:
        now, summary = trio.current_time(), peer.news.summary
        known = {name: value for name, value in summary.items() if name not in _OURS}
        heard = peer.news_at > float("-inf")
        return {
            "active_instances": 0,
            "current_requests": 0,
            "loaded_models": sorted(o.key for o in peer.offers.values() if o.status == "loaded"),
            "supported_models": [offer.key for offer in peer.offers.values()],
            "model_stats": {},
            "total_queue_length": 0,
            "started_at_unix": peer.entry.started,
            **known,
            "ready": peer.alive and not peer.news.closed,
            "reason": peer.news.closed or None,
            "status": status,
            "version": peer.entry.version,
            "llama_cpp_version": peer.entry.engine_version,
            "address": peer.entry.url or next(iter(peer.entry.addresses), ""),
            "addresses": list(peer.entry.addresses),
            "last_seen": time.time() - (now - peer.news_at) if heard else None,
            "link": {
                "direct": peer.alive and peer.direct and peer.links.reachable,
                "round_trip_ms": round(peer.rtt_ms, 2) if peer.rtt_ms else None,
                "connections": len(peer.links),
                "forwards_in_flight": sum(peer.in_flight.values()),
                "forwards_total": peer.forwards,
                "lost_total": peer.lost,
                "breaker": peer.breaker.state.value,
                "can_dial": peer.links.can_dial,
                "problem": peer.links.problem or None,
            },
        }
