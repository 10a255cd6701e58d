"""What one node believes: it weighs what is said, by whom, and what its own probes found.

The only place where a claim becomes a fact of the table. `Membership` reads and writes messages around it.
"""

from __future__ import annotations

from collections import Counter

from llamesh.core.membership.events import Contested, Recovered, Suspected
from llamesh.core.membership.liveness import Detector, Verdict, rounds_to_death
from llamesh.core.membership.messages import MAX_EPOCH, MAX_INCARNATION, Message, check_key, check_value
from llamesh.core.membership.options import Options
from llamesh.core.membership.records import Life, Rank, Record, reborn, size_of, written
from llamesh.core.membership.rumours import Rumours
from llamesh.core.membership.table import Table

# Rounds for which somebody expected is written to without having answered.
EXPECTED_ROUNDS = 10
MAX_EXPECTED = 4096
# So many unproven deaths are passed on at once; of more than that only those that were checked, since a node
# that was cut off may come and call everybody dead.
CLAIMS_PASSED_ON = 8


class View:
    """Table, detector and rumours, kept consistent with each other."""

    def __init__(self, me: str, epoch: int, options: Options, counters: Counter[str]) -> None:
        self.me = me
        self.options = options
        self.counters = counters
        # Version 1 is the empty state, so that a node that says nothing can be told about too.
        self.table = Table(Record(me, Life(epoch, 0, Rank.ALIVE), 1), options, counters)
        self.detector = Detector()
        self.rumours = Rumours(options.max_members)
        self.expected: dict[str, int] = {}  # to be written to, so that they come (back) -> rounds left
        self.round = 0

    @property
    def own(self) -> Record:
        return self.table.own

    def expect(self, node_id: str) -> None:
        """Write to this node in the next rounds, whatever is known of it."""
        if node_id in self.expected or len(self.expected) < MAX_EXPECTED:
            self.expected[node_id] = EXPECTED_ROUNDS

    def write(self, key: str, value: bytes | None) -> None:
        """See `Membership.set`."""
        check_key(key)
        if value is not None:
            value = value.strip()
            check_value(value)
        entry = self.table.own.entries.get(key)
        if (entry.value if entry else None) == value:
            return
        options, own = self.options, written(self.table.own, key, value)
        deleted = sum(1 for one in own.entries.values() if one.value is None)
        if deleted > options.max_deleted or (deleted and len(own.entries) > options.max_keys):
            # Nobody can know that all have heard of a deletion; a new epoch makes them forget by itself.
            own = reborn(own, own.life.epoch + 1)
        if len(own.entries) > options.max_keys:
            raise ValueError(f"no room for {key!r}: a node has at most {options.max_keys} keys")
        if size_of(own.entries) > options.max_state:
            raise ValueError(f"no room for {key!r}: a node's state has at most {options.max_state} bytes")
        self.table.own = own

    # What is said.

    def read(self, sender: str, message: Message) -> None:
        """Take all that is new in a message. It was checked before: nothing here fails half-way."""
        self._meet(sender, message.life)
        if message.you is not None:
            self.hear(self.me, message.you.epoch, message.you.incarnation, message.you.rank)
        for delta in message.deltas:
            self.hear(delta.id, delta.epoch, delta.incarnation, delta.rank, delta.upto)
            if delta.id != self.me and delta.rank < Rank.DEAD:
                before = self.table.records.get(delta.id)
                if self.table.merge(delta):
                    self._better(delta.id, before)
        for digest in message.digests or ():
            self.hear(digest.id, digest.epoch, digest.incarnation, digest.rank, digest.version)
        for one in message.lives:
            self.hear(one.id, one.epoch, one.incarnation, one.rank)

    def _meet(self, sender: str, life: Life) -> None:
        """A direct sign of life, with what the sender says of its own."""
        self.hear(sender, *life)
        record = self.table.live(sender)
        if record is not None and record.life.epoch >= life.epoch:
            self.sign_of_life(sender)
        elif not life.gone:
            # Its state has to come before it is anybody, or a refutation; make sure that it does.
            self.expect(sender)

    def hear(self, node_id: str, epoch: int, incarnation: int, rank: int, version: int = 0) -> None:
        """A claim about somebody's life. A rank that we don't know is of a later version and says nothing."""
        if rank > Rank.LEFT:
            return
        life = Life(epoch, incarnation, Rank(rank))
        if node_id == self.me:
            self._defend(life, version)
            return
        record = self.table.records.get(node_id)
        if record is None or life <= record.life:
            return
        if life.rank is Rank.SUSPECT:
            # An opinion: passed on, so that the suspect hears of it.
            same = (epoch, incarnation) == (record.life.epoch, record.life.incarnation)
            if same and not self.detector.fresh(node_id, self.round):
                self.rumours.add(node_id, life)
        elif life.rank is Rank.DEAD and not record.life.gone:
            few = self.detector.accused < CLAIMS_PASSED_ON
            if self.detector.accuse(node_id, life, self.round) and few:
                self.rumours.add(node_id, life)
        elif self.table.claim(node_id, life):
            self.rumours.add(node_id, life)
            self._better(node_id, record)

    def _better(self, node_id: str, before: Record | None) -> None:
        """The record of a member got better than `before`."""
        record = self.table.records[node_id]
        if record.life.gone or before is None or before.life.epoch != record.life.epoch:
            self.detector.forget(node_id)
        elif before.life != record.life and self.detector.refuted(node_id):
            self.recovered(node_id)
        if not record.life.gone:
            self.expected.pop(node_id, None)

    def _defend(self, life: Life, version: int) -> None:
        """Somebody speaks of us, and only we know."""
        own = self.own
        if own.life.gone or life.epoch < own.life.epoch:
            return
        if life.epoch > own.life.epoch or version > own.version or life.incarnation >= MAX_INCARNATION:
            if life.epoch + 1 >= MAX_EPOCH:
                self.counters["refused.epoch"] += 1
                return
            self.table.own = reborn(own, life.epoch + 1)
            self.table.say(Contested(self.me, life.epoch))
        elif life > own.life:
            refuted = Life(own.life.epoch, life.incarnation + 1, Rank.ALIVE)
            self.table.own = Record(self.me, refuted, own.version, own.entries)
            self.rumours.add(self.me, refuted)
        else:
            return
        self.counters["refuted"] += 1

    # What our probes say.

    def sign_of_life(self, node_id: str, *, reached: bool = False) -> None:
        """A message from a member, or (`reached`) it answered us."""
        was_direct = self.detector.direct(node_id)
        if self.detector.alive(node_id, self.round, reached=reached):
            self.recovered(node_id)
        elif was_direct != self.detector.direct(node_id):
            self.table.touch(node_id)

    def vouched(self, node_id: str) -> None:
        """Others reach a member that we don't."""
        if self.detector.vouched(node_id):
            self.recovered(node_id)
        else:
            self.table.touch(node_id)

    def failed(self, node_id: str) -> None:
        """A round went by without a sign of life from a member."""
        record = self.table.records[node_id]
        needed = self.options.suspect_rounds or rounds_to_death(len(self.table.others) + 1)
        claim = self.detector.claim(node_id)
        verdict = self.detector.failed(node_id, self.round, needed)
        if verdict is Verdict.DEAD:
            dead = record.life._replace(rank=Rank.DEAD)
            dead = max(dead, claim or dead)
            self.table.claim(node_id, dead)
            self.rumours.add(node_id, dead)
            self.detector.forget(node_id)
        elif verdict is Verdict.SUSPECT:
            self.table.say(Suspected(node_id))
            self.table.touch(node_id, status=True)

    def suspicion(self, node_id: str) -> None:
        """Nobody of those whom we asked reached a suspect either: let it hear what we think."""
        record = self.table.live(node_id)
        if record is not None and self.detector.suspect(node_id):
            self.rumours.add(node_id, record.life._replace(rank=Rank.SUSPECT))

    def recovered(self, node_id: str) -> None:
        """A member isn't suspect any more."""
        self.table.say(Recovered(node_id))
        self.table.touch(node_id, status=True)
