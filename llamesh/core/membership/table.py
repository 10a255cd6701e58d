"""Everybody that is known: the records, their index of hashes, the tombstones, and what changed.

All changes of a record go through `_put`, which keeps the index and says what happened.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from llamesh.core.membership.digest import Index
from llamesh.core.membership.events import Died, Event, Joined, Left, Recovered, Restarted, Updated
from llamesh.core.membership.messages import Delta
from llamesh.core.membership.options import Options
from llamesh.core.membership.records import Life, Rank, Record, changed_keys, join, size_of


class Status(StrEnum):
    """How a member stands, as this node sees it."""

    ALIVE = "alive"
    SUSPECT = "suspect"
    DEAD = "dead"
    LEFT = "left"


@dataclass(frozen=True, slots=True)
class Member:
    """What this node knows of a node.

    `since` is the caller's time at which `status` became so. `state` is empty for the dead and those who
    left. `direct` is False while others reach it and we don't. `version` grows with each write of its owner.
    """

    id: str
    epoch: int
    incarnation: int
    status: Status
    since: float
    state: Mapping[str, bytes]
    version: int
    direct: bool = True


_STATUS = {Rank.ALIVE: Status.ALIVE, Rank.DEAD: Status.DEAD, Rank.LEFT: Status.LEFT}
_NOTHING: Mapping[str, bytes] = MappingProxyType({})


class Table:
    """Records by id, our own among them."""

    def __init__(self, own: Record, options: Options, counters: Counter[str]) -> None:
        self.me = own.id
        self.options = options
        self.counters = counters
        self.index = Index()
        self.records: dict[str, Record] = {}
        self.others: dict[str, None] = {}  # those alive, without us; a dict keeps their order reproducible
        self.graves: dict[str, float] = {}  # the gone -> when they are forgotten, by the clock of `expire`
        self.events: deque[Event] = deque()
        self.clock = 0.0
        self.now = 0.0  # the caller's
        self._since: dict[str, float] = {}
        self._members: dict[str, Member] = {}
        self._snapshot: Mapping[str, Member] | None = None
        self._put(None, own)

    @property
    def own(self) -> Record:
        return self.records[self.me]

    @own.setter
    def own(self, record: Record) -> None:
        self._put(self.own, record)

    # What others say.

    def live(self, node_id: str) -> Record | None:
        """The record of another node that is neither dead nor left."""
        return self.records[node_id] if node_id in self.others else None

    def claim(self, node_id: str, life: Life) -> bool:
        """Take a life that is above the known one. Returns whether it was.

        Of an unknown node it isn't taken, nor a later epoch that is alive: either comes with its state.
        """
        record = self.records.get(node_id)
        if record is None or life <= record.life:
            return False
        if life.epoch > record.life.epoch:
            if not life.gone:
                return False
            return self._put(record, Record(node_id, life))
        return self._put(record, replace(record, life=life))

    def merge(self, delta: Delta) -> bool:
        """Take part of a node's state, as living. Returns whether anything was new.

        A delta that begins after what is known here isn't taken: something between would be missing.
        """
        record = self.records.get(delta.id)
        life = Life(delta.epoch, delta.incarnation, Rank.ALIVE)
        starts = 0 if record is None or record.life.epoch < life.epoch else record.version
        if delta.after > starts or (record is not None and record.life.epoch > life.epoch):
            return False
        part = Record(delta.id, life, delta.upto, delta.entries())
        if record is None:
            return self._fits(part) and self._room() and self._put(None, part)
        joined = join(record, part)
        return joined is not record and self._fits(joined) and self._put(record, joined)

    def _fits(self, record: Record) -> bool:
        options = self.options
        if len(record.entries) <= options.max_keys and size_of(record.entries) <= options.max_state:
            return True
        self.counters["refused.state"] += 1
        return False

    def _room(self) -> bool:
        if len(self.records) < self.options.max_members:
            return True
        if self.graves:
            self.forget(next(iter(self.graves)))
            return True
        self.counters["refused.members"] += 1
        return False

    # Changing.

    def _put(self, old: Record | None, new: Record) -> bool:
        self.index.change(old, new)
        self.records[new.id] = new
        self.touch(new.id)
        if new.id == self.me:
            return True
        if new.life.gone:
            self.others.pop(new.id, None)
            if new.id not in self.graves:
                self._bury(new.id)
        else:
            self.others[new.id] = None
            self.graves.pop(new.id, None)
        self._tell(old, new)
        return True

    def _bury(self, node_id: str) -> None:
        while len(self.graves) >= self.options.max_tombstones:
            self.forget(next(iter(self.graves)))
        self.graves[node_id] = self.clock + self.options.tombstone_seconds

    def _tell(self, old: Record | None, new: Record) -> None:
        there, was_there = not new.life.gone, old is not None and not old.life.gone
        if there != was_there or (old is not None and old.life.epoch != new.life.epoch):
            self._since[new.id] = self.now
        if not there:
            if was_there:
                self.say(Left(new.id) if new.life.rank is Rank.LEFT else Died(new.id))
        elif old is None:
            self.say(Joined(new.id))
        elif not was_there:
            self.say(Recovered(new.id) if old.life.epoch == new.life.epoch else Joined(new.id))
        elif old.life.epoch != new.life.epoch:
            self.say(Restarted(new.id))
        elif keys := tuple(changed_keys(old.entries, new.entries)):
            self.say(Updated(new.id, keys))

    def say(self, event: Event) -> None:
        """Keep an event for whoever takes them; the oldest goes when nobody does."""
        if len(self.events) >= self.options.max_events:
            self.events.popleft()
            self.counters["events_lost"] += 1
        self.events.append(event)

    def forget(self, node_id: str) -> None:
        """A tombstone has done its work."""
        self.index.change(self.records.pop(node_id), None)
        del self.graves[node_id]
        self._since.pop(node_id, None)
        self._members.pop(node_id, None)
        self._snapshot = None

    def expire(self) -> None:
        """Forget the gone whose time is over."""
        for node_id in [one for one, until in self.graves.items() if until <= self.clock]:
            self.forget(node_id)

    # Showing.

    def touch(self, node_id: str, *, status: bool = False) -> None:
        """Something about this member is to be shown anew; `status`: it changed now."""
        self._members.pop(node_id, None)
        self._snapshot = None
        if status:
            self._since[node_id] = self.now

    def members(self, opinion: Callable[[str], tuple[bool, bool]]) -> Mapping[str, Member]:
        """Everybody, ourselves too. `opinion` says whether one is suspect, and reached directly."""
        if self._snapshot is None:
            for record in self.records.values():
                if record.id not in self._members:
                    self._members[record.id] = self._member(record, *opinion(record.id))
            self._snapshot = MappingProxyType(dict(self._members))
        return self._snapshot

    def _member(self, record: Record, suspect: bool, direct: bool) -> Member:
        life, gone = record.life, record.life.gone
        return Member(
            id=record.id,
            epoch=life.epoch,
            incarnation=life.incarnation,
            status=Status.SUSPECT if suspect and not gone else _STATUS[life.rank],
            since=self._since.get(record.id, 0.0),
            state=_NOTHING if gone else MappingProxyType(record.state()),
            version=record.version,
            direct=direct and not gone,
        )
