"""One other node, as this node knows it: where it is, how well it does, and what it has to offer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping

import trio

from llamesh.config.sections import CircuitBreaker
from llamesh.config.values import Address
from llamesh.core.breaker import Breaker
from llamesh.core.offers import IDLE, OFFER_PREFIX, News, NodeEntry, Offer, Situation, decode_offer
from llamesh.mesh.links import Links
from llamesh.mesh.noise_transport import NoiseTransport

# Weight of the newest round trip in the mean.
_NEWEST = 0.2

# News that is older says nothing about load any more; the peer then counts as idle, and its answer to the
# next request tells the truth.
_NEWS_SECONDS = 30.0

# Where it may be dialled, of all that was ever heard; the newest count.
_MOST_ADDRESSES = 24


class Peer:
    """See the module. `alive`: a living, unsuspected member of the mesh; `in_flight`: forwards of ours by
    "model:profile" as the peer writes it."""

    def __init__(
        self,
        node: str,
        dial: Callable[[Peer], Awaitable[NoiseTransport]],
        breaker: CircuitBreaker,
        session_ttl: float,
    ) -> None:
        self.node = node
        self.alive = False
        self.direct = True
        self.entry = NodeEntry()
        self.offers: dict[str, Offer] = {}  # by key in lower case
        self._read: dict[str, tuple[bytes, Offer | None]] = {}  # decoded already, by key of the state
        self.news = News()
        self.news_at = -math.inf
        self._told_at: dict[str, float] = {}  # about single profiles, with replies, since the news
        self.rtt_ms = 0.0
        self.failed_probes = 0
        self.in_flight: Counter[str] = Counter()
        self.forwards = self.lost = 0
        self.wake_mac: str | None = None
        self.breaker = Breaker(breaker)
        self.links = Links(node, lambda: dial(self), session_ttl)
        self._addresses: dict[Address, None] = {}

    def __repr__(self) -> str:
        state = "alive" if self.alive else "not alive"
        return (
            f"<Peer {self.node} {state}, {len(self.links)} links, {sum(self.in_flight.values())} in flight>"
        )

    def read_offers(self, state: Mapping[str, bytes]) -> dict[str, Offer]:
        """What its gossiped state offers, by key in lower case; what can't be understood is left out. Most
        updates leave most entries as they were, and those aren't decoded again.
        """
        before, self._read = self._read, {}
        for key, value in state.items():
            if key.startswith(OFFER_PREFIX):
                known = before.get(key)
                same = known is not None and known[0] == value
                self._read[key] = known if same and known is not None else (value, decode_offer(value))
        return {offer.key.casefold(): offer for _, offer in self._read.values() if offer is not None}

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where to dial it: first where it answered before, then what it says itself, then hearsay."""
        return tuple(self._addresses)

    def learn_addresses(self, addresses: Iterable[Address], *, first: bool = False) -> None:
        """Take in where it may be. `first`: it has answered there."""
        new = dict.fromkeys(addresses)
        known = self._addresses
        strange = [address for address in new if address not in known]
        if strange and len(known) < _MOST_ADDRESSES:
            self.links.try_again()
        merged = {**new, **known} if first else {**known, **new}
        # Too many: the newest hearsay is the first to be left out, but not the place where it answered.
        self._addresses = dict.fromkeys(list(merged)[:_MOST_ADDRESSES])

    def set_addresses(self, own: Iterable[Address], known_good: Iterable[Address]) -> None:
        """What it says itself replaces what it said before."""
        good, before = set(known_good), self._addresses
        own = tuple(own)
        self._addresses = dict.fromkeys([a for a in before if a in good or a in own])
        self.learn_addresses(own)

    def note_rtt(self, seconds: float) -> None:
        """A probe was answered."""
        new = seconds * 1000
        self.rtt_ms = new if not self.rtt_ms else self.rtt_ms + _NEWEST * (new - self.rtt_ms)

    def note_news(self, news: News) -> None:
        """The answer to a probe."""
        self.news, self.news_at = news, trio.current_time()
        self._told_at.clear()

    def note_situation(self, key: str, situation: Situation) -> None:
        """What came with a reply: newer than the news, about one profile."""
        self.news.profiles[key] = situation
        self._told_at[key] = trio.current_time()

    def situation(self, key: str) -> Situation:
        """The last word about a profile."""
        if trio.current_time() - max(self.news_at, self._told_at.get(key, -math.inf)) > _NEWS_SECONDS:
            return IDLE
        return self.news.profiles.get(key, IDLE)

    @property
    def closed(self) -> str:
        """Why it takes no requests of others, as far as is known; "" when it does."""
        return "" if trio.current_time() - self.news_at > _NEWS_SECONDS else self.news.closed
