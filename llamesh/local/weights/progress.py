"""How far a download is, how fast it goes, and when it will be done."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

# The rate is an average that forgets: what was so long ago (seconds) counts a third.
_MEMORY_SECONDS = 8.0
_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


@dataclass(slots=True)
class Progress:
    """Of all files of a model together. `doing`: what is going on, for people; `total`: bytes, 0 while that
    isn't known; `have`: bytes that are there. Times are the caller's clock, in seconds.
    """

    name: str
    doing: str = "looking for"
    total: int = 0
    have: int = 0
    rate: float = 0.0  # bytes a second
    moved: float = -math.inf  # when bytes came last
    _last: tuple[float, int] | None = field(default=None, repr=False)

    def sample(self, now: float, have: int) -> None:
        """So much is there now."""
        if self._last is not None:
            before, had = self._last
            passed = now - before
            if passed <= 0:
                return
            new = max(0, have - had)
            weight = 1.0 if not self.rate else 1 - math.exp(-passed / _MEMORY_SECONDS)
            self.rate += (new / passed - self.rate) * weight
            if new:
                self.moved = now
        else:
            self.moved = now
        self._last, self.have = (now, have), have

    @property
    def fraction(self) -> float | None:
        """From 0 to 1; None while it isn't known."""
        return min(1.0, self.have / self.total) if self.total else None

    @property
    def eta_seconds(self) -> float | None:
        """What is left, at this rate; None while nobody can tell."""
        if not self.total or self.rate < 1:
            return None
        return max(0.0, (self.total - self.have) / self.rate)

    def __str__(self) -> str:
        """`downloading owner/name:Q4_K_M, 12 % of 4.7 GB, 35.1 MB/s, 2 min left`."""
        words = [f"{self.doing} {self.name}"]
        if self.fraction is not None:
            words.append(f"{int(self.fraction * 100)} % of {in_words(self.total)}")
        if self.rate >= 1 and self.doing == "downloading":
            words.append(f"{in_words(self.rate)}/s")
        if (left := self.eta_seconds) is not None and self.doing == "downloading":
            words.append(f"{_time(left)} left")
        return ", ".join(words)

    def document(self) -> dict[str, object]:
        """`progress` (0 to 1) and `eta_seconds`, each where it is known."""
        found: dict[str, object] = {}
        if self.fraction is not None:
            found["progress"] = round(self.fraction, 3)
        if self.eta_seconds is not None:
            found["eta_seconds"] = round(self.eta_seconds, 1)
        return found


def in_words(size: float) -> str:
    """Bytes as people write them: 4.7 GB."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{int(size)} B"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
