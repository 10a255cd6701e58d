"""One node's view of the mesh, and the messages that keep it true. See the package for how it works.

Each method takes what happened and returns what to do; nothing waits and nothing is sent from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from llamesh.core.membership.events import Event
from llamesh.core.membership.exchange import Sections, lives_of, opening, respond
from llamesh.core.membership.messages import (
    FORMAT,
    MAX_EPOCH,
    BadMessage,
    Message,
    You,
    check_id,
    decode,
    encode,
    me_of,
)
from llamesh.core.membership.options import Options
from llamesh.core.membership.records import Life, Rank
from llamesh.core.membership.table import Member
from llamesh.core.membership.targets import MAX_EXTRA, Chance, Targets
from llamesh.core.membership.view import View

# Between two rounds: more of them and we were asleep, or the clock was set.
ASLEEP_INTERVALS = 5


@dataclass(frozen=True, slots=True)
class Round:
    """What to do in one round: messages to members, and members to probe."""

    gossip: tuple[tuple[str, bytes], ...]
    probes: tuple[str, ...]


class Membership:
    """See the package. `now` is in seconds of any clock, always the same one.

    `me`: our node id. `epoch`: Unix milliseconds of this start. `chance`: a `random.Random`, or whatever is
    like it. Raises ValueError for an id or an epoch that others would refuse.
    """

    def __init__(self, me: str, epoch: int, options: Options, chance: Chance) -> None:
        check_id(me)
        if not 0 <= epoch < MAX_EPOCH:
            raise ValueError(f"an epoch is Unix time in ms, from 0 to {MAX_EPOCH}: {epoch}")
        self.me = me
        self._options = options
        self._counters: Counter[str] = Counter()
        self._view = View(me, epoch, options, self._counters)
        self._table, self._detector = self._view.table, self._view.detector
        self._targets = Targets(self._view, chance)
        self._in_use: tuple[str, ...] = ()
        self._woke = -1  # the round in which we found that we had slept
        self._last: float | None = None  # `now` of the last round

    # What we say.

    def set(self, key: str, value: bytes | None) -> None:
        """Write one of our own entries: JSON text, or None to delete it. The same again is no news.

        Raises ValueError for a key or a value that others would refuse, and when the limits of `Options`
        leave no room for it.
        """
        self._view.write(key, value)

    def leave(self, now: float) -> bytes:
        """Say aloud that we leave: a message for as many members as can be told. Replies don't matter.

        Rounds are empty from here on.
        """
        self._table.now = now
        own = self._table.own
        self._table.own = replace(own, life=own.life._replace(rank=Rank.LEFT))
        return self._write(None, Sections(), 0)

    @property
    def left(self) -> bool:
        """Whether `leave` was called."""
        return self._table.own.life.gone

    # Rounds.

    def introduce(self, node_id: str) -> None:
        """There is a connection with this node: write to it, known or not, even when it is thought dead."""
        if node_id != self.me and self._table.live(node_id) is None:
            self._view.expect(node_id)

    def use(self, ids: Iterable[str]) -> None:
        """Members whose death must be noticed soon, since work is under way there: probed each round."""
        self._in_use = tuple(dict.fromkeys(ids))[:MAX_EXTRA]

    def start_round(self, now: float) -> Round:
        """One round, to be called each `Options.interval`: whom to write to, whom to probe.

        Each probe's outcome goes to `probe_result`; it should be known within half an interval.
        """
        self._pass_time(now)
        self._view.round += 1
        self._table.expire()
        if self.left:
            return Round((), ())
        probes = self._targets.to_probe(self._in_use)
        gossip = tuple((one, self._write(one, opening(self._table), 0)) for one in self._targets.to_gossip())
        return Round(gossip, probes)

    def _pass_time(self, now: float) -> None:
        gap = 0.0 if self._last is None else now - self._last
        self._table.now = now
        if self._jumped(now):
            gap = self._options.interval
            self._woke = self._view.round + 1
            for node_id in self._detector.slept():
                self._view.recovered(node_id)
        self._last = now
        self._table.clock += gap

    def _jumped(self, now: float) -> bool:
        """Whether the clock was set or we slept, so that nobody can be blamed for silence."""
        most = ASLEEP_INTERVALS * self._options.interval
        return self._last is not None and not 0 <= now - self._last <= most

    # Probes.

    def probe_result(self, peer: str, ok: bool, now: float) -> tuple[str, ...]:
        """How a probe went. Returns whom to ask to probe this member for us, when it didn't answer.

        If any are returned, tell `indirect_result` once, whether one of them reached it.
        """
        self._table.now = now
        if self._table.live(peer) is None:
            if ok and peer in self._table.graves:
                # Somebody answers there. It has to hear that it is thought dead.
                self._view.expect(peer)
            return ()
        if ok:
            self._view.sign_of_life(peer, reached=True)
            return ()
        if self._jumped(now) or self._woke == self._view.round:
            return ()
        helpers = self._targets.helpers(peer)
        if not (helpers and self._detector.waits(peer)):
            self._view.failed(peer)
        if self._table.live(peer) is None:
            return ()
        if helpers:
            self._detector.asked(peer)
        else:
            self._view.suspicion(peer)
        return helpers

    def indirect_result(self, peer: str, ok: bool, now: float) -> None:
        """Whether any of those whom `probe_result` named reached the member. Once for each time of asking."""
        self._table.now = now
        if self._table.live(peer) is None or self._jumped(now):
            return
        if ok:
            self._view.vouched(peer)
            return
        if not self._detector.direct(peer):
            # Our own probe said nothing; that nobody else reaches it does.
            self._view.failed(peer)
        self._view.suspicion(peer)

    # Messages.

    def answer(self, sender: str, message: bytes, now: float) -> bytes:
        """The reply to a message from `sender`, which proved that it is that node. Raises BadMessage."""
        read = self._read(sender, message, now)
        last = read.s + 1 >= self._options.max_steps
        return self._write(sender, Sections() if last else respond(self._table, read), read.s + 1, read.life)

    def take_reply(self, peer: str, reply: bytes, now: float) -> bytes | None:
        """The next message of an exchange that a round began, None when it is over. Raises BadMessage."""
        before = self._table.own.life
        read = self._read(peer, reply, now)
        if self.left or read.s + 1 >= self._options.max_steps:
            return None
        sections = respond(self._table, read)
        if not sections and read.rest:
            sections = opening(self._table)
        # A refutation shall be heard by the one who needs it, even when there is nothing else to say.
        elif not sections and self._table.own.life == before:
            return None
        return self._write(peer, sections, read.s + 1, read.life)

    def _read(self, sender: str, data: bytes, now: float) -> Message:
        """Decode and check all of it; then count it and take what is new."""
        try:
            message = decode(data)
            if sender == self.me:
                raise BadMessage(f"a gossip message from {sender}, which is this node")
            check_id(sender)
        except (BadMessage, ValueError) as error:
            self._counters["refused.message"] += 1
            raise BadMessage(f"{sender!r:.80}: {error}") from None
        self._count("in", message.kind, len(data))
        self._table.now = now
        self._view.read(sender, message)
        return message

    def _write(self, peer: str | None, sections: Sections, step: int, said: Life | None = None) -> bytes:
        """A message to a peer, or to everybody. `said`: the life with which the peer presented itself."""
        own, table = self._table.own, self._table
        lives: dict[str, Life] = {}
        if peer is not None:
            lives.update(self._view.rumours.take(self._options.max_rumours, len(table.others) + 1))
        lives.update(sections.lives)
        message = Message(
            v=FORMAT,
            s=step,
            me=me_of(own.life, own.version),
            you=None if peer is None else self._you(peer, said),
            lives=lives_of(lives.items()),
            root=sections.root,
            n=table.index.count if sections.root is not None else 0,
            bits=sections.bits if sections.scoped else 0,
            hashes=sections.hashes,
            buckets=sections.buckets if sections.scoped else [],
            digests=sections.digests,
            want=sections.want,
            deltas=sections.deltas,
            more=sections.more,
            rest=sections.rest,
        )
        data = encode(message)
        self._count("out", message.kind, len(data))
        return data

    def _you(self, peer: str, said: Life | None) -> You | None:
        """What we think of a peer, where that isn't what it says of itself."""
        record = self._table.records.get(peer)
        if record is None:
            return None
        thought = record.life
        if self._detector.suspect(peer) and not thought.gone:
            thought = thought._replace(rank=Rank.SUSPECT)
        thought = max(thought, self._detector.take_told(peer) or thought)
        return You(*thought) if thought > (said or record.life._replace(rank=Rank.ALIVE)) else None

    def _count(self, way: str, kind: str, size: int) -> None:
        self._counters[f"{way}.{kind}.messages"] += 1
        self._counters[f"{way}.{kind}.bytes"] += size

    # What there is to see.

    def members(self) -> Mapping[str, Member]:
        """Everybody that is known, ourselves too: a snapshot that doesn't change."""
        return self._table.members(self._opinion)

    def _opinion(self, node_id: str) -> tuple[bool, bool]:
        return self._detector.suspect(node_id), self._detector.direct(node_id)

    def remembered(self, node_id: str) -> Mapping[str, bytes]:
        """What a node said of itself before it died or left, as long as it is known at all.

        For its addresses, since the dead are knocked at. Nothing in it is true any more.
        """
        record = self._table.records.get(node_id)
        return MappingProxyType(record.state() if record is not None else {})

    def take_events(self) -> list[Event]:
        """What happened since the last time, in order."""
        events = list(self._table.events)
        self._table.events.clear()
        return events

    @property
    def root(self) -> str:
        """Hash over everything alive: equal on nodes that know the same. 16 hexadecimal digits."""
        return self._table.index.root_text

    @property
    def counters(self) -> Mapping[str, int]:
        """`in.KIND.messages`, `in.KIND.bytes`, the same for `out`; `refused.WHAT`, `refuted`, `events_lost`.

        Kinds are root, hashes, digests, deltas, end and leave. What may be refused: a message, members and
        state beyond the limits, an epoch that can't be outdone.
        """
        return MappingProxyType(self._counters)

    def __repr__(self) -> str:
        own = self._table.own
        others = ", ".join(
            f"{one.id} {one.status} {one.epoch}.{one.incarnation} v{one.version}"
            + " indirect" * (not one.direct)
            for _, one in sorted(self.members().items())
            if one.id != self.me
        )
        return f"<{self.me} {own.life.epoch}.{own.life.incarnation} v{own.version} {self.root[:6]}: {others}>"
