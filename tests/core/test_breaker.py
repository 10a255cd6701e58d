"""The circuit breaker: its table, its tickets, and what no history can make it do."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from llamesh.config.sections import CircuitBreaker
from llamesh.core.breaker import TRANSITIONS, Breaker, Event, State, Ticket


def options(**more: Any) -> CircuitBreaker:
    """Opens after 3 failures for 1 s to 4 s, probes each half second, closes after 2 successes."""
    values: dict[str, Any] = {
        "failure_threshold": 3, "success_threshold": 2, "open_duration_base_ms": 1000,
        "open_duration_max_ms": 4000, "half_open_probe_interval_ms": 500,
    }  # fmt: skip
    return CircuitBreaker(**{**values, **more})


def taken(breaker: Breaker, now: float) -> Ticket:
    """A ticket that must be given."""
    ticket = breaker.ask(now)
    assert ticket is not None
    return ticket


def opened(now: float = 0.0, **more: Any) -> Breaker:
    """A breaker that opens at `now`."""
    breaker = Breaker(options(**more))
    for _ in range(breaker.options.failure_threshold):
        breaker.failure(taken(breaker, now), now)
    assert breaker.state is State.OPEN
    return breaker


def test_the_table_knows_what_can_happen_in_each_state() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {state: set(events) for state, events in TRANSITIONS.items()} == {
        State.CLOSED: {Event.SUCCESS, Event.FAILURE, Event.BROKEN, Event.OFF},
        State.OPEN: {Event.REST_OVER, Event.OFF},
        State.HALF_OPEN: {Event.SUCCESS, Event.WELL, Event.BROKEN, Event.OFF},
    }


class TestClosed:
    def test_everybody_may_send(self) -> None:
        breaker = Breaker(options())
        assert all(breaker.ask(0.0) for _ in range(100))
        assert breaker.allows(0.0)
        assert breaker.text(0.0) == ""

    def test_failures_in_a_row_open_it(self) -> None:
        breaker = Breaker(options())
        for _ in range(2):
            breaker.failure(taken(breaker, 0.0), 0.0)
        breaker.success(taken(breaker, 0.0), 0.0)
        for _ in range(2):
            breaker.failure(taken(breaker, 0.0), 0.0)
        assert breaker.state is State.CLOSED
        breaker.failure(taken(breaker, 0.0), 0.0)
        assert breaker.state is State.OPEN

    def test_a_cancelled_request_says_nothing(self) -> None:
        breaker = Breaker(options(failure_threshold=1))
        breaker.cancel(taken(breaker, 0.0))
        assert breaker.state is State.CLOSED

    def test_a_ticket_counts_once(self) -> None:
        breaker = Breaker(options())
        ticket = taken(breaker, 0.0)
        for _ in range(5):
            breaker.failure(ticket, 0.0)
        assert breaker.state is State.CLOSED


class TestOpen:
    def test_nobody_may_send_until_the_rest_is_over(self) -> None:
        breaker = opened(10.0)
        assert breaker.ask(10.9) is None
        assert not breaker.allows(10.9)
        assert breaker.text(10.5) == "it failed repeatedly and is left alone for another 0.5 s"
        assert breaker.allows(11.0)
        assert breaker.state is State.OPEN  # looking changes nothing
        assert breaker.ask(11.0)
        assert breaker.state is State.HALF_OPEN

    def test_each_time_it_rests_for_twice_as_long_up_to_the_limit(self) -> None:
        breaker, now = opened(), 0.0
        for rest in (1.0, 2.0, 4.0, 4.0, 4.0):
            assert breaker.ask(now + rest - 0.001) is None
            now += rest
            breaker.failure(taken(breaker, now), now)
            assert breaker.state is State.OPEN
        for _ in range(200):
            now += 4.0
            breaker.failure(taken(breaker, now), now)
        assert not breaker.allows(now + 3.9)

    def test_after_it_was_closed_it_begins_with_the_short_rest_again(self) -> None:
        breaker, now = opened(), 0.0
        for rest in (1.0, 2.0):
            now += rest
            breaker.failure(taken(breaker, now), now)
        now += 4.0
        breaker.success(taken(breaker, now), now)
        breaker.success(taken(breaker, now + 0.5), now + 0.5)
        assert breaker.state is State.CLOSED
        for _ in range(3):
            breaker.failure(taken(breaker, now + 1), now + 1)
        assert not breaker.allows(now + 1.9)
        assert breaker.allows(now + 2.0)

    def test_what_began_before_it_opened_doesn_t_count(self) -> None:
        breaker = Breaker(options())
        late = [taken(breaker, 0.0) for _ in range(10)]
        for _ in range(3):
            breaker.failure(taken(breaker, 0.0), 0.0)
        breaker.failure(late[0], 0.1)
        breaker.success(late[1], 0.1)
        assert breaker.state is State.OPEN
        assert breaker.allows(1.0)  # it rests no longer for it
        probe = taken(breaker, 1.0)
        for ticket in late[2:5]:
            breaker.success(ticket, 1.0)
        for ticket in late[5:]:
            breaker.failure(ticket, 1.0)
        assert breaker.state is State.HALF_OPEN
        breaker.success(probe, 1.1)
        breaker.success(taken(breaker, 1.5), 1.6)
        assert breaker.state is State.CLOSED


class TestHalfOpen:
    def test_one_probe_an_interval(self) -> None:
        breaker = opened()
        assert breaker.ask(1.0)
        assert breaker.ask(1.4) is None
        assert breaker.text(1.4) == "it failed repeatedly and is being tried; the next try is in 0.1 s"
        # The first hasn't come back; that blocks nobody.
        assert breaker.ask(1.5)
        assert breaker.ask(1.5) is None

    def test_without_an_interval_everybody_is_a_probe(self) -> None:
        breaker = opened(half_open_probe_interval_ms=0)
        assert all(breaker.ask(1.0) for _ in range(10))

    def test_a_failure_opens_it_again_and_the_other_probes_don_t_count(self) -> None:
        breaker = opened()
        first, second = taken(breaker, 1.0), taken(breaker, 1.5)
        breaker.failure(first, 1.6)
        assert breaker.state is State.OPEN
        breaker.success(second, 1.7)
        breaker.failure(second, 1.7)
        assert not breaker.allows(3.5)
        assert breaker.allows(3.6)
        taken(breaker, 3.6)
        assert breaker.state is State.HALF_OPEN

    def test_a_cancelled_probe_is_free_for_the_next(self) -> None:
        breaker = opened()
        for _ in range(5):
            breaker.cancel(taken(breaker, 1.0))
        probe = taken(breaker, 1.0)
        assert breaker.ask(1.1) is None
        breaker.success(probe, 1.2)
        breaker.cancel(probe)  # too late
        assert breaker.ask(1.3) is None

    def test_cancelling_an_older_probe_frees_nothing(self) -> None:
        breaker = opened()
        first = taken(breaker, 1.0)
        taken(breaker, 1.5)
        breaker.cancel(first)
        assert breaker.ask(1.6) is None

    def test_cancelling_gives_back_no_more_than_the_probe_took(self) -> None:
        breaker = opened()
        taken(breaker, 1.0)
        breaker.cancel(taken(breaker, 1.5))
        assert breaker.ask(1.4) is None  # a clock that stands still, or a look from before
        assert breaker.ask(1.5)


class TestOptions:
    def test_turned_off_it_never_opens(self) -> None:
        breaker = Breaker(options(enabled=False))
        for _ in range(100):
            breaker.failure(taken(breaker, 0.0), 0.0)
        assert breaker.state is State.CLOSED

    def test_turning_it_off_closes_it(self) -> None:
        breaker = opened()
        taken(breaker, 1.0)
        breaker.options = options(enabled=False)
        assert breaker.state is State.CLOSED
        assert all(breaker.ask(1.0) for _ in range(10))
        breaker.options = options()
        for _ in range(2):
            breaker.failure(taken(breaker, 1.0), 1.0)
        assert breaker.state is State.CLOSED
        assert breaker.options == options()

    def test_new_ones_hold_from_the_next_event_on(self) -> None:
        breaker = Breaker(options())
        breaker.failure(taken(breaker, 0.0), 0.0)
        breaker.options = options(failure_threshold=2, open_duration_base_ms=3000)
        breaker.failure(taken(breaker, 0.0), 0.0)
        assert breaker.state is State.OPEN
        assert not breaker.allows(2.9)


def test_repr_says_where_it_is() -> None:
    assert repr(opened()) == "<Breaker open, 0 failures, 0 successes, opened 1 times, generation 1>"


class History(RuleBasedStateMachine):
    """Any order of asking and answering, with answers that come whenever they like, against a model that
    judges by the tickets: each is remembered with the stay in a state in which it was given.
    """

    tickets: Bundle[tuple[Ticket, int, float]] = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(options())
        self.now = 0.0
        self.stay = 0
        self.state = State.CLOSED
        self.until = -math.inf
        self.rests = 0
        self.good = self.bad = 0
        self.probes: list[float] = []  # of this stay, without those that were cancelled

    def moved(self, state: State) -> None:
        self.state, self.stay = state, self.stay + 1
        self.good = self.bad = 0
        self.probes = []
        if state is State.OPEN:
            self.until = self.now + min(2.0**self.rests, 4.0)
            self.rests += 1
        if state is State.CLOSED:
            self.rests = 0

    @rule(seconds=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=tickets)
    def ask(self) -> tuple[Ticket, int, float]:
        allowed = self.breaker.allows(self.now)
        ticket = self.breaker.ask(self.now)
        assert allowed is (ticket is not None)
        if self.state is State.OPEN and self.now >= self.until:
            self.moved(State.HALF_OPEN)
        if ticket is None:
            if self.state is State.OPEN:
                assert self.now < self.until
            else:
                assert self.state is State.HALF_OPEN
                assert self.now - max(self.probes) < 0.5
            return Ticket(-1, 0.0), -1, self.now
        assert self.state is not State.OPEN
        if self.state is State.HALF_OPEN:
            assert all(self.now - probe >= 0.5 for probe in self.probes)
            self.probes.append(self.now)
        return ticket, self.stay, self.now

    @rule(given=consumes(tickets))
    def success(self, given: tuple[Ticket, int, float]) -> None:
        ticket, stay, _ = given
        for _ in range(2):  # the second time it is ignored
            self.breaker.success(ticket, self.now)
        if stay != self.stay:
            return
        self.good, self.bad = self.good + 1, 0
        if self.state is State.HALF_OPEN and self.good == 2:
            self.moved(State.CLOSED)

    @rule(given=consumes(tickets))
    def failure(self, given: tuple[Ticket, int, float]) -> None:
        ticket, stay, _ = given
        for _ in range(2):
            self.breaker.failure(ticket, self.now)
        if stay != self.stay:
            return
        self.bad += 1
        if self.state is State.HALF_OPEN or self.bad == 3:
            self.moved(State.OPEN)

    @rule(given=consumes(tickets))
    def cancel(self, given: tuple[Ticket, int, float]) -> None:
        ticket, stay, at = given
        self.breaker.cancel(ticket)
        if stay == self.stay and self.state is State.HALF_OPEN and at == self.probes[-1]:
            self.probes.pop()

    @invariant()
    def agree(self) -> None:
        assert self.breaker.state is self.state
        assert bool(self.breaker.text(self.now)) is not self.breaker.allows(self.now)


TestHistory = History.TestCase


@given(st.lists(st.sampled_from(["good", "bad"]), max_size=60))
def test_a_peer_that_answers_in_time_is_open_only_after_failures_in_a_row(answers: list[str]) -> None:
    breaker = Breaker(options())
    row = 0
    for answer in answers:
        ticket = taken(breaker, 0.0)
        if answer == "good":
            breaker.success(ticket, 0.0)
            row = 0
        else:
            breaker.failure(ticket, 0.0)
            row += 1
        assert (breaker.state is State.OPEN) is (row == 3)
        if row == 3:
            return
