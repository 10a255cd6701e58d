"""May one more instance start on this machine, and what has to leave for it?

Counts of instances decide here today. Memory joins as further terms of the same question: the
answer (`Fits`, `Evict`, `Later`, `Never`) stays what it is, and so do its users.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llamesh.core.lifecycle import State


@dataclass(frozen=True, slots=True)
class Tenant:
    """An instance that takes up room. `idle_since` is in seconds of any monotonic clock."""

    id: str
    profile: str
    state: State
    busy: bool
    idle_since: float
    pinned: bool = False  # one of its profile's `min_instances`


@dataclass(frozen=True, slots=True)
class Fits:
    """Start it now."""


@dataclass(frozen=True, slots=True)
class Evict:
    """Drain these first, in this order; start when they are gone."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Later:
    """There is room in principle, but everything there is busy or leaving already."""

    reason: str


@dataclass(frozen=True, slots=True)
class Never:
    """It can't fit even on an empty machine. `reason` completes "can't start X: ..."."""

    reason: str


Room = Fits | Evict | Later | Never


def room_for_one(tenants: Sequence[Tenant], *, max_instances: int) -> Room:
    """Room for one more instance beside `tenants` (those that are not GONE).

    Evicts at most one: the instance that has been idle for longest. Instances that are leaving
    count until they have left, since their memory does.
    """
    if max_instances < 1:
        return Never("max_instances_per_node is 0")
    if len(tenants) < max_instances:
        return Fits()
    leaving = [t for t in tenants if t.state in (State.DRAINING, State.STOPPING)]
    if leaving:
        return Later(f"waiting for {leaving[0].id} to leave")
    idle = [t for t in tenants if t.state is State.READY and not t.busy and not t.pinned]
    if not idle:
        return Later(f"all {len(tenants)} instances that this node may run are busy")
    return Evict((min(idle, key=lambda t: t.idle_since).id,))
