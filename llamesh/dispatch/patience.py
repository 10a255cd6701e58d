"""How long somebody in a queue may still wait, and what for."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from llamesh.config.current import Current
from llamesh.core.lifecycle import State
from llamesh.dispatch.lease import loading_info
from llamesh.errors import QueueTimeout
from llamesh.local.instance import Instance
from llamesh.local.pool import Pool
from llamesh.telemetry.learned import LearnedValues

if TYPE_CHECKING:
    from llamesh.dispatch.ticket import Ticket

# While the awaited model loads, its progress stands for this long before the waiter's clock goes on.
_PROGRESS_HOLDS = 5.0

# A waiter looks at its budget this often (seconds); being late by this much is fine for a queue.
_SLICE = 0.5
_SHORTEST = 0.005


class Patience:
    """Counts the waiting of tickets against `max_wait_in_queue_ms`."""

    def __init__(self, current: Current, pool: Pool, learned: LearnedValues) -> None:
        self._current = current
        self._pool = pool
        self._learned = learned

    @property
    def _node(self) -> str:
        return self._current.settings.node_id

    def _loading(self, key: str) -> Instance | None:
        """The instance that loads, of several the one that moved last."""
        starting = [i for i in self._pool.instances(key) if i.state is State.STARTING]
        return max(starting, key=lambda i: i.last_progress) if starting else None

    def charge(self, ticket: Ticket, now: float) -> float:
        """Count the time since the last look against the ticket's budget, unless a load progresses.

        When to look again, in seconds from now. Raises QueueTimeout.
        """
        line = ticket._line
        profile = line.profile
        limit = profile.max_wait_in_queue_ms
        if limit is None:
            limit = self._current.settings.model_defaults.max_wait_in_queue_ms
        if not limit:
            return math.inf
        spent, looked = line.spent.get(ticket, (0.0, now))
        loading = self._loading(profile.key)
        moved = self._pool.weights.moved(profile) if loading is None else loading.last_progress
        if now - moved > _PROGRESS_HOLDS:
            spent += now - looked
        line.spent[ticket] = (spent, now)
        if spent * 1000 >= limit:
            coming = self.loading_info(loading) if loading else self._pool.weights.told(profile, self._node)
            extra = {"loading": coming} if coming else {}
            raise QueueTimeout(
                f"{profile.key} on node {self._node}: no slot within {limit} ms ({self.describe(ticket)})",
                extra=extra,
            )
        # Never at once: while the clock stands still, what is left doesn't shrink.
        return min(_SLICE, max(limit / 1000 - spent, _SHORTEST))

    def loading_info(self, instance: Instance) -> dict[str, object]:
        """The `loading` member of a refusal."""
        return loading_info(instance, self._node, self._learned.of(instance.profile.key).load_seconds)

    def describe(self, ticket: Ticket) -> str:
        key = ticket.ask.profile.key
        loading = self._loading(key)
        if loading is not None:
            return f"loading {key} for {trio.current_time() - loading.created:.0f} s"
        if (download := self._pool.weights.progress(ticket.ask.profile)) is not None:
            return f"{download}, for {key}"
        line = ticket._line
        ahead = line.tickets.index(ticket) if ticket in line.tickets else 0
        if line.reason and line.reason != "queued":
            return f"{line.reason}; {ahead} ahead"
        return f"queued for {key}, {ahead} ahead"
