"""Where the bytes of a file come from. One that can be asked for any range of it, more than once at a time.

The web is one (`web_source`); another node of the mesh can be one, too. All calls block and are made in
threads; `cut` ends them from another thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from llamesh.core.model_files import RemoteFile


class Body(Protocol):
    """The bytes of one range, on their way."""

    def readinto(self, buffer: memoryview) -> int:
        """Some of the bytes that are left, at least one; 0 at the end. Raises WeightsError."""

    def close(self) -> None:
        """Idempotent."""


class Channel(Protocol):
    """A connection of a source's own, for one range after another."""

    def open(self, start: int, end: int) -> Body:
        """Bytes from `start` up to, not including, `end`. Raises WeightsError.

        The body before must have been read to its end, or closed.
        """

    def close(self) -> None:
        """Idempotent; by the thread that opens."""

    def cut(self) -> None:
        """Have whatever blocks on this channel fail at once; from any thread. Idempotent."""


class Source(Protocol):
    """One file somewhere else. `name` is for people, and tells one source from another; `ranges`: parts of
    it can be had, and several at once.
    """

    @property
    def name(self) -> str: ...
    @property
    def ranges(self) -> bool: ...
    def channel(self) -> Channel:
        """A new connection; nothing is sent before its first `open`."""


class SizedSource(Source, Protocol):
    """One that has said how long the file is, in bytes."""

    @property
    def size(self) -> int: ...


class Neighbours(Protocol):
    """Others that may have weights, and give them: the peers of the mesh. Both calls take seconds at most."""

    async def having(self, sha256: str) -> list[SizedSource]:
        """Who has a file now."""

    async def listings(self, repo: str) -> list[tuple[str, tuple[RemoteFile, ...]]]:
        """What they have of a repository: commits of it, with the files that somebody has of each. What most
        have is first.
        """

    def distrust(self, names: Iterable[str], sha256: str) -> None:
        """What these sources gave of a file isn't what it should be."""
