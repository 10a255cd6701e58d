"""Room that is being made: what is promised to whom, while others still leave for it.

A promise is made together with the drain and ends with the start, or when nobody waits for it any
more. Between the two, whoever asks for room sees it as taken; among several, the oldest comes first.
"""

from __future__ import annotations

from dataclasses import dataclass

from llamesh.core.capacity import Need, Tenant
from llamesh.core.lifecycle import State


@dataclass(frozen=True, slots=True)
class _Promise:
    tenant: Tenant  # who is to come
    leaves: frozenset[str]  # instances that leave for it


class Promises:
    """By profile key, oldest first."""

    def __init__(self) -> None:
        self._of: dict[str, _Promise] = {}

    def keys(self) -> set[str]:
        """Profiles that were promised room."""
        return set(self._of)

    def make(self, key: str, need: Need, ids: tuple[str, ...]) -> None:
        """Promise room for `need` to the profile, which `ids` leave for; an older one grows by it."""
        tenant = Tenant(f"{key} (next)", State.STARTING, busy=True, charge=need)
        self._of[key] = _Promise(tenant, self.leaves(key) | frozenset(ids))

    def before(self, key: str) -> list[Tenant]:
        """Who comes before the profile."""
        found = []
        for other, promise in self._of.items():
            if other == key:
                break
            found.append(promise.tenant)
        return found

    def leaves(self, key: str) -> frozenset[str]:
        """Ids of the instances that were drained for the profile."""
        promise = self._of.get(key)
        return promise.leaves if promise is not None else frozenset()

    def end(self, key: str) -> frozenset[str]:
        """The promise is kept, or not needed; whom it was about to cost their place."""
        leaves = self.leaves(key)
        self._of.pop(key, None)
        return leaves
