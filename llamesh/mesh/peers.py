"""All other nodes, and what the router asks about them: who has a model, how busy it is there, a seat.

What a node offers comes from its gossiped state, how busy it is from its answers to probes and
requests, who is alive from the membership. Nothing here waits.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

import trio

from llamesh.config.cookbook import Elsewhere, Profile
from llamesh.core.breaker import Ticket
from llamesh.core.cost import Outlook, trust_in
from llamesh.core.offers import (
    NODE_KEY,
    NodeEntry,
    Offer,
    decode_entry,
    decode_situation,
)
from llamesh.mesh.absent import Absent
from llamesh.mesh.peer import Peer
from llamesh.net.exchange import UpstreamBroken, UpstreamConnection

# A machine that was woken over the network answers after about this long.
_WAKE_MS = 30_000.0

# Of a node that can be reached only through a third one: the request takes two links, and their load.
_DETOUR_MS = 5.0

# Third nodes that are tried for what isn't a request for inference.
_MOST_DETOURS = 3


class Seat:
    """A forward in flight. It goes to `target`, by way of `via` where that is another node."""

    __slots__ = ("_key", "_peers", "_ticket", "target", "via")

    def __init__(self, peers: Peers, target: Peer, via: Peer, key: str, ticket: Ticket) -> None:
        self._peers = peers
        self._key = key
        self._ticket = ticket
        self.target = target
        self.via = via
        target.in_flight[key] += 1
        target.forwards += 1

    @property
    def node(self) -> str:
        """The peer that is to serve."""
        return self.target.node

    @property
    def first_hop(self) -> str:
        """Where it is sent."""
        return self.via.node

    @property
    def model(self) -> str:
        """The profile, as the peer calls it."""
        return self._key

    @property
    def asleep(self) -> bool:
        """Whether the machine has to be woken."""
        return not self.target.alive and self.target.wake_mac is not None

    async def wake(self) -> None:
        """Have the machine woken, and return when it has joined. Raises UpstreamBroken."""
        await self._peers.wake(self.target)

    async def connect(self, *, fresh: bool) -> UpstreamConnection:
        """A connection to the peer, or to the node that leads to it. Raises UpstreamBroken."""
        if self.asleep:
            await self.wake()
        if not self.via.alive:
            raise UpstreamBroken(f"node {self.via.node} has left or is suspected to have", started=False)
        return await self.via.links.take(fresh=fresh)

    def hear(self, situation: bytes) -> None:
        """What the peer says of itself in a reply."""
        heard = decode_situation(situation)
        if heard is not None and self.via is self.target:
            self.target.note_situation(self._key, heard)

    def leave(self, connection: UpstreamConnection | None, *, complete: bool, failed: bool) -> None:
        """The forward has ended."""
        target, key, now = self.target, self._key, trio.current_time()
        target.in_flight[key] -= 1
        if not target.in_flight[key]:
            del target.in_flight[key]
        if connection is not None:
            if complete:
                self.via.links.keep(connection)
            else:
                self.via.links.close(connection)
        if complete:
            target.breaker.success(self._ticket, now)
        elif failed and self.via is target:
            target.lost += 1
            target.breaker.failure(self._ticket, now)
        else:
            target.breaker.cancel(self._ticket)
        self._peers.on_change()


class Peers:
    """See the module. `on_change` is called whenever a choice may come out differently."""

    def __init__(self, make: Callable[[str], Peer], wake: Callable[[Peer], Awaitable[None]]) -> None:
        """`make` makes one that is new; `wake` wakes one that sleeps, and returns when it is there."""
        self.on_change: Callable[[], None] = lambda: None
        self._make = make
        self._wake = wake
        self._peers: dict[str, Peer] = {}
        self._having: dict[str, dict[str, Offer]] = {}  # key in lower case -> node -> offer
        self._names: dict[str, str] = {}  # any name in lower case -> key in lower case
        self._profiles: dict[str, Profile] = {}
        self._fingerprints: dict[str, str] = {}  # key in lower case -> the one to use
        self._absent = Absent()

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, node: str) -> Peer | None:
        """The peer with that id."""
        return self._peers.get(node)

    def of(self, node: str) -> Peer:
        """The same, made when it is new."""
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = self._make(node)
        return peer

    # From the membership.

    def update(self, node: str, state: Mapping[str, bytes]) -> NodeEntry:
        """Its gossiped state is this now; what can't be understood is left out. The node's own entry."""
        peer = self.of(node)
        entry = decode_entry(state[NODE_KEY]) if NODE_KEY in state else None
        peer.entry = entry or peer.entry
        offers = peer.read_offers(state)
        if offers != peer.offers:
            peer.offers = offers
            self._index()
        self.on_change()
        return peer.entry

    def set_alive(self, node: str, alive: bool, *, direct: bool = True) -> None:
        """A verdict of the membership. Who is only suspected gets nothing new, but what is under way there
        goes on: the suspicion may be somebody else's, and a frozen peer is found out by our own probes."""
        peer = self._peers.get(node)
        if peer is None:
            return
        changed = peer.alive != alive
        peer.alive, peer.direct = alive, direct
        if changed:
            self.on_change()

    def forget(self, node: str, *, left: bool = False) -> None:
        """It left, or is dead for good: it isn't listed any more, unless it only sleeps. Connections with it
        are closed, so that whoever waits there learns. What only it had is waited for where it `left`."""
        peer = self._peers.get(node)
        if peer is None:
            return
        peer.alive = False
        peer.links.close_all()
        if not peer.wake_mac and peer.offers:
            had = [(name, self.find(name)) for offer in peer.offers.values() for name in _names_of(offer)]
            peer.offers = {}
            self._index()
            gone = [(name, one) for name, one in had if one is not None and name not in self._names]
            if left:
                self._absent.note(node, gone, trio.current_time())
        self.on_change()

    def discard(self, node: str) -> bool:
        """Nobody knows it any more: drop all there is of it, unless something still uses it."""
        peer = self._peers.get(node)
        if peer is None or peer.alive or peer.in_flight or peer.wake_mac or len(peer.links):
            return False
        del self._peers[node]
        if peer.offers:
            self._index()
        return True

    def _index(self) -> None:
        having: dict[str, dict[str, Offer]] = {}
        names: dict[str, str] = {}
        for peer in self._peers.values():
            for key, offer in peer.offers.items():
                having.setdefault(key, {})[peer.node] = offer
                for name in _names_of(offer):
                    names.setdefault(name, key)
        self._having = having
        self._names = names
        self._profiles = {}
        # What was used is used on while anybody has it: clients compare embeddings over days.
        self._fingerprints = {
            key: chosen for key, offers in having.items() if (chosen := self._choose_fingerprint(key, offers))
        }

    def _choose_fingerprint(self, key: str, offers: Mapping[str, Offer]) -> str:
        counts = Counter(offer.fingerprint for offer in offers.values() if offer.runs)
        before = self._fingerprints.get(key, "")
        return before if before in counts else min(counts, key=lambda one: (-counts[one], one), default="")

    # For the router.

    def has(self, key: str) -> bool:
        """See `Peers` of dispatch.router."""
        return key.casefold() in self._having

    def find(self, name: str) -> Profile | None:
        """See `Peers` of dispatch.router."""
        key = self._names.get(name.casefold())
        if key is None:
            return self._absent.find(name, trio.current_time())
        profile = self._profiles.get(key)
        if profile is None:
            offer = next(iter(self._having[key].values()))
            profile = self._profiles[key] = Profile(
                model=offer.model,
                id=offer.profile,
                model_description=offer.description,
                description=offer.profile_description,
                source=Elsewhere(),
                kind=offer.kind,
                idle_timeout_seconds=offer.idle_timeout_seconds,
                max_instances=0,
            )
        return profile

    def aliases_of(self, key: str) -> Iterator[str]:
        """See `Peers` of dispatch.router."""
        for offer in self._having.get(key.casefold(), {}).values():
            yield from offer.aliases

    def offered(self) -> Iterator[tuple[str, dict[str, Offer]]]:
        """Every profile of the peers: its key in lower case, and who offers it."""
        yield from self._having.items()

    def outlooks(
        self,
        key: str,
        excluded: Collection[str],
        fingerprint: str | None = None,
        usual_load_ms: float = 0.0,
    ) -> list[Outlook]:
        """The peers that could take a request for "model:profile" now. `fingerprint`: only equal ones;
        `usual_load_ms`: what a load takes where that isn't known of the peer itself, 0 = unknown.
        """
        now = trio.current_time()
        found = []
        for node, offer in self._having.get(key.casefold(), {}).items():
            peer = self._peers[node]
            if node in excluded or not offer.runs or not peer.breaker.allows(now):
                continue
            if fingerprint and offer.fingerprint != fingerprint:
                continue
            via = self._way_to(peer, excluded)
            if via is None or (peer.alive and peer.closed):
                continue
            found.append(_outlook(peer, via, offer, usual_load_ms))
        return found

    def fingerprint(self, key: str) -> str:
        """What most nodes run, of equals the least; from then on always the same."""
        return self._fingerprints.get(key.casefold(), "")

    def seat(self, node: str, key: str, excluded: Collection[str] = ()) -> Seat | None:
        """See `Peers` of dispatch.router."""
        peer = self._peers.get(node)
        via = self._way_to(peer, excluded) if peer is not None else None
        if peer is None or via is None:
            return None
        ticket = peer.breaker.ask(trio.current_time())
        if ticket is None:
            return None
        offer = peer.offers.get(key.casefold())
        return Seat(self, peer, via, offer.key if offer is not None else key, ticket)

    def explain(self, key: str, excluded: Collection[str] = ()) -> str:
        """See `Peers` of dispatch.router."""
        now = trio.current_time()
        reasons = []
        if not self.has(key):
            return self._absent.explain(key, now)
        for node, offer in self._having.get(key.casefold(), {}).items():
            if node in excluded or not offer.runs:
                continue
            peer = self._peers[node]
            if not peer.alive:
                why = "is asleep or not reachable"
            elif self._way_to(peer, excluded) is None:
                why = f"can't be reached from here ({peer.links.problem or 'no connection'})"
            elif not peer.breaker.allows(now):
                why = f"failed a moment ago ({peer.breaker.text(now)})"
            else:
                why = peer.closed or "can't take it now"
            reasons.append(f"node {node} {why}")
        return "; ".join(reasons[:8])

    async def wake(self, peer: Peer) -> None:
        """Have a sleeping machine woken, and return when it has joined. Raises UpstreamBroken."""
        await self._wake(peer)

    def _way_to(self, peer: Peer, excluded: Collection[str]) -> Peer | None:
        """The peer itself, a third node that reaches it, or None."""
        if not peer.alive:
            return peer if peer.wake_mac else None
        if peer.direct and peer.links.reachable:
            return peer
        return next(self._detours(peer, excluded), peer if peer.links.reachable else None)

    def ways_to(self, peer: Peer) -> list[Peer]:
        """Whom to give what is meant for the peer, the best first: itself, or third nodes that reach it."""
        own = [peer] if peer.links.reachable else []
        thirds = [*itertools.islice(self._detours(peer, ()), _MOST_DETOURS)]
        return [*own, *thirds] if peer.direct else [*thirds, *own]

    def _detours(self, peer: Peer, excluded: Collection[str]) -> Iterator[Peer]:
        for other in self._peers.values():
            if other is peer or other.node in excluded or not (other.alive and other.direct):
                continue
            if other.links.reachable and peer.node not in other.entry.cut:
                yield other


def _names_of(offer: Offer) -> Iterator[str]:
    """What it can be asked for by, in lower case."""
    for model in (offer.model, *offer.aliases):
        yield f"{model}:{offer.profile}".casefold()
        if offer.profile.casefold() == "default":
            yield model.casefold()


def _outlook(peer: Peer, via: Peer, offer: Offer, usual_load_ms: float) -> Outlook:
    """The peer as a candidate: what it told last about others' requests, and our own as they are now."""
    situation = peer.situation(offer.key)
    # What the peer tells us leaves our own requests out, so the two add up whenever that was.
    busy = min(situation.slots, situation.others)
    return Outlook(
        node=peer.node,
        link_ms=via.rtt_ms if via is peer else via.rtt_ms * 2 + _DETOUR_MS,
        ready_slots=situation.slots,
        busy=busy,
        queued=situation.others - busy,
        sent=peer.in_flight.get(offer.key, 0),
        loading_left_ms=situation.loading_left_ms,
        loading_slots=situation.loading_slots,
        load_ms=None if situation.room_ms is None else offer.load_ms or usual_load_ms,
        room_ms=situation.room_ms or 0.0,
        download_ms=situation.download_ms,
        wake_ms=0.0 if peer.alive else _WAKE_MS,
        slots_per_instance=offer.n_slots,
        service_ms=offer.service_ms,
        prefill_ms_per_token=offer.prefill_ms,
        decode_ms_per_token=offer.decode_ms,
        sharing=offer.sharing,
        n_ctx=offer.context_length,
        failing=situation.failing,
        trust=trust_in(offer.requests),
    )
