"""How much two prompts have in common, told by a few hashes of how they begin.

A prompt is cut at marks, close together at its start and further apart later: each 0.5 KiB up to 8 KiB, each
2 KiB up to 64 KiB, each 8 KiB up to 256 KiB. The hash at a mark is that of everything before it, so two
prompts share it when they begin alike up to there. A conversation grows at its end: its next turn has all
marks of this one.

The hashes are Python's own (SipHash with a key that each process draws): a gigabyte a second, and nobody can
foresee them. They mean nothing to another process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


def _marks() -> Iterator[int]:
    yield from range(512, 8 * 1024, 512)
    yield from range(8 * 1024, 64 * 1024, 2 * 1024)
    yield from range(64 * 1024, 256 * 1024 + 1, 8 * 1024)


# In bytes.
MARKS = tuple(_marks())

# Shorter prompts are read again in no time.
SHORTEST = MARKS[0]


class Prefix(NamedTuple):
    """How a prompt begins. marks: the hash at each of MARKS that it reaches; session: of what the client
    calls its conversation, 0 = nothing; length: of the prompt in bytes.
    """

    marks: tuple[int, ...] = ()
    session: int = 0
    length: int = 0

    def __bool__(self) -> bool:
        """Whether there is anything to go by."""
        return bool(self.marks or self.session)


NOTHING = Prefix()


def prefix_of(
    model: str, opening: Sequence[bytes | memoryview], prompt: bytes | memoryview, session: bytes = b""
) -> Prefix:
    """The prefix of a prompt for one model. `opening`: what a template puts before it, such as tools."""
    named = hash((model, session)) if session else 0
    length = len(prompt)
    if length + sum(map(len, opening)) < SHORTEST:
        return Prefix((), named, length)
    # Of the opening it is all or nothing: it is seldom changed within a conversation.
    before = 0
    state = hash((model, *map(bytes, opening)))
    marks = []
    view = memoryview(prompt)
    for mark in MARKS:
        if mark > length:
            break
        state = hash((state, bytes(view[before:mark])))
        marks.append(state)
        before = mark
    return Prefix(tuple(marks), named, length)
