"""Where the head of a queue goes: the numbered cases, and what holds in all of them."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.capacity import Evict, Fits, Later, Never, Room
from llamesh.core.lifecycle import State
from llamesh.core.placement import Placement, Refuse, Serve, Spawn, Wait, choose, place


@dataclass(frozen=True)
class One:
    """An instance as placement sees it."""

    state: State
    slots: int
    busy_slots: int = 0
    last_used: float = 0.0

    @property
    def free_slots(self) -> int:
        return self.slots - self.busy_slots if self.state is State.READY else 0


STARTING = One(State.STARTING, 1)
FULL = One(State.READY, 2, 2)
FREE = One(State.READY, 2, 1)
LEAVING = One(State.DRAINING, 4, 1)


def decide(
    *candidates: One,
    waiting: int = 1,
    expected: int = 1,
    most: int = 2,
    room: Room = Fits(),  # noqa: B008 - frozen
    resting: bool = False,
) -> Placement:
    return place(
        candidates, waiting=waiting, slots_expected=expected, max_instances=most, room=room, resting=resting
    )


@pytest.mark.parametrize(
    ("decision", "expected"),
    [
        # 1. A free slot, whatever else.
        (decide(FULL, FREE, room=Never("x"), resting=True, most=0), Serve(1)),
        # 2. Listed only.
        (decide(most=0), Refuse("its max_instances is 0: it is listed, but not run on this node")),
        # 3. Enough on the way.
        (decide(STARTING), Wait("loading")),
        (decide(STARTING, waiting=4, expected=4), Wait("loading")),
        (decide(STARTING, waiting=5, expected=4), Spawn()),
        (decide(STARTING, waiting=1, expected=0), Wait("loading")),
        # 4. All instances that it may have.
        (decide(FULL, most=1), Wait("queued")),
        (decide(LEAVING, FULL, most=2), Wait("queued")),
        (decide(LEAVING, most=1), Wait("waiting for its own last instance to leave")),
        (decide(STARTING, waiting=9, most=1), Wait("loading")),
        # 5. After a failed start.
        (decide(resting=True), Wait("waiting before the next try to start it")),
        # 6. What the machine says.
        (decide(), Spawn()),
        (decide(FULL), Spawn()),
        (decide(room=Fits(on_cpu=True)), Spawn(on_cpu=True)),
        (decide(room=Evict(("a", "b"))), Spawn(("a", "b"))),
        (decide(room=Evict(("a",), on_cpu=True)), Spawn(("a",), on_cpu=True)),
        (decide(room=Later("soon")), Wait("soon")),
        (decide(room=Never("too big")), Refuse("too big")),
    ],
)
def test_cases(decision: Placement, expected: Placement) -> None:
    assert decision == expected


@pytest.mark.parametrize(
    ("candidates", "index"),
    [
        ([], -1),
        ([FULL, STARTING, LEAVING], -1),
        ([One(State.READY, 4, 2), One(State.READY, 4, 1)], 1),
        ([One(State.READY, 2, 1), One(State.READY, 9, 2)], 0),
        # Among equals the one used last.
        ([One(State.READY, 2, 1, 5.0), One(State.READY, 2, 1, 7.0), One(State.READY, 2, 1, 6.0)], 1),
        ([One(State.READY, 2, 1, 5.0), One(State.READY, 2, 1, 5.0)], 0),
    ],
)
def test_choose(candidates: list[One], index: int) -> None:
    assert choose(candidates) == index


@pytest.mark.parametrize(
    ("warm", "busy", "index"),
    [
        ([0.0, 0.9, 0.5], (0, 3, 0), 1),
        # Who has no slot doesn't count, and what is nearly as much is as good.
        ([0.0, 0.9, 0.5], (0, 4, 0), 2),
        ([0.85, 0.9, 0.5], (0, 3, 0), 0),
        ([0.0, 0.0, 0.05], (1, 0, 1), 1),
        ([], (1, 1, 0), 2),
    ],
)
def test_choose_where_the_prompt_was_read(warm: list[float], busy: tuple[int, ...], index: int) -> None:
    assert choose([One(State.READY, 4, taken) for taken in busy], warm) == index


rooms = st.one_of(st.just(Fits()), st.just(Evict(("x",))), st.just(Later("later")), st.just(Never("never")))
instances = st.integers(1, 4).flatmap(
    lambda slots: st.builds(
        One,
        state=st.sampled_from([s for s in State if s is not State.GONE]),
        slots=st.just(slots),
        busy_slots=st.integers(0, slots),
        last_used=st.floats(0, 100),
    )
)


@given(
    st.lists(instances, max_size=5),
    st.integers(1, 20),
    st.integers(0, 8),
    st.integers(0, 6),
    rooms,
    st.booleans(),
)
def test_what_holds_for_every_answer(
    candidates: list[One], waiting: int, expected: int, most: int, room: Room, resting: bool
) -> None:
    free = [index for index, one in enumerate(candidates) if one.free_slots > 0]
    starting = sum(one.state is State.STARTING for one in candidates)
    answer = decide(*candidates, waiting=waiting, expected=expected, most=most, room=room, resting=resting)
    match answer:
        case Serve(index):
            assert index in free
            assert candidates[index].busy_slots == min(candidates[i].busy_slots for i in free)
        case Spawn(evict):
            assert not free
            assert len(candidates) < most
            assert not resting
            assert starting * max(1, expected) < waiting
            assert room == (Evict(evict) if evict else Fits())
        case Wait(reason):
            assert not free
            assert most > 0
            assert reason
        case Refuse():
            assert not free
            # Nobody is sent away for lack of room while an instance is about to serve them.
            assert most == 0 or (room == Never("never") and starting * max(1, expected) < waiting)
