"""What is known of one node: a frozen value, and how two of them become one.

`join` is idempotent, commutative and associative (a product of lexicographic orders), see the package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from hashlib import blake2b
from types import MappingProxyType
from typing import NamedTuple


class Rank(IntEnum):
    """How a node stands within one incarnation; the greater one wins. The numbers are those on the wire."""

    ALIVE = 0
    SUSPECT = 1  # an opinion: travels as a rumour, never part of a record
    DEAD = 2
    LEFT = 3


class Life(NamedTuple):
    """Ordered as it is written: the greater one is what counts."""

    epoch: int  # Unix ms of the start
    incarnation: int
    rank: Rank

    @property
    def gone(self) -> bool:
        return self.rank >= Rank.DEAD


class Entry(NamedTuple):
    """One key's last write, None for a deletion."""

    version: int
    value: bytes | None


NO_ENTRIES: Mapping[str, Entry] = MappingProxyType({})
LEAVES = 256  # of the index of hashes: records are spread over these by a hash of their id


def leaf_of(node_id: str) -> int:
    """Where the record of a node belongs, from 0 to LEAVES - 1. The same on every node."""
    return blake2b(node_id.encode(), digest_size=1).digest()[0]


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of one node in one epoch.

    `entries` are complete up to `version`: a key whose last write came later may be missing or older. 0 means
    that only its life is known. A record that is gone keeps its entries (they are still true, should it
    return), and nobody is shown them.

    `mark` is a 64-bit hash of what other nodes need to know in order to tell whether they know the same;
    `size` the bytes of keys and values.
    """

    id: str
    life: Life
    version: int = 0
    entries: Mapping[str, Entry] = field(default_factory=lambda: NO_ENTRIES)
    leaf: int = field(init=False, compare=False, repr=False)
    mark: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        said = f"{self.id} {self.life.epoch} {self.life.incarnation} {self.version}".encode()
        object.__setattr__(self, "leaf", leaf_of(self.id))
        object.__setattr__(self, "mark", int.from_bytes(blake2b(said, digest_size=8).digest(), "big"))

    @property
    def told(self) -> bool:
        """Whether others are told about it as living: those who know its life alone have nothing to tell."""
        return self.version > 0 and not self.life.gone

    @property
    def size(self) -> int:
        return size_of(self.entries)

    def state(self) -> dict[str, bytes]:
        """What it says of itself, without what was deleted."""
        return {key: entry.value for key, entry in self.entries.items() if entry.value is not None}

    def after(self, version: int) -> list[tuple[str, Entry]]:
        """The entries written after `version`, in the order in which they were."""
        later = [(key, entry) for key, entry in self.entries.items() if entry.version > version]
        later.sort(key=lambda pair: pair[1].version)
        return later


def size_of(entries: Mapping[str, Entry]) -> int:
    """Bytes of keys and values."""
    return sum(len(key.encode()) + len(entry.value or b"") for key, entry in entries.items())


def _greater(one: Entry, other: Entry) -> Entry:
    if one.version != other.version:
        return one if one.version > other.version else other
    # An owner writes a version once. Whoever lies about that shall not make the mesh disagree for ever.
    if one.value == other.value:
        return one
    return max(one, other, key=lambda entry: (entry.value is not None, entry.value or b""))


def join(one: Record, other: Record) -> Record:
    """The least record that says at least what both say; `one` itself where `other` adds nothing.

    They must be of the same node.
    """
    if one.life.epoch != other.life.epoch:
        return one if one.life.epoch > other.life.epoch else other
    # Nothing new is the usual case: the first is then returned as it is.
    news = {}
    for key, entry in other.entries.items():
        known = one.entries.get(key)
        if known is None or (known is not entry and _greater(known, entry) is not known):
            news[key] = entry
    life, version = max(one.life, other.life), max(one.version, other.version)
    if not news and life == one.life and version == one.version:
        return one
    return Record(one.id, life, version, {**one.entries, **news} if news else one.entries)


def written(own: Record, key: str, value: bytes | None) -> Record:
    """The owner's record after it wrote one entry."""
    version = own.version + 1
    return replace(own, version=version, entries={**own.entries, key: Entry(version, value)})


def reborn(own: Record, epoch: int) -> Record:
    """The owner's record in a new epoch: the same state, renumbered, with what was deleted forgotten."""
    alive = [(key, entry.value) for key, entry in own.after(0) if entry.value is not None]
    entries = {key: Entry(number, value) for number, (key, value) in enumerate(alive, start=2)}
    return Record(own.id, Life(epoch, 0, Rank.ALIVE), len(entries) + 1, entries)


def changed_keys(old: Mapping[str, Entry], new: Mapping[str, Entry]) -> Iterable[str]:
    """Keys whose value differs between two states, sorted."""
    if old is new:
        return ()
    nothing = Entry(0, None)
    return sorted(
        key
        for key in {**old, **new}
        if old.get(key, nothing) != new.get(key, nothing)
        and old.get(key, nothing).value != new.get(key, nothing).value
    )
