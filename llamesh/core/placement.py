"""Where does the request at the head of a profile's queue go?

`place` is asked whenever something changed (a request came, a slot got free, an instance became
ready, failed or left), and its answer is carried out at once, without an await in between. It is
narrated as numbered cases; the first that holds is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from llamesh.core.capacity import Evict, Fits, Later, Never, Room
from llamesh.core.lifecycle import State


class Candidate(Protocol):
    """What placement looks at in an instance. Live instances have these; so do test values."""

    @property
    def state(self) -> State: ...
    @property
    def free_slots(self) -> int: ...
    @property
    def busy_slots(self) -> int: ...
    @property
    def last_used(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Serve:
    """Give the request a slot of the candidate with this index."""

    index: int


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start another instance, after draining `evict`; the request keeps waiting."""

    evict: tuple[str, ...] = ()
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do until something changes; `reason` is for people."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """This request can't be served here, now or later; `failed`: not for want of room."""

    reason: str
    failed: bool = False


Placement = Serve | Spawn | Wait | Refuse


# Shares of a prompt that are in the caches of two instances and differ by less than this are alike.
_ALIKE = 0.1


def choose(candidates: Sequence[Candidate], warm: Sequence[float] = ()) -> int:
    """Index of the instance to serve the next request, -1 for none.

    The least busy one, so that a decode shares its instance with as few others as possible; among
    equals the one used last, so that the others may become idle and leave. `warm`: the share of the
    prompt that each has in its cache, where that is known: those with clearly less than the best are out.
    """
    least = 0.0
    if warm:
        free = (share for one, share in zip(candidates, warm, strict=True) if one.free_slots > 0)
        least = max(free, default=0.0) - _ALIKE
    best = -1
    for index, one in enumerate(candidates):
        if one.free_slots <= 0 or (warm and warm[index] < least):
            continue
        if best < 0:
            best = index
            continue
        other = candidates[best]
        if (one.busy_slots, -one.last_used) < (other.busy_slots, -other.last_used):
            best = index
    return best


def place(
    candidates: Sequence[Candidate],
    *,
    waiting: int,
    slots_expected: int,
    max_instances: int,
    room: Room,
    resting: bool = False,
) -> Placement:
    """Decide for the head of the queue.

    `candidates`: the profile's instances that are not GONE. `waiting`: requests in its queue, the
    head included. `slots_expected`: how many requests one starting instance will be able to take.
    `room`: what `capacity` says about one more. `resting`: a start failed a moment ago and the
    next one isn't due yet.
    """
    # 1. A free slot: the reason why anyone waits.
    index = choose(candidates)
    if index >= 0:
        return Serve(index)
    # 2. Listed, but never run here.
    if max_instances < 1:
        return Refuse("its max_instances is 0: it is listed, but not run on this node")
    # 3. Enough is on the way for everyone who waits.
    starting = sum(1 for one in candidates if one.state is State.STARTING)
    if starting and starting * max(1, slots_expected) >= waiting:
        return Wait("loading")
    # 4. The profile has all the instances it may have; those that leave count until they left.
    if len(candidates) >= max_instances:
        if starting:
            return Wait("loading")
        serving = any(one.state is State.READY for one in candidates)
        return Wait("queued" if serving else "waiting for its own last instance to leave")
    # 5. It just failed to start: its next try has a time of its own.
    if resting:
        return Wait("waiting before the next try to start it")
    # 6. What the machine has room for.
    match room:
        case Fits(on_cpu):
            return Spawn(on_cpu=on_cpu)
        case Evict(ids, on_cpu):
            return Spawn(ids, on_cpu=on_cpu)
        case Later(reason):
            return Wait(reason)
        case Never(reason, failed):
            return Refuse(reason, failed)
