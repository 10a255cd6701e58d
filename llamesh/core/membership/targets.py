"""Whom to write to and whom to probe in a round."""

from __future__ import annotations

from collections.abc import Iterable, MutableSequence, Sequence
from typing import Any, Protocol

from llamesh.core.membership.records import Rank
from llamesh.core.membership.view import View

# Bounds for one round, far above what happens unless half a large mesh goes at once.
MAX_EXTRA = 64
EXPECTED_PER_ROUND = 16


class Chance(Protocol):
    """What is used of `random.Random`."""

    def random(self) -> float: ...
    def sample(self, population: Sequence[str], k: int) -> list[str]: ...
    def shuffle(self, x: MutableSequence[Any]) -> None: ...


class Targets:
    """Gossip goes to members by chance, probes in turns over a shuffled list.

    So everybody is probed within N / `probe_count` rounds, and news spreads as fast as by any other choice.
    """

    def __init__(self, view: View, chance: Chance) -> None:
        self._view = view
        self._chance = chance
        self._turn: list[str] = []

    def to_probe(self, in_use: Iterable[str]) -> tuple[str, ...]:
        """The accused and suspects, those in use, and more in their turn; all where there are no more."""
        members, count = self._view.table.others, self._view.options.probe_count
        if len(members) <= count:
            return tuple(members)
        first = [one for one in self._view.detector.first() if one in members][:MAX_EXTRA]
        chosen = dict.fromkeys((*first, *(one for one in in_use if one in members)))
        for _ in range(2):
            while self._turn and count:
                one = self._turn.pop()
                if one in members and one not in chosen:
                    chosen[one] = None
                    count -= 1
            if not self._turn:
                self._turn = list(members)
                self._chance.shuffle(self._turn)
        return tuple(chosen)

    def to_gossip(self) -> list[str]:
        """Those we wait for, those who must refute a claim, some members, and perhaps one of the dead."""
        view, options = self._view, self._view.options
        chosen = dict.fromkeys(list(view.expected)[:EXPECTED_PER_ROUND])
        for node_id in chosen:
            # To the end of the queue, with a round less to wait.
            if left := view.expected.pop(node_id) - 1:
                view.expected[node_id] = left
        chosen.update(dict.fromkeys(view.detector.to_tell()[:MAX_EXTRA]))
        # 1 of 1, 2 of 2 or 3: in a tiny mesh everybody hears everything anyway.
        alive = list(view.table.others)
        fanout = min(options.fanout, len(alive).bit_length())
        chosen.update(dict.fromkeys(self._chance.sample(alive, fanout)))
        dead = [one for one in view.table.graves if view.table.records[one].life.rank is Rank.DEAD]
        # About two knocks at each of the dead in a round of the whole mesh, one at most from each node.
        if dead and self._chance.random() * (len(alive) + 1) < 2 * len(dead):
            chosen.update(dict.fromkeys(self._chance.sample(dead, 1)))
        return list(chosen)

    def helpers(self, peer: str) -> tuple[str, ...]:
        """Whom to ask to probe a member for us: some whom we reach ourselves."""
        detector = self._view.detector
        fit = [
            one
            for one in self._view.table.others
            if one != peer and detector.direct(one) and not detector.suspect(one)
        ]
        return tuple(self._chance.sample(fit, min(len(fit), self._view.options.indirect_count)))
