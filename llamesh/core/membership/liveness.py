"""Who answers, who is suspect, and whose death is only hearsay.

Only what is out of the ordinary is kept: a member without a line here is alive and reached directly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto

from llamesh.core.membership.records import Life

# A sign of life this many rounds ago is better evidence than what others say.
FRESH_ROUNDS = 2


def rounds_to_death(members: int) -> int:
    """Failed rounds of probing after which a suspect is dead, in a mesh of that many.

    Two in a mesh of up to ten: with probes that give up within half an interval a node is dead 2.5 intervals
    after its last sign of life. One more for each factor of ten, since a refutation then has a longer way.
    """
    return 1 + max(1, math.ceil(math.log10(max(1, members))))


class Verdict(Enum):
    """What a failed probe means."""

    NOTHING = auto()
    SUSPECT = auto()  # from now on
    STILL = auto()  # as before
    DEAD = auto()


@dataclass(slots=True)
class _Line:
    failures: int = 0  # rounds in a row in which no probe of ours reached it, nor one that we asked for
    counted: int = -1  # the round of the last of them
    asked: bool = False  # others were asked to probe it, and haven't said
    direct: bool = True
    claim: Life | None = None  # of death, heard and not believed yet


class Detector:
    """Counts failures and weighs claims; knows nothing of records."""

    def __init__(self) -> None:
        self._lines: dict[str, _Line] = {}
        self._heard: dict[str, int] = {}  # the round of the last direct sign of life
        self._tell: dict[str, Life] = {}  # who lives, and which claim it has to be told

    def _line(self, node_id: str) -> _Line:
        return self._lines.setdefault(node_id, _Line())

    def _tidy(self, node_id: str, line: _Line) -> None:
        if line.direct and not line.failures and line.claim is None and not line.asked:
            del self._lines[node_id]

    def suspect(self, node_id: str) -> bool:
        """Whether it is suspect."""
        line = self._lines.get(node_id)
        return line is not None and line.failures > 0

    def direct(self, node_id: str) -> bool:
        """Whether we reach it ourselves, as far as we know."""
        line = self._lines.get(node_id)
        return line is None or line.direct

    def fresh(self, node_id: str, round_number: int) -> bool:
        """Whether it gave us a sign of life just now."""
        return self._heard.get(node_id, -FRESH_ROUNDS - 1) >= round_number - FRESH_ROUNDS

    # Evidence.

    def alive(self, node_id: str, round_number: int, *, reached: bool = False) -> bool:
        """A message from it, or (`reached`) it answered us. Returns whether it was suspect."""
        self._heard[node_id] = round_number
        line = self._lines.get(node_id)
        if line is None:
            return False
        line.direct = line.direct or reached
        return self._acquit(node_id, line)

    def vouched(self, node_id: str) -> bool:
        """Somebody else reached it and we didn't. Returns whether it was suspect."""
        line = self._line(node_id)
        line.direct = False
        return self._acquit(node_id, line)

    def refuted(self, node_id: str) -> bool:
        """It said in a later incarnation that it lives. Returns whether it was suspect."""
        line = self._lines.get(node_id)
        if line is None:
            return False
        line.claim = None
        return self._acquit(node_id, line)

    def _acquit(self, node_id: str, line: _Line) -> bool:
        if line.claim is not None:
            self._tell[node_id] = line.claim
        was = line.failures > 0
        line.failures, line.claim, line.asked = 0, None, False
        self._tidy(node_id, line)
        return was

    def failed(self, node_id: str, round_number: int, needed: int) -> Verdict:
        """A round without a sign of life; `needed` of them are a death. In one round they count once."""
        line = self._line(node_id)
        line.asked = False
        if line.counted == round_number:
            return Verdict.NOTHING
        line.counted = round_number
        line.failures += 1
        # Who was called dead by others besides isn't given more time.
        if line.claim is not None or line.failures >= needed:
            return Verdict.DEAD
        return Verdict.SUSPECT if line.failures == 1 else Verdict.STILL

    def waits(self, node_id: str) -> bool:
        """Whether a failed probe of ours says nothing yet, as long as others can be asked.

        That is so for a member which only others reach. If they were asked before and didn't say, it counts.
        """
        line = self._lines.get(node_id)
        return line is not None and not line.direct and not line.asked

    def asked(self, node_id: str) -> None:
        """Others are asked to probe it."""
        self._line(node_id).asked = True

    # Claims.

    def accuse(self, node_id: str, life: Life, round_number: int) -> bool:
        """Somebody says that it is dead. Returns whether that may be so and is to be passed on."""
        if self.fresh(node_id, round_number):
            self._tell[node_id] = life
            return False
        line = self._line(node_id)
        if line.claim is not None and line.claim >= life:
            return False
        line.claim = life
        return True

    def claim(self, node_id: str) -> Life | None:
        """The death that it is said to have died."""
        line = self._lines.get(node_id)
        return line.claim if line is not None else None

    @property
    def accused(self) -> int:
        return sum(1 for line in self._lines.values() if line.claim is not None)

    def to_tell(self) -> list[str]:
        """The living who were called dead: they are to be told, so that they refute."""
        return list(self._tell)

    def take_told(self, node_id: str) -> Life | None:
        """What this one has to be told, once."""
        return self._tell.pop(node_id, None)

    def forget(self, node_id: str) -> None:
        """It is gone, or lives another life."""
        self._lines.pop(node_id, None)
        self._heard.pop(node_id, None)
        self._tell.pop(node_id, None)

    def slept(self) -> list[str]:
        """We were asleep: what failed meanwhile failed here. Returns those who were suspect."""
        suspects = [node_id for node_id, line in self._lines.items() if line.failures]
        for node_id, line in list(self._lines.items()):
            line.failures, line.asked = 0, False
            self._tidy(node_id, line)
        self._heard.clear()
        return suspects

    def first(self) -> list[str]:
        """Who is probed before anybody else: the accused and the suspects."""
        return [node_id for node_id, line in self._lines.items() if line.claim or line.failures]
