"""Rounds: what this node says, whom it asks, and what it answers when others do the same.

    each round   own entries into the membership; gossip with some members, probe some, act on what that shows
    requests     `answer` the mesh's own routes of peers

Decisions are the membership's (`core.membership`); this carries them out. Whatever a peer does wrong ends
one exchange with it, and is said now and then. A defect on this side is logged and ends one task, not the
mesh.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping

import trio

from llamesh.core.membership import BadMessage, Membership
from llamesh.core.offers import News, decode_news, encode
from llamesh.errors import InvalidRequest
from llamesh.mesh.calls import call
from llamesh.mesh.mentions import Mentions
from llamesh.mesh.peer import Peer
from llamesh.mesh.peers import Peers
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# So many failed probes in a row end what is in flight to a peer, even when others still reach it.
_CUT_AFTER = 3

_LEAVE_SECONDS = 1.0

# Who leaves tells so many; they tell the others.
_MOST_GOODBYES = 64

# Probes for others that are under way at once.
_MOST_FAVOURS = 32

# On a loaded machine a shorter silence than this means nothing.
_SHORTEST_PATIENCE = 0.25


class Gossip:
    """See the module. Set before `run`: `entries()`, this node's own entries by key; `news(asker)`, how it is
    now; `act()`, called when the membership may have events; `end_round()`, at the end of each round."""

    def __init__(self, membership: Membership, peers: Peers, *, interval: float, at_once: int) -> None:
        """`interval`: seconds between two rounds; `at_once`: exchanges that this node begins."""
        self.entries: Callable[[], Mapping[str, bytes]] = dict
        self.news: Callable[[str], News] = lambda asker: News()
        self.act: Callable[[], None] = lambda: None
        self.end_round: Callable[[], None] = lambda: None
        self.patience = max(_SHORTEST_PATIENCE, interval / 2)  # seconds for a probe's answer
        self._membership = membership
        self._peers = peers
        self._interval = interval
        self._limit = trio.CapacityLimiter(at_once)
        self._favours = trio.CapacityLimiter(_MOST_FAVOURS)
        self._mentions = Mentions()
        # Who is silent is asked anew when it was given up, so that questions to it don't pile up.
        self._gossiping: set[str] = set()
        self._probing: set[str] = set()

    async def run(self) -> None:
        """Rounds, for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                start = trio.current_time()
                try:
                    self._round(start, nursery)
                except Exception:
                    self._defect("a round of gossip")
                pause = self._interval * random.uniform(0.9, 1.1)  # noqa: S311
                await trio.sleep_until(start + pause)

    def _round(self, now: float, nursery: trio.Nursery) -> None:
        self._publish()
        self._membership.use(p.node for p in self._peers if p.in_flight and p.alive)
        due = self._membership.start_round(now)
        self.act()
        for node, message in due.gossip:
            if node not in self._gossiping:
                self._gossiping.add(node)
                nursery.start_soon(self._guard, self._gossip, node, message)
        for node in due.probes:
            if node not in self._probing:
                self._probing.add(node)
                nursery.start_soon(self._guard, self._probe, node)
        self.end_round()

    def _publish(self) -> None:
        """Own entries that have changed; the membership sees to it that others hear."""
        try:
            wanted = self.entries()
        except Exception:
            # What was said before goes on being said, and the rest of the mesh goes on.
            self._defect("telling what this node has")
            return
        own = self._membership.members()[self._membership.me].state
        for key in own.keys() - wanted.keys():
            self._membership.set(key, None)
        for key, value in wanted.items():
            if own.get(key) == value:
                continue
            try:
                self._membership.set(key, value)
            except ValueError as error:
                if self._mentions.due(f"own {key}"):
                    log.warning("others can't be told of this", entry=key, problem=str(error))

    async def _guard(self, task: Callable[..., Awaitable[None]], *args: object) -> None:
        try:
            await task(*args)
        except Exception:
            self._defect(f"talking to {args[0]}")

    def _defect(self, during: str) -> None:
        """In an `except`: log it, with its traceback now and then only."""
        if self._mentions.due(f"defect {during}"):
            log.exception("defect", during=during)

    # What we begin.

    async def _gossip(self, node: str, message: bytes | None) -> None:
        peer = self._peers.of(node)
        try:
            async with self._limit:
                while message is not None:
                    seconds = 5 * self.patience
                    status, reply = await call(peer.links, "POST", "/mesh/gossip", message, seconds=seconds)
                    if status != 200:
                        self._trouble(peer, f"it refused gossip with status {status}")
                        break
                    message = self._membership.take_reply(node, reply, trio.current_time())
        except UpstreamBroken as error:
            log.debug("gossip failed", peer=node, error=str(error))
        except BadMessage as error:
            self._trouble(peer, f"its gossip can't be read: {error}")
        finally:
            self._gossiping.discard(node)
        self.act()

    async def _probe(self, node: str) -> None:
        peer = self._peers.of(node)
        began = trio.current_time()
        try:
            status, data = await call(peer.links, "GET", "/mesh/probe", seconds=self.patience)
        except UpstreamBroken as error:
            log.debug("probe failed", peer=node, error=str(error))
            self._probing.discard(node)
            await self._probe_failed(peer)
            return
        finally:
            self._probing.discard(node)
        now = trio.current_time()
        peer.failed_probes = 0
        news = decode_news(data) if status == 200 else None
        if news is None:
            self._trouble(peer, f"it answered a probe with status {status} and what isn't understood")
        else:
            peer.note_rtt(now - began)
            peer.note_news(news)
        self._membership.probe_result(node, True, now)
        self.act()
        self._peers.on_change()

    async def _probe_failed(self, peer: Peer) -> None:
        peer.failed_probes += 1
        if peer.failed_probes % _CUT_AFTER == 0:
            # Alive or not: nothing comes through any more, and who waits had better ask elsewhere.
            peer.links.close_all()
        helpers = self._membership.probe_result(peer.node, False, trio.current_time())
        self.act()
        if not helpers:
            return
        reached = False
        async with trio.open_nursery() as nursery:

            async def ask(helper: Peer) -> None:
                nonlocal reached
                path = f"/mesh/probe/{peer.node}"
                try:
                    status, _ = await call(helper.links, "POST", path, seconds=2 * self.patience)
                except UpstreamBroken as error:
                    log.debug("indirect probe failed", peer=peer.node, by=helper.node, error=str(error))
                    return
                if status == 200:
                    reached = True
                    nursery.cancel_scope.cancel()

            for helper in helpers:
                nursery.start_soon(ask, self._peers.of(helper))
        self._membership.indirect_result(peer.node, reached, trio.current_time())
        self.act()

    async def leave(self) -> None:
        """Say aloud that this node goes; bounded."""
        message = self._membership.leave(trio.current_time())
        there = [peer for peer in self._peers if peer.alive or peer.links]
        random.shuffle(there)
        there.sort(key=lambda peer: not peer.links)  # a dial may take too long
        with trio.move_on_after(_LEAVE_SECONDS):
            async with trio.open_nursery() as nursery:
                for peer in there[:_MOST_GOODBYES]:
                    nursery.start_soon(self._guard, self._say, peer.node, message)

    async def _say(self, node: str, message: bytes) -> None:
        try:
            await call(self._peers.of(node).links, "POST", "/mesh/gossip", message, seconds=_LEAVE_SECONDS)
        except UpstreamBroken as error:
            log.debug("couldn't say goodbye", peer=node, error=str(error))

    # What others begin.

    async def answer(self, peer: str, method: bytes, path: bytes, body: bytes) -> tuple[int, bytes] | None:
        """The mesh's own routes, asked by a peer that has proven who it is. None: there is nothing at that
        path. Raises LlameshError."""
        if path == b"/mesh/probe" and method == b"GET":
            return 200, encode(self._tell(peer))
        if path == b"/mesh/gossip" and method == b"POST":
            try:
                reply = self._membership.answer(peer, body, trio.current_time())
            except BadMessage as error:
                raise InvalidRequest(f"a gossip message that can't be read: {error}") from None
            self.act()
            return 200, reply
        if path.startswith(b"/mesh/probe/") and method == b"POST":
            return await self._probe_for(path.removeprefix(b"/mesh/probe/").decode("latin-1"))
        return None

    def _tell(self, asker: str) -> News:
        try:
            news = self.news(asker)
        except Exception:
            # It lives, and that is what a probe asks; but nobody should send it anything.
            self._defect("telling how this node is")
            news = News(node_id=self._membership.me, closed="it has a defect, see its log")
        known = self._peers.get(asker)
        news.dial_back = known.links.can_dial if known is not None else None
        return news

    async def _probe_for(self, node: str) -> tuple[int, bytes]:
        other = self._peers.get(node)
        if other is None:
            return 404, b"{}"
        try:
            with trio.fail_after(self.patience):
                async with self._favours:
                    await call(other.links, "GET", "/mesh/probe", seconds=self.patience)
        except (UpstreamBroken, trio.TooSlowError):
            return 504, b"{}"
        return 200, b"{}"

    def _trouble(self, peer: Peer, what: str) -> None:
        if self._mentions.due(f"{peer.node} {what}"):
            log.warning("trouble with a peer", peer=peer.node, problem=what)
