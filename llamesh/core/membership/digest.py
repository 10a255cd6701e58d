"""One hash over all that is known, and where two such hashes differ.

The hash of many records is the exclusive or of their marks, so the order doesn't matter, and adding, changing
or removing one record is one step. Records are spread over LEAVES by a hash of their id; a coarser division
into buckets joins neighbouring leaves. Hashes here find differences; they prove nothing against a member that
means harm.
"""

from __future__ import annotations

from collections.abc import Iterator

from llamesh.core.membership.records import LEAVES, Record

MAX_BITS = LEAVES.bit_length() - 1
PER_BUCKET = (
    16  # records in a bucket, about: both its hash and its digests then cost little beside each other
)
BUCKET_HEX = 12  # digits of a bucket's hash: 48 bits; the root has all 64


def bits_for(count: int) -> int:
    """How finely to divide `count` records, as a power of two: 0 is one bucket with everybody."""
    return min(MAX_BITS, (max(0, count - 1) // PER_BUCKET).bit_length())


class Index:
    """The hashes of a table of records, kept up to date; and who is in which leaf."""

    __slots__ = ("_hashes", "_ids", "count", "root")

    def __init__(self) -> None:
        self.root = 0
        self.count = 0
        self._hashes = [0] * LEAVES
        self._ids: list[dict[str, None]] = [{} for _ in range(LEAVES)]

    def change(self, old: Record | None, new: Record | None) -> None:
        """Put `new` in the place of `old`, which are of the same node; None for nothing."""
        if old is not None and old.told:
            self._toggle(old, -1)
        if new is not None and new.told:
            self._toggle(new, 1)
        if old is None and new is not None:
            self._ids[new.leaf][new.id] = None
        elif new is None and old is not None:
            del self._ids[old.leaf][old.id]

    def _toggle(self, record: Record, step: int) -> None:
        self.root ^= record.mark
        self._hashes[record.leaf] ^= record.mark
        self.count += step

    @property
    def root_text(self) -> str:
        """16 hexadecimal digits."""
        return f"{self.root:016x}"

    def buckets(self, bits: int) -> str:
        """The hashes of all 2 ** bits buckets, BUCKET_HEX digits each, one after the other."""
        width = LEAVES >> bits
        parts = []
        for first in range(0, LEAVES, width):
            value = 0
            for number in range(first, first + width):
                value ^= self._hashes[number]
            parts.append(f"{value:016x}"[:BUCKET_HEX])
        return "".join(parts)

    def differing(self, bits: int, theirs: str) -> list[int]:
        """The buckets whose hashes aren't what somebody else's `buckets` says."""
        ours = self.buckets(bits)
        return [
            number
            for number in range(1 << bits)
            if ours[number * BUCKET_HEX : (number + 1) * BUCKET_HEX]
            != theirs[number * BUCKET_HEX : (number + 1) * BUCKET_HEX]
        ]

    def ids(self, bits: int, bucket: int) -> Iterator[str]:
        """Everybody in a bucket, tombstones too."""
        width = LEAVES >> bits
        for number in range(bucket * width, (bucket + 1) * width):
            yield from self._ids[number]
