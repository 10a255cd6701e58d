"""Which bytes of a file are there: disjoint, ascending, half-open ranges that grow together."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Ranges:
    """A set of byte offsets. Not safe for threads: whoever shares one brings a lock."""

    def __init__(self, ranges: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        for start, end in ranges:
            self.add(start, end)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def __repr__(self) -> str:
        return f"Ranges({list(self)})"

    def add(self, start: int, end: int) -> None:
        """Bytes from `start` up to, not including, `end` are there now. Nothing for an empty range."""
        if start >= end:
            return
        # All that touch it melt into one.
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    @property
    def total(self) -> int:
        """How many bytes are there."""
        return sum(end - start for start, end in self)

    def covered_from(self, offset: int) -> int:
        """The end of the unbroken range that holds or touches `offset`; `offset` itself when none does."""
        index = bisect_right(self._starts, offset) - 1
        return max(offset, self._ends[index]) if index >= 0 else offset

    def gaps(self, size: int) -> list[tuple[int, int]]:
        """What isn't there, of a file of `size` bytes."""
        found, at = [], 0
        for start, end in self:
            if at < min(start, size):
                found.append((at, min(start, size)))
            at = max(at, end)
        if at < size:
            found.append((at, size))
        return found


def pieces(gaps: Iterable[tuple[int, int]], most: int) -> list[tuple[int, int]]:
    """The gaps cut into pieces of at most `most` bytes, in order."""
    return [(at, min(at + most, end)) for start, end in gaps for at in range(start, end, most)]
