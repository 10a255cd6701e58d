"""The life of an instance. An instance is one OS process; it never restarts in place.

    STARTING   the process runs and isn't ready: port taken, memory reserved
    READY      it serves
    DRAINING   it finishes what it has and takes nothing new
    STOPPING   it was told to end
    GONE       the process has been reaped; everything that was reserved for it is free

The table is the documentation; a pair that is missing in it is a defect and raises.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where an instance is in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    GONE = "gone"


class Event(Enum):
    """What can happen to it."""

    HEALTHY = "healthy"  # /health answered 200 for the first time
    DRAIN = "drain"  # idle for too long, unloaded, evicted, or the node shuts down
    RESUME = "resume"  # the one for whom it was drained doesn't wait any more
    IDLE = "idle"  # the last lease ended
    STOP = "stop"  # don't wait for leases
    EXIT = "exit"  # the process ended, for whatever reason


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.STARTING: {
        Event.HEALTHY: State.READY,
        Event.DRAIN: State.STOPPING,
        Event.STOP: State.STOPPING,
        Event.EXIT: State.GONE,
    },
    State.READY: {
        Event.DRAIN: State.DRAINING,
        Event.STOP: State.STOPPING,
        Event.EXIT: State.GONE,
    },
    State.DRAINING: {
        Event.DRAIN: State.DRAINING,
        Event.RESUME: State.READY,
        Event.IDLE: State.STOPPING,
        Event.STOP: State.STOPPING,
        Event.EXIT: State.GONE,
    },
    State.STOPPING: {
        Event.DRAIN: State.STOPPING,
        Event.STOP: State.STOPPING,
        Event.EXIT: State.GONE,
    },
    State.GONE: {},
}


class IllegalTransition(Exception):
    """The table has no such pair: a defect in whoever sent the event."""


def step(state: State, event: Event) -> State:
    """The state after `event`. Raises IllegalTransition."""
    try:
        return TRANSITIONS[state][event]
    except KeyError:
        raise IllegalTransition(f"an instance that is {state.value} can't take {event.value!r}") from None
