"""What the other nodes say of themselves, asked for only while somebody looks.

Each peer is asked at most once a second, less often in a large mesh, and those that don't answer less often
still. Nobody waits for a slow one: what it said last is shown, and when that was.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

import llamesh
from llamesh.errors import Forbidden
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger
from llamesh.web.attention import Finding
from llamesh.web.history import Sample
from llamesh.web.mesh_pages import MeshPages
from llamesh.web.state_merge import Other
from llamesh.web.state_schema import STEP, STEPS, Part, Request

if TYPE_CHECKING:
    from llamesh.mesh.mesh import Mesh
    from llamesh.mesh.peer import Peer

log = get_logger("state")

T = TypeVar("T")

# (who asks, body) -> status and JSON.
MeshRoute = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]

STATE, HISTORY, CANCEL, REQUEST, LOGS = (
    "/mesh/state", "/mesh/history", "/mesh/cancel", "/mesh/request", "/mesh/logs",
)  # fmt: skip

# How long an answer counts as new, and what it may take.
_FRESH_SECONDS = 1.0
_PATIENCE = 0.8
_LONGEST = 1.5
_AT_ONCE = 16

# A peer that didn't answer, or can't (an older version), is left alone for so long.
_PAUSE = 5.0

# What a part may be at most; with everything at its limit it is half of that.
_MOST_BYTES = 1 << 20

_parts = msgspec.json.Decoder(Part)


class Samples(msgspec.Struct, frozen=True):
    """A node's last hour."""

    samples: list[Sample]


class Wanted(msgspec.Struct, frozen=True):
    """Names one request."""

    request_id: str


class Told(msgspec.Struct, frozen=True):
    """A peer's records of one request."""

    records: list[Request] = []


_samples = msgspec.json.Decoder(Samples)
_told = msgspec.json.Decoder(Told)


@dataclass(slots=True)
class _Heard:
    """Of one peer. Times are trio's."""

    part: Part | None = None
    at: float = float("-inf")
    ask_again: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    sample_again: float = 0.0


class PeerStates:
    """See the module."""

    def __init__(self, mesh: Mesh, pages: MeshPages) -> None:
        self._mesh = mesh
        self._pages = pages
        self._heard: dict[str, _Heard] = {}
        self._lock = trio.Lock()

    async def refresh(self) -> None:
        """Ask whom it is time to ask. Returns within two seconds."""
        async with self._lock:
            now = trio.current_time()
            peers = [peer for peer in self._mesh.peers if peer.alive]
            nodes = {peer.node for peer in self._mesh.peers}
            self._heard = {node: heard for node, heard in self._heard.items() if node in nodes}
            limit = trio.CapacityLimiter(_AT_ONCE)
            with trio.move_on_after(_LONGEST):
                async with trio.open_nursery() as nursery:
                    for peer in peers:
                        heard = self._heard.setdefault(peer.node, _Heard())
                        if now >= heard.ask_again:
                            nursery.start_soon(self._ask, peer, heard, limit, len(peers))

    async def _ask(self, peer: Peer, heard: _Heard, limit: trio.CapacityLimiter, peers: int) -> None:
        async with limit:
            part = await self._call(peer, STATE, b"{}", _parts.decode)
            now = trio.current_time()
            if part is None:
                heard.ask_again = now + _PAUSE
                return
            heard.part, heard.at = part, now
            # Half of it, so that a look each second finds it due each time.
            heard.ask_again = now + _FRESH_SECONDS * max(0.5, peers / _AT_ONCE)
            if now >= heard.sample_again:
                heard.sample_again = now + STEP
                answer = await self._call(peer, HISTORY, b"{}", _samples.decode)
                if answer is not None:
                    heard.samples = answer.samples[-STEPS:]

    async def _call(
        self, peer: Peer, path: str, body: bytes, decode: Callable[[bytes], T], seconds: float = _PATIENCE
    ) -> T | None:
        # The mesh's modules are loaded by now; a node alone never comes here.
        from llamesh.mesh.calls import call

        try:
            status, data = await call(peer.links, "POST", path, body, seconds=seconds)
            if status != 200 or len(data) > _MOST_BYTES:
                log.debug("no state", peer=peer.node, path=path, status=status, bytes=len(data))
                return None
            return decode(data)
        except (UpstreamBroken, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.debug("no state", peer=peer.node, path=path, error=str(error))
            return None

    # What is known.

    def others(self) -> Iterator[Other]:
        """All other nodes."""
        now = trio.current_time()
        for node, entry in self._pages.nodes().items():
            peer = self._mesh.peers.get(node)
            heard = self._heard.get(node, _Heard())
            offers = tuple(peer.offers.values()) if peer is not None else ()
            fresh = now - heard.at < _FRESH_SECONDS + _PAUSE
            yield Other(node, entry, offers, heard.part, fresh)

    def rings(self) -> Iterator[list[Sample]]:
        """Their last hours."""
        for heard in self._heard.values():
            yield heard.samples

    def findings(self) -> Iterator[Finding]:
        """What is wrong with them, seen from here."""
        for node, entry in self._pages.nodes().items():
            yield from _findings(node, entry)

    # Acts and questions.

    async def cancel(self, id: str) -> str:  # noqa: A002
        """Have the peer that has it end a request; who did, "" when nobody knows it. Raises Forbidden when
        one that has it doesn't let us.
        """
        from llamesh.mesh.calls import call

        body = msgspec.json.encode(Wanted(id))
        found: list[str] = []
        refused: list[str] = []

        async def ask(peer: Peer) -> None:
            try:
                status, data = await call(peer.links, "POST", CANCEL, body, seconds=_PATIENCE)
                if status == 200:
                    found.append(peer.node)
                elif status == 403:
                    refused.append(str(msgspec.json.decode(data)["error"]["message"])[:2000])
            except (UpstreamBroken, ValueError, LookupError, TypeError) as error:
                log.debug("can't cancel", peer=peer.node, error=str(error))

        async with trio.open_nursery() as nursery:
            for peer in self._mesh.peers:
                if peer.alive:
                    nursery.start_soon(ask, peer)
        if refused and not found:
            raise Forbidden(refused[0])
        return found[0] if found else ""

    async def records(self, id: str, nodes: frozenset[str] | None) -> list[Request]:  # noqa: A002
        """The records that peers have of a request; `nodes`: only these are asked, None: all."""
        body = msgspec.json.encode(Wanted(id))
        found: list[Request] = []

        async def ask(peer: Peer) -> None:
            told = await self._call(peer, REQUEST, body, _told.decode)
            if told is not None:
                found.extend(msgspec.structs.replace(one, seen_by=peer.node) for one in told.records[:8])

        async with trio.open_nursery() as nursery:
            for peer in self._mesh.peers:
                if peer.alive and (nodes is None or peer.node in nodes):
                    nursery.start_soon(ask, peer)
        return found

    async def ask_one(self, node: str, path: str, body: bytes) -> bytes | None:
        """One question to one peer; None when it isn't there or doesn't answer."""
        peer = self._mesh.peers.get(node)
        if peer is None or not peer.alive:
            return None
        return await self._call(peer, path, body, bytes, seconds=2 * _PATIENCE)


def _findings(node: str, entry: dict[str, Any]) -> Iterator[Finding]:
    version, link = entry.get("version"), entry.get("link") or {}
    if version and version != llamesh.__version__:
        yield Finding(
            "warning",
            "version_skew",
            node,
            f"node {node} runs version {version}, this node {llamesh.__version__}",
            "update the older one: nodes of two versions work together, but only as well as the older can",
        )
    if entry.get("status") == "suspect":
        text = f"node {node} doesn't answer; the others are being asked about it"
        yield Finding("warning", "peer_silent", node, text, "wait a few seconds, then look at that machine")
    elif entry.get("status") == "alive" and not link.get("direct"):
        problem = f" ({link['problem']})" if link.get("problem") else ""
        text = f"node {node} can't be reached directly{problem}: requests to it take a detour, if any way"
        yield Finding("warning", "no_link", node, text, "open a port of one of the two nodes to the other")
    if link.get("breaker") == "open":
        text = f"node {node} broke several requests, and isn't asked for a while"
        yield Finding("warning", "breaker_open", node, text, "look at that node's log and its events")
