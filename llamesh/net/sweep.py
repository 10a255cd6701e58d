"""Deadlines for many connections at the price of one timer.

A cancel scope for each read costs more than the read. Connections keep a `deadline` (in
`trio.current_time()` seconds, `math.inf` for none) that their own code moves as it goes; one
task looks at all of them once a second and calls `expire()` on those that are past it. So a
timeout is late by up to a second, which is right for silence that is measured in tens of seconds.
"""

from __future__ import annotations

from typing import Protocol

import trio


class Expiring(Protocol):
    """What a sweep can watch. `expire` must not raise and must not block."""

    deadline: float

    def expire(self) -> None:
        """Called once a second while the deadline lies in the past."""


class Sweep:
    """The set of watched connections; `with sweep.watching(connection): ...`."""

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = interval
        self._watched: set[Expiring] = set()

    def add(self, item: Expiring) -> None:
        """Watch `item` from now on."""
        self._watched.add(item)

    def discard(self, item: Expiring) -> None:
        """Forget `item`; harmless when it isn't watched."""
        self._watched.discard(item)

    def __len__(self) -> int:
        return len(self._watched)

    async def run(self) -> None:
        """Sweep for ever."""
        while True:
            await trio.sleep(self._interval)
            now = trio.current_time()
            for item in [item for item in self._watched if item.deadline <= now]:
                item.expire()
