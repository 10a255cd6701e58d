"""The table of an instance's life, pair by pair and in long sequences."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.lifecycle import TRANSITIONS, Event, IllegalTransition, State, step

S, E = State, Event

ROWS = [
    (S.STARTING, E.HEALTHY, S.READY),
    (S.STARTING, E.DRAIN, S.STOPPING),
    (S.STARTING, E.STOP, S.STOPPING),
    (S.STARTING, E.EXIT, S.GONE),
    (S.READY, E.DRAIN, S.DRAINING),
    (S.READY, E.STOP, S.STOPPING),
    (S.READY, E.EXIT, S.GONE),
    (S.DRAINING, E.DRAIN, S.DRAINING),
    (S.DRAINING, E.RESUME, S.READY),
    (S.DRAINING, E.IDLE, S.STOPPING),
    (S.DRAINING, E.STOP, S.STOPPING),
    (S.DRAINING, E.EXIT, S.GONE),
    (S.STOPPING, E.DRAIN, S.STOPPING),
    (S.STOPPING, E.STOP, S.STOPPING),
    (S.STOPPING, E.EXIT, S.GONE),
]


@pytest.mark.parametrize(("state", "event", "after"), ROWS)
def test_legal_steps(state: State, event: Event, after: State) -> None:
    assert step(state, event) is after


@pytest.mark.parametrize(
    ("state", "event"),
    [pair for pair in itertools.product(State, Event) if pair not in {(s, e) for s, e, _ in ROWS}],
)
def test_everything_else_is_refused_and_named(state: State, event: Event) -> None:
    with pytest.raises(IllegalTransition, match=f"{state.value} can't take .*{event.value}"):
        step(state, event)


def test_the_table_speaks_of_every_state() -> None:
    assert set(TRANSITIONS) == set(State)


def run(events: list[Event]) -> list[State]:
    """The states of one life; an illegal event changes nothing."""
    states = [State.STARTING]
    for event in events:
        try:
            states.append(step(states[-1], event))
        except IllegalTransition:
            states.append(states[-1])
    return states


@given(st.lists(st.sampled_from(Event)))
def test_exit_ends_every_life_for_good(events: list[Event]) -> None:
    states = run([*events, Event.EXIT, *events])
    assert states[len(events) + 1] is State.GONE
    assert set(states[len(events) + 1 :]) == {State.GONE}


@given(st.lists(st.sampled_from(Event)))
def test_life_goes_back_only_from_draining_and_only_when_resumed(events: list[Event]) -> None:
    order, states = list(State), run(events)
    for event, before, after in zip(events, states, states[1:], strict=False):
        if order.index(after) < order.index(before):
            assert (event, before, after) == (Event.RESUME, State.DRAINING, State.READY)


@given(st.lists(st.sampled_from(Event)))
def test_told_to_end_it_never_serves_again(events: list[Event]) -> None:
    states = run([Event.STOP, *events])
    assert State.READY not in states
    assert State.DRAINING not in states
