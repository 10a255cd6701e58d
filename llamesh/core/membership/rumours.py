"""News about lives that rides on whatever is written anyway.

A rumour is told about 3 log2(N + 1) times and then forgotten: by then nearly everybody has heard it, and
anti-entropy reaches the rest. What was told least goes first.
"""

from __future__ import annotations

import heapq
import math

from llamesh.core.membership.records import Life


class Rumours:
    """At most one for each node: the greatest life heard."""

    __slots__ = ("_limit", "_news")

    def __init__(self, limit: int) -> None:
        self._limit = limit  # how many are kept at all
        self._news: dict[str, tuple[int, Life]] = {}  # id -> how often told, what

    def __len__(self) -> int:
        return len(self._news)

    def add(self, node_id: str, life: Life) -> bool:
        """Returns whether this is more than what is told already."""
        known = self._news.get(node_id)
        if known is not None and known[1] >= life:
            return False
        if known is None and len(self._news) >= self._limit:
            return False
        self._news[node_id] = (0, life)
        return True

    def take(self, most: int, members: int) -> list[tuple[str, Life]]:
        """What the next message carries, counted as told."""
        if not self._news:
            return []
        times = 3 * math.ceil(math.log2(members + 1))
        chosen = heapq.nsmallest(most, self._news.items(), key=lambda item: item[1][0])
        for node_id, (told, life) in chosen:
            if told + 1 >= times:
                del self._news[node_id]
            else:
                self._news[node_id] = (told + 1, life)
        return [(node_id, life) for node_id, (_, life) in chosen]
