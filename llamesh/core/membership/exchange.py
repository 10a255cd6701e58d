"""What one message of an exchange is answered with, section by section.

    they sent            we answer with
    root                 nothing if ours is the same; hashes of buckets; in a small mesh digests at once
    hashes               digests of the buckets that differ
    digests              deltas of what they lack, want for what we lack, corrections of lives
    want                 deltas
    more                 digests of the same buckets, as they are by now

Nothing is remembered between two messages: what a reply needs is in the message. No section leads back to an
earlier one unless something was cut, and the number of messages is bounded. Where buckets are left over
(`rest`), the exchange begins again at its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec

from llamesh.core.membership.digest import bits_for
from llamesh.core.membership.messages import Deletion, Delta, Digest, LifeOf, Message, Want, Write
from llamesh.core.membership.records import Life, Rank, Record
from llamesh.core.membership.table import Table

# What JSON adds to the texts in it, generously: brackets, commas, numbers of up to 16 digits.
_DELTA_FRAME = 96
_ENTRY_FRAME = 24
_DIGEST_FRAME = 64
_HEAD = 1024  # head, root, buckets
_LIFE_FRAME = 64


@dataclass(slots=True)
class Sections:
    """The part of a message that an exchange fills."""

    root: str | None = None
    hashes: str | None = None
    bits: int = 0
    buckets: list[int] = field(default_factory=list)
    digests: list[Digest] | None = None
    want: list[Want] = field(default_factory=list)
    deltas: list[Delta] = field(default_factory=list)
    lives: dict[str, Life] = field(default_factory=dict)
    more: bool = False
    rest: bool = False

    @property
    def scoped(self) -> bool:
        """Whether it has to say which buckets it speaks of."""
        return bool(self.hashes is not None or self.digests is not None or self.want or self.more)

    def __bool__(self) -> bool:
        return bool(
            self.hashes is not None
            or self.digests is not None
            or self.want
            or self.deltas
            or self.lives
            or self.more
        )


def opening(table: Table) -> Sections:
    """How an exchange begins, and how one goes on that is done with some buckets."""
    return Sections(root=table.index.root_text)


def respond(table: Table, message: Message) -> Sections:
    """The sections that answer a message whose news was merged already."""
    out = Sections(bits=message.bits, buckets=list(dict.fromkeys(message.buckets)), rest=message.rest)
    budget = table.options.message_budget - _HEAD
    lacking: dict[str, int] = {}  # whose entries they lack -> the version after which
    if message.root is not None and message.root != table.index.root_text:
        out.bits = bits_for(max(table.index.count, min(message.n, table.options.max_members)))
        if out.bits:
            out.hashes = table.index.buckets(out.bits)
        else:
            _add_digests(table, out, [0], budget // 2)
    elif message.hashes is not None:
        _add_digests(table, out, table.index.differing(message.bits, message.hashes), budget // 2)
    elif message.more and message.buckets:
        _add_digests(table, out, out.buckets, budget // 2)
    if message.digests is not None:
        budget -= _compare(table, message, out, lacking, budget // 4)
    for want in message.want:
        record = table.records.get(want.id)
        if record is not None and record.told and want.epoch <= record.life.epoch:
            lacking.setdefault(want.id, want.version if want.epoch == record.life.epoch else 0)
    if out.digests is not None:
        budget -= budget // 2
    _add_deltas(table, out, lacking.items(), budget)
    return out


def _add_digests(table: Table, out: Sections, buckets: Iterable[int], room: int) -> None:
    """As many whole buckets as there is room for; one at least, so that every exchange gets on."""
    out.digests, out.buckets = [], []
    for bucket in buckets:
        part = []
        for node_id in table.index.ids(out.bits, bucket):
            record = table.records[node_id]
            if record.told or record.life.gone:
                epoch, incarnation, rank = record.life
                part.append(Digest(node_id, epoch, incarnation, record.version, rank))
        cost = sum(len(one.id) + _DIGEST_FRAME for one in part)
        if out.buckets and cost > room:
            out.rest = True
            break
        room -= cost
        out.buckets.append(bucket)
        out.digests += part


def _compare(table: Table, message: Message, out: Sections, lacking: dict[str, int], room: int) -> int:
    """Both sides of what digests and our records differ in. Returns the bytes used, `room` at most."""
    theirs = {one.id: one for one in message.digests or ()}
    left = room
    for digest in theirs.values():
        if left < _DIGEST_FRAME + 64:
            out.more = True
            break
        record = table.records.get(digest.id)
        rank = Rank.DEAD if digest.rank >= Rank.DEAD else Rank.ALIVE
        if record is None or record.life.epoch < digest.epoch:
            # 1. A life that we don't know: it comes with its state. Strangers' deaths are nobody's news.
            if rank is Rank.ALIVE:
                out.want.append(Want(digest.id, digest.epoch, 0))
                left -= len(digest.id) + _DIGEST_FRAME
            continue
        life, epoch, version = record.life, digest.epoch, digest.version
        # 2. They don't know how it ended, or that it was refuted.
        if life.gone or life.epoch == epoch:
            claimed = (epoch, digest.incarnation, digest.rank)
            if life > claimed and not (life.gone and rank is Rank.DEAD):
                out.lives[digest.id] = life
                left -= len(digest.id) + _LIFE_FRAME
        if life.gone or rank is Rank.DEAD:
            continue
        # 3. Entries.
        if life.epoch > epoch:
            if record.told:
                lacking[digest.id] = 0
        elif record.version > version:
            lacking[digest.id] = version
        elif record.version < version:
            out.want.append(Want(digest.id, epoch, record.version))
            left -= len(digest.id) + _DIGEST_FRAME
    for bucket in out.buckets if message.digests is not None else ():
        if bucket in message.buckets:
            for node_id in table.index.ids(message.bits, bucket):
                if node_id not in theirs and table.records[node_id].told:
                    lacking[node_id] = 0
    return room - left


def _add_deltas(table: Table, out: Sections, lacking: Iterable[tuple[str, int]], room: int) -> None:
    """Whole nodes as far as they fit, and of the first one whatever fits."""
    for node_id, after in lacking:
        delta, cost, whole = delta_of(table.records[node_id], after, room if not out.deltas else None)
        if cost > room and out.deltas:
            out.more = True
            continue
        room -= cost
        out.deltas.append(delta)
        out.more = out.more or not whole


def delta_of(record: Record, after: int, room: int | None) -> tuple[Delta, int, bool]:
    """What came after a version, its bytes on the wire or a little more, and whether that is all.

    With `room` it is cut to that many bytes; one entry is always in it.
    """
    cost, last = len(record.id) + _DELTA_FRAME, after
    upto, whole = record.version, True
    writes: list[Write] = []
    deletions: list[Deletion] = []
    for key, entry in record.after(after):
        size = len(msgspec.json.encode(key)) + len(entry.value or b"") + _ENTRY_FRAME
        if room is not None and cost + size > room and (writes or deletions):
            upto, whole = last, False
            break
        cost, last = cost + size, entry.version
        if entry.value is None:
            deletions.append(Deletion(key, entry.version))
        else:
            writes.append(Write(key, entry.version, msgspec.Raw(entry.value)))
    epoch, incarnation, _ = record.life
    return Delta(record.id, epoch, incarnation, Rank.ALIVE, after, upto, writes, deletions), cost, whole


def lives_of(pairs: Iterable[tuple[str, Life]]) -> list[LifeOf]:
    """Lives as a message has them."""
    return [LifeOf(node_id, *life) for node_id, life in pairs]
