"""What somebody outside can bring about again and again is mentioned in the log now and then only."""

from __future__ import annotations

import trio

from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

REPEAT_SECONDS = 60.0

# Of different things in that time. Who has many addresses can make many of them.
MOST_AT_ONCE = 40

_MOST_KEYS = 1024


class Mentions:
    """Asks for each line whether it is due. How many weren't is said, too."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # the oldest first
        self._since = float("-inf")
        self._count = self._untold = 0

    def due(self, key: str) -> bool:
        """Whether to mention what `key` stands for; it counts as mentioned then."""
        now = trio.current_time()
        if now - self._last.get(key, float("-inf")) < REPEAT_SECONDS:
            return False
        if now - self._since >= REPEAT_SECONDS:
            if self._untold:
                log.warning("more of the kind wasn't mentioned, there was too much of it", lines=self._untold)
            self._since, self._count, self._untold = now, 0, 0
        if self._count >= MOST_AT_ONCE:
            self._untold += 1
            return False
        self._count += 1
        self._last.pop(key, None)
        while len(self._last) >= _MOST_KEYS:
            del self._last[next(iter(self._last))]
        self._last[key] = now
        return True
