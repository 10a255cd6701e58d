"""Leave a failing peer alone, and find out carefully when it is well again.

    CLOSED      all is well; `failure_threshold` failures in a row open it
    OPEN        nobody is sent there, for base x 2^n, at most `open_duration_max_ms`; n counts how often
                it has opened since it was closed
    HALF_OPEN   one request per `half_open_probe_interval_ms` may try; `success_threshold` successes
                close it, one failure opens it again

Whoever wants to send asks for a ticket and brings it back once: with success, with failure, or cancelled
(the client left, nothing was learned), which frees the probe for the next one. A ticket belongs to
the state in which it was given: when a request that began before the breaker opened comes back
afterwards, it says nothing about now, so it doesn't count. A probe that never comes back blocks nobody:
the next one may go when the interval is over.

Times are seconds of any monotonic clock, given as `now`.
"""

from __future__ import annotations

import math
from enum import Enum

from llamesh.config.sections import CircuitBreaker


class State(Enum):
    """Where a breaker is."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Event(Enum):
    """What can happen to it."""

    SUCCESS = "success"  # a ticket came back, and more successes are needed
    FAILURE = "failure"  # a ticket came back, and more failures are needed (half open: one is enough)
    WELL = "well"  # with this success there were enough
    BROKEN = "broken"  # with this failure there were enough
    REST_OVER = "rest over"  # it has been open for long enough
    OFF = "off"  # breakers were turned off


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.CLOSED: {
        Event.SUCCESS: State.CLOSED,
        Event.FAILURE: State.CLOSED,
        Event.BROKEN: State.OPEN,
        Event.OFF: State.CLOSED,
    },
    State.OPEN: {
        Event.REST_OVER: State.HALF_OPEN,
        Event.OFF: State.CLOSED,
    },
    State.HALF_OPEN: {
        Event.SUCCESS: State.HALF_OPEN,
        Event.WELL: State.CLOSED,
        Event.BROKEN: State.OPEN,
        Event.OFF: State.CLOSED,
    },
}

# 2^n past this is above any `open_duration_max_ms`; it keeps n from growing without end.
_MOST_DOUBLINGS = 40


class Ticket:
    """Leave to send one request. Bring it back once; what comes after that is ignored."""

    __slots__ = ("_before", "_generation", "_given")

    def __init__(self, generation: int, before: float) -> None:
        self._generation = generation
        self._before = before  # when this probe was allowed at the earliest
        self._given = True


class Breaker:
    """One peer's breaker. With `options.enabled` false it stays closed."""

    __slots__ = (
        "_failures", "_generation", "_last", "_next_probe", "_opened", "_options", "_successes", "_until",
        "state",
    )  # fmt: skip

    def __init__(self, options: CircuitBreaker) -> None:
        self._options = options
        self.state = State.CLOSED
        self._generation = 0
        self._failures = 0  # in a row, while closed
        self._successes = 0  # while half open
        self._opened = 0  # since it was closed for the last time
        self._until = -math.inf  # open until then
        self._next_probe = -math.inf
        self._last: Ticket | None = None  # the probe that was given last

    @property
    def options(self) -> CircuitBreaker:
        """They may be replaced at any time, and hold from the next event on."""
        return self._options

    @options.setter
    def options(self, options: CircuitBreaker) -> None:
        self._options = options
        if not options.enabled:
            self._failures = 0
            self._step(Event.OFF, -math.inf)

    def allows(self, now: float) -> bool:
        """Whether `ask` would give a ticket now. Changes nothing."""
        if self.state is State.CLOSED:
            return True
        return now >= (self._until if self.state is State.OPEN else self._next_probe)

    def ask(self, now: float) -> Ticket | None:
        """Leave to send one request; None: not now."""
        if not self.allows(now):
            return None
        if self.state is State.CLOSED:
            return Ticket(self._generation, now)
        if self.state is State.OPEN:
            self._step(Event.REST_OVER, now)
        self._last = Ticket(self._generation, self._next_probe)
        self._next_probe = now + self._options.half_open_probe_interval_ms / 1000
        return self._last

    def success(self, ticket: Ticket, now: float) -> None:
        """The peer answered."""
        if not self._take(ticket):
            return
        if self.state is State.CLOSED:
            self._failures = 0
            self._step(Event.SUCCESS, now)
            return
        self._successes += 1
        enough = self._successes >= self._options.success_threshold
        self._step(Event.WELL if enough else Event.SUCCESS, now)

    def failure(self, ticket: Ticket, now: float) -> None:
        """The peer didn't answer, or broke off."""
        if not self._take(ticket):
            return
        if self.state is State.CLOSED:
            self._failures += 1
            enough = self._failures >= self._options.failure_threshold
            self._step(Event.BROKEN if enough else Event.FAILURE, now)
            return
        self._step(Event.BROKEN, now)

    def cancel(self, ticket: Ticket) -> None:
        """Nothing was learned: the client left, or nothing was sent at all."""
        if self._take(ticket) and ticket is self._last:
            self._next_probe = ticket._before

    def text(self, now: float) -> str:
        """For people: why the peer isn't sent anything, "" when it is."""
        if self.allows(now):
            return ""
        if self.state is State.OPEN:
            return f"it failed repeatedly and is left alone for another {self._until - now:.1f} s"
        return f"it failed repeatedly and is being tried; the next try is in {self._next_probe - now:.1f} s"

    def __repr__(self) -> str:
        return (
            f"<Breaker {self.state.value}, {self._failures} failures, {self._successes} successes, "
            f"opened {self._opened} times, generation {self._generation}>"
        )

    def _take(self, ticket: Ticket) -> bool:
        """Take the ticket back; whether it counts."""
        given, ticket._given = ticket._given, False
        return given and ticket._generation == self._generation and self._options.enabled

    def _step(self, event: Event, now: float) -> None:
        before, self.state = self.state, TRANSITIONS[self.state][event]
        if self.state is before:
            return
        # Whatever is still under way was asked for in another state.
        self._generation += 1
        self._failures = self._successes = 0
        self._last = None
        self._next_probe = -math.inf
        if self.state is State.OPEN:
            options = self._options
            rest = options.open_duration_base_ms * 2 ** min(self._opened, _MOST_DOUBLINGS)
            self._until = now + min(rest, options.open_duration_max_ms) / 1000
            self._opened += 1
        elif self.state is State.CLOSED:
            self._opened = 0
