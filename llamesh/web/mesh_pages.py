"""What the documents of a node say about the others."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import trio

from llamesh.core.membership import Member, Status
from llamesh.core.offers import Offer
from llamesh.telemetry.mesh_figures import MOST_PEERS, MeshFigures, PeerFigures

if TYPE_CHECKING:
    from llamesh.mesh.mesh import Mesh
    from llamesh.mesh.peer import Peer

# Members of a node's entry that its own summary can't say: this node knows better.
_OURS = ("ready", "reason", "version", "llama_cpp_version", "address", "last_seen", "status")

# What an entry has before the node has said anything.
_UNKNOWN: Mapping[str, Any] = {
    "active_instances": 0,
    "current_requests": 0,
    "model_stats": {},
    "total_queue_length": 0,
    "available_vram": None,
    "available_sysmem": None,
    "external_vram_mb": None,
    "device_vram_used_mb": None,
    "device_vram_total_mb": None,
    "gpu_telemetry_available": False,
}

_HERE = (Status.ALIVE, Status.SUSPECT)


class MeshPages:
    """Reads the mesh into documents and figures; asks nobody and changes nothing."""

    def __init__(self, mesh: Mesh, created: int) -> None:
        """`created`: OpenAI's member of that name, the same for all models."""
        self._mesh = mesh
        self._created = created

    def models(self, own: Collection[str]) -> list[dict[str, Any]]:
        """Entries of `/v1/models` for what only peers have. `own`: this node's keys in lower case."""
        return [self._model(offers) for key, offers in sorted(self._mesh.peers.offered()) if key not in own]

    def model(self, name: str) -> dict[str, Any] | None:
        """The entry of one that a peer has."""
        profile = self._mesh.peers.find(name)
        if profile is None:
            return None
        key = profile.key.casefold()
        return next((self._model(offers) for one, offers in self._mesh.peers.offered() if one == key), None)

    def _model(self, offers: Mapping[str, Offer]) -> dict[str, Any]:
        # Of several nodes that have it, one where it is loaded says most.
        node = min(offers, key=lambda one: (offers[one].status != "loaded", one))
        offer, peer = offers[node], self._mesh.peers.get(node)
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
    def _status(offers: Mapping[str, Offer]) -> str:
        states = {offer.status for offer in offers.values()}
        return "loaded" if "loaded" in states else "unloaded" if states != {"failed"} else "failed"

    def nodes(self) -> dict[str, dict[str, Any]]:
        """The entries of `/cluster/nodes` for all peers that are there or asleep, by node id."""
        members = self._mesh.membership.members()
        found = {}
        for peer in self._mesh.peers:
            status = _status_of(peer, members.get(peer.node))
            if status in ("alive", "suspect", "asleep"):
                found[peer.node] = self._node(peer, status)
        return found

    def _node(self, peer: Peer, status: str) -> dict[str, Any]:
        now, summary = trio.current_time(), peer.news.summary
        heard = math.isfinite(peer.news_at)
        reason = peer.closed
        if status == "asleep":
            # What it said of itself when it was awake isn't so any more.
            summary, reason = {}, "it is asleep, and is woken when it is needed"
        elif status == "suspect":
            reason = "it doesn't answer at the moment"
        return {
            **_UNKNOWN,
            "loaded_models": [],
            "supported_models": sorted(offer.key for offer in peer.offers.values()),
            "started_at_unix": peer.entry.started or None,
            **{name: value for name, value in summary.items() if name not in _OURS},
            "ready": status == "alive" and not reason,
            "reason": reason or None,
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

    def figures(self) -> MeshFigures:
        """What `/metrics` shows of it."""
        mesh, members = self._mesh, self._mesh.membership.members()
        statuses = Counter(
            _status_of(mesh.peers.get(node), member)
            for node, member in members.items()
            if node != mesh.identity.node_id
        )
        listed = []
        for peer in mesh.peers:
            status = _status_of(peer, members.get(peer.node))
            if peer.node not in members and status == "asleep":
                statuses["asleep"] += 1
            if peer.node in members or status == "asleep":
                listed.append(peer)
        # Those that are there come first, where there are too many.
        listed.sort(key=lambda peer: (not peer.alive, peer.node))
        return MeshFigures(
            statuses,
            [_figures(peer) for peer in listed[:MOST_PEERS]],
            _gossip(mesh.membership.counters),
            {
                **{("dialler", outcome): count for outcome, count in mesh.dialler.outcomes.items()},
                **{("acceptor", outcome): count for outcome, count in mesh.greeting.outcomes.items()},
            },
        )


def _status_of(peer: Peer | None, member: Member | None) -> str:
    """As `/cluster/nodes` calls it; "" of one that never was a member."""
    if member is not None and member.status in _HERE:
        return member.status.value
    if peer is not None and peer.wake_mac:
        return "asleep"
    return "" if member is None else member.status.value


def _figures(peer: Peer) -> PeerFigures:
    running = sum(peer.in_flight.values())
    return PeerFigures(
        peer.node,
        peer.alive,
        peer.rtt_ms / 1000 if peer.rtt_ms else None,
        peer.breaker.state.value,
        {"lost": peer.lost, "ended": peer.forwards - peer.lost - running},
        running,
        {"idle": peer.links.idle, "busy": len(peer.links) - peer.links.idle},
    )


def _gossip(counters: Mapping[str, int]) -> dict[tuple[str, str], tuple[int, int]]:
    """From `in.KIND.bytes` and the like."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for name, size in counters.items():
        way, _, rest = name.partition(".")
        kind, _, unit = rest.partition(".")
        if way in ("in", "out") and unit == "bytes":
            found[way, kind] = (counters[f"{way}.{kind}.messages"], size)
    return found
