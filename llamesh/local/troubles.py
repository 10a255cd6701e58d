"""Starts that fail and instances that crash: when the next try is due, and when to say so.

A start is tried three times with growing pauses; then those who wait are told, and requests fail at
once while the profile rests. An instance that keeps crashing soon after it was ready is a loop: its
next start waits, twice as long each time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llamesh.config.cookbook import Profile
from llamesh.local.failure import Failure, is_out_of_memory

# A start is tried this often before those who wait for it are told.
MAX_TRIES = 3

# Seconds before the second try; doubles. After the last one, requests fail at once for `_REST`.
_RETRY_PAUSE = 0.1
_REST = 1.0
_REST_MAX = 30.0

# Two crashes within this time are a loop; it is over when an instance lives for longer.
_LOOP_SECONDS = 60.0
_LOOP_PAUSE = 1.0
_LOOP_PAUSE_MAX = 60.0


@dataclass(slots=True)
class Trouble:
    """A profile's troubles. Times are trio's.

    `failures`: failed starts in this round; `rest_until`: no start before; `out_of_memory`: failed
    starts of this round that memory was the reason of; `rounds`: in a row that ended without a start
    that worked; `crashes`: in a row, each soon after a start. `profile`: what was tried.
    """

    profile: Profile | None = None
    failures: int = 0
    rounds: int = 0
    next_rest: float = _REST
    last: Failure | None = None
    rest_until: float = 0.0
    out_of_memory: int = 0
    crashes: int = 0
    last_crash: float = -1e9

    @property
    def exhausted(self) -> bool:
        """Whether all tries of this round are used up."""
        return self.failures >= MAX_TRIES


class Troubles:
    """Of all profiles, by key."""

    def __init__(self) -> None:
        self._of: dict[str, Trouble] = {}

    def of(self, key: str) -> Trouble | None:
        """The profile's troubles, None when it has none."""
        return self._of.get(key)

    def forget(self, changed: Callable[[str, Profile | None], bool]) -> None:
        """What is known of a profile that `changed` says nothing about the new one."""
        for key in [key for key, trouble in self._of.items() if changed(key, trouble.profile)]:
            del self._of[key]

    def resting(self, key: str, now: float) -> bool:
        """Whether the profile's next start has to wait."""
        trouble = self._of.get(key)
        return trouble is not None and now < trouble.rest_until

    def note_ready(self, key: str) -> None:
        """A start worked. Crashes are remembered: being ready once isn't the end of a loop."""
        trouble = self._of.get(key)
        if trouble is None:
            return
        if trouble.crashes:
            self._of[key] = Trouble(trouble.profile, crashes=trouble.crashes, last_crash=trouble.last_crash)
        else:
            del self._of[key]

    def note_failed_start(
        self, profile: Profile, failure: Failure, now: float
    ) -> tuple[Trouble, float | None]:
        """A start failed. The trouble, and the pause until the next try; None when one is set already."""
        trouble = self._of.setdefault(profile.key, Trouble())
        trouble.profile, trouble.last = profile, failure
        if trouble.exhausted and now < trouble.rest_until:
            # Begun beside the one that was the last try of the round, which is over: no new one.
            return trouble, None
        if trouble.exhausted:
            trouble.failures = trouble.out_of_memory = 0
        trouble.failures += 1
        trouble.out_of_memory += is_out_of_memory(failure)
        if trouble.exhausted:
            trouble.rounds += 1
            pause = trouble.next_rest
            trouble.next_rest = min(_REST_MAX, pause * 2)
        else:
            pause = _RETRY_PAUSE * 2 ** (trouble.failures - 1)
        trouble.rest_until = now + pause
        return trouble, pause

    def note_crash(self, profile: Profile, now: float) -> float:
        """An instance ended while serving. The pause before the next start; 0 for a first crash."""
        trouble = self._of.setdefault(profile.key, Trouble())
        trouble.profile = profile
        trouble.crashes = trouble.crashes + 1 if now - trouble.last_crash < _LOOP_SECONDS else 1
        trouble.last_crash = now
        if trouble.crashes < 2:
            return 0.0
        pause = float(min(_LOOP_PAUSE_MAX, _LOOP_PAUSE * 2 ** (trouble.crashes - 2)))
        trouble.rest_until = max(trouble.rest_until, now + pause)
        return pause
