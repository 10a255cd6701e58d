"""Profiles whose last node has just left in order: it may only be restarted.

For a minute they are still known by their names, so a request for one waits in line, as long as it would
for a model that loads, instead of being told that there is no such model. They aren't listed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llamesh.config.cookbook import Profile

# A restart of a service takes seconds, of a machine about a minute.
REMEMBERED_SECONDS = 60.0

# The names of any mesh that is used; the oldest are forgotten first.
_MOST_NAMES = 10_000


class _Gone(NamedTuple):
    profile: Profile
    node: str
    at: float


class Absent:
    """See the module. Times are seconds of one clock, passed in."""

    def __init__(self) -> None:
        self._names: dict[str, _Gone] = {}  # in lower case

    def note(self, node: str, names: Iterable[tuple[str, Profile]], now: float) -> None:
        """`node` has left, and with it the last that had these."""
        for name, profile in names:
            self._names.pop(name.casefold(), None)
            self._names[name.casefold()] = _Gone(profile, node, now)
        # In the order of their times.
        for name in list(self._names):
            if len(self._names) <= _MOST_NAMES and self._counts(self._names[name], now):
                break
            del self._names[name]

    def find(self, name: str, now: float) -> Profile | None:
        """The profile with this name, if it went a moment ago."""
        gone = self._names.get(name.casefold())
        return gone.profile if gone is not None and self._counts(gone, now) else None

    def explain(self, name: str, now: float) -> str:
        """Who had it, "" when that is too long ago."""
        gone = self._names.get(name.casefold())
        if gone is None or not self._counts(gone, now):
            return ""
        return f"node {gone.node}, which had it, left {now - gone.at:.0f} s ago"

    @staticmethod
    def _counts(gone: _Gone, now: float) -> bool:
        return now - gone.at < REMEMBERED_SECONDS
