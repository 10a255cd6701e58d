"""Room for one more instance, by count."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.capacity import Evict, Fits, Later, Never, Tenant, room_for_one
from llamesh.core.lifecycle import State

LIVE = [state for state in State if state is not State.GONE]


def tenant(id: str, state: State = State.READY, *, busy: bool = False, idle_since: float = 0.0) -> Tenant:  # noqa: A002
    return Tenant(id, "m:default", state, busy, idle_since)


def test_below_the_limit_it_fits() -> None:
    assert room_for_one([tenant("a", busy=True)], max_instances=2) == Fits()


def test_the_longest_idle_one_leaves() -> None:
    tenants = [tenant("a", idle_since=5), tenant("b", idle_since=2), tenant("c", busy=True, idle_since=1)]
    assert room_for_one(tenants, max_instances=3) == Evict(("b",))


def test_nobody_else_is_asked_to_leave_while_one_is_leaving() -> None:
    for state in (State.DRAINING, State.STOPPING):
        room = room_for_one([tenant("a"), tenant("b", state)], max_instances=2)
        assert room == Later("waiting for b to leave")


def test_busy_starting_and_pinned_ones_stay() -> None:
    pinned = Tenant("p", "m:default", State.READY, busy=False, idle_since=0, pinned=True)
    room = room_for_one([tenant("a", busy=True), tenant("b", State.STARTING), pinned], max_instances=3)
    assert room == Later("all 3 instances that this node may run are busy")


def test_a_limit_of_none_at_all() -> None:
    assert isinstance(room_for_one([], max_instances=0), Never)


tenants_lists = st.lists(
    st.builds(
        Tenant,
        id=st.uuids().map(str),
        profile=st.sampled_from(["a:default", "b:default"]),
        state=st.sampled_from(LIVE),
        busy=st.booleans(),
        idle_since=st.floats(0, 1e6),
        pinned=st.booleans(),
    ),
    max_size=6,
)


@given(tenants_lists, st.integers(0, 7))
def test_what_holds_for_every_answer(tenants: list[Tenant], limit: int) -> None:
    match room_for_one(tenants, max_instances=limit):
        case Fits():
            assert len(tenants) < limit
        case Evict(ids):
            assert len(tenants) >= limit > 0
            assert not any(t.state in (State.DRAINING, State.STOPPING) for t in tenants)
            [chosen] = [t for t in tenants if t.id in ids]
            assert chosen.state is State.READY
            assert not chosen.busy
            assert not chosen.pinned
            others = [t for t in tenants if t.state is State.READY and not t.busy and not t.pinned]
            assert chosen.idle_since == min(t.idle_since for t in others)
        case Later(reason):
            assert len(tenants) >= limit > 0
            assert reason
        case Never():
            assert limit == 0
