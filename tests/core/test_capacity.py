"""Room for one more instance: the rule case by case, and what holds for every answer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamesh.core.capacity import (
    LEAVING,
    Budget,
    Evict,
    Fits,
    Later,
    Need,
    Never,
    Room,
    Tenant,
    keep_value,
    over_budget,
    room,
    room_beside_text,
)
from llamesh.core.lifecycle import State

GPU = Budget(100, vram=1000, vram_now=1000)


def tenant(
    id: str,  # noqa: A002
    vram: int = 0,
    *,
    state: State = State.READY,
    busy: bool = False,
    value: float = 1.0,
    settled: bool = True,
    pinned: bool = False,
    text: bool = True,
    sysmem: int = 0,
) -> Tenant:
    return Tenant(id, state, busy, Need(vram, sysmem), value, settled, pinned, text)


STRANGERS = Budget(100, vram=1000, sysmem=1000, vram_now=300, sysmem_now=-5)
HALVES = [tenant("a", 500), tenant("b", 500)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # 1. What can never fit, whoever else is there.
        (room(Need(1001), [tenant("a", 10)], GPU), Never("it needs about 1001 MiB of GPU memory; 1000 MiB ")),
        (room(Need(1), [], Budget(9, vram=0)), Never("it needs about 1 MiB of GPU memory; 0 MiB may be")),
        (
            room(Need(0, 9), [], Budget(9, sysmem=8)),
            Never("it needs about 9 MiB of memory; 8 MiB may be used"),
        ),
        (room(Need(), [], Budget(0)), Never("max_instances_per_node is 0")),
        # 2. What strangers leave no room for.
        (
            room(Need(301), [tenant("a", 10)], STRANGERS),
            Never("it needs about 301 MiB of GPU memory; other "),
        ),
        (
            room(Need(0, 1), [], STRANGERS),
            Never("it needs about 1 MiB of memory; other programs leave 0 MiB"),
        ),
        # 3. It fits, or will when somebody has left.
        (room(Need(1000), [], GPU), Fits()),
        (room(Need(500), [tenant("a", 500)], GPU), Fits()),
        (room(Need(9999, 9999), [tenant("a", 500)], Budget(2)), Fits()),
        (room(Need(0, 5), [tenant("a", 2000)], GPU), Fits()),  # a shortage of what it doesn't want
        (room(Need(), [tenant("a", 300, sysmem=5)], STRANGERS), Fits()),
        (
            room(Need(500), [tenant("a", 500, state=State.DRAINING, busy=True), tenant("b", 500)], GPU),
            Later("waiting for a to leave"),
        ),
        (
            room(Need(), [tenant("a"), tenant("b", state=State.STOPPING)], Budget(2)),
            Later("waiting for b to leave"),
        ),
        # 4. The fewest idle ones, then the least valuable.
        (room(Need(500), [tenant("a", 500, value=2), tenant("b", 500)], GPU), Evict(("b",))),
        (room(Need(900), [tenant("a", 100), tenant("b", 800, value=99)], GPU), Evict(("b",))),
        (room(Need(900), HALVES, GPU), Evict(("a", "b"))),
        (room(Need(), [tenant("a", value=3), tenant("b", value=2)], Budget(2)), Evict(("b",))),
        (
            room(Need(600), [tenant("a", 400, state=State.STOPPING), *HALVES[:1]], Budget(9, 1000)),
            Evict(("a",)),
        ),
        (
            room(Need(10, 10), [tenant("a", 1000), tenant("b", sysmem=50)], Budget(9, 1000, 50)),
            Evict(("a", "b")),
        ),
        # 5. Busy ones when idle ones don't do and their tenure is over.
        (room(Need(500), [tenant("a", 500, busy=True), tenant("b", 500, value=9)], GPU), Evict(("b",))),
        (room(Need(900), [replace(HALVES[0], busy=True), HALVES[1]], GPU), Evict(("b", "a"))),
        (
            room(Need(900), [tenant("a", 1000, busy=True, settled=False)], GPU),
            Later("waiting for room: a is in use"),
        ),
        (
            room(Need(900), [tenant("a", 900, state=State.STARTING), tenant("b", 50)], GPU),
            Later("waiting for room: a is loading"),
        ),
        (
            room(Need(900), [tenant("a", 900, pinned=True), tenant("b", 50)], GPU),
            Later("no room beside what is kept loaded (min_instances): a"),
        ),
        # 6. Small models don't send text models away.
        (room(Need(900), [tenant("a", 900)], GPU, is_text=False), Later("waiting for room: a is in use")),
        (room(Need(900), [tenant("a", 900, text=False)], GPU, is_text=False), Evict(("a",))),
        # Room that is being made for somebody is theirs: what leaves for them isn't to be had, ...
        (
            room(Need(500), [tenant("a", 1000, state=State.STOPPING)], GPU, promised=[tenant("n", 900)]),
            Later("waiting for room: n is in use"),
        ),
        # ... what is left beside them is, ...
        (
            room(Need(100), [tenant("a", 900, state=State.STOPPING)], GPU, promised=[tenant("n", 900)]),
            Fits(),
        ),
        # ... but only when it is there, too.
        (
            room(Need(100), [tenant("a", 950, state=State.STOPPING)], GPU, promised=[tenant("n", 900)]),
            Later("waiting for a to leave"),
        ),
    ],
)
def test_cases(answer: Room, expected: Room) -> None:
    if isinstance(expected, Evict):
        assert isinstance(answer, Evict)
        assert set(answer.ids) == set(expected.ids) or expected == answer
    elif isinstance(expected, Never):
        assert isinstance(answer, Never)
        assert answer.reason.startswith(expected.reason)
    else:
        assert answer == expected


TEXT = tenant("t", 900, sysmem=50)


@pytest.mark.parametrize(
    ("tenants", "cpu_only", "budget", "expected"),
    [
        ([], Need(0, 300), Budget(9, 1000, 400), Fits()),
        ([TEXT], Need(0, 300), Budget(9, 1000, 400), Fits(on_cpu=True)),
        ([tenant("e", 900, text=False)], Need(0, 300), Budget(9, 1000, 400), Fits(on_cpu=True)),
        ([tenant("e", 900, text=False)], None, Budget(9, 1000), Evict(("e",))),
        (
            [TEXT, tenant("e", sysmem=300, text=False)],
            Need(0, 300),
            Budget(9, 1000, 400),
            Evict(("e",), on_cpu=True),
        ),
        # There will be a place beside the text model.
        (
            [TEXT, tenant("e", sysmem=300, text=False, busy=True, settled=False)],
            Need(0, 300),
            Budget(9, 1000, 400),
            Later("waiting for room: t is in use"),
        ),
        # There never will.
        ([TEXT], Need(0, 500), Budget(9, 1000, 400), Evict(("t",))),
        ([TEXT], None, Budget(9, 1000), Evict(("t",))),
        ([TEXT], Need(0, 300), Budget(1, 1000, 400), Evict(("t",))),
        (
            [TEXT, tenant("e", sysmem=300, text=False, pinned=True)],
            Need(0, 300),
            Budget(9, 1000, 400),
            Evict(("t",)),
        ),
    ],
)
def test_embeddings_beside_text(
    tenants: list[Tenant], cpu_only: Need | None, budget: Budget, expected: Room
) -> None:
    answer = room_beside_text(Need(200), cpu_only, tenants, budget)
    if isinstance(expected, Later):
        assert isinstance(answer, Later)
    else:
        assert answer == expected


def test_worth_of_keeping() -> None:
    assert keep_value(10, 0) == 10
    assert keep_value(10, 600) == 5
    assert keep_value(40, 1200) == 10
    assert keep_value(5, 0) < keep_value(60, 1200)  # dear to load beats used just now


@pytest.mark.parametrize(
    ("tenants", "now", "expected"),
    [
        ([tenant("a", 500), tenant("b", 500)], 1000, ()),
        # Idle before busy, least valuable first, no more than needed.
        ([tenant("a", 500, value=2), tenant("b", 500)], 999, ("b",)),
        ([tenant("a", 500, busy=True, value=0), tenant("b", 500, value=9)], 999, ("b",)),
        ([tenant("a", 500, busy=True, settled=False), tenant("b", 500)], 100, ("b", "a")),
        ([tenant("a", 500, pinned=True, value=0), tenant("b", 500)], 999, ("b",)),
        ([tenant("a", 500, pinned=True), tenant("b", 500, busy=True)], 999, ("a",)),
        # Those who have nothing of it stay, and so do starting ones; leaving ones are on their way.
        ([tenant("a", 0, value=0), tenant("b", 500)], 400, ("b",)),
        ([tenant("a", 600, state=State.STARTING), tenant("b", 500)], 100, ("b",)),
        ([tenant("a", 600, state=State.DRAINING), tenant("b", 500)], 500, ()),
    ],
)
def test_strangers_took_memory(tenants: list[Tenant], now: int, expected: tuple[str, ...]) -> None:
    assert over_budget(tenants, Budget(9, 1000, None, now, None)) == expected


# What holds for every answer.

sizes = st.integers(0, 12)
needs = st.builds(Need, sizes, sizes)
limits = st.one_of(st.none(), st.integers(0, 24))
budgets = st.builds(Budget, st.integers(0, 8), limits, limits, limits, limits)


def tenants_of(size: int) -> st.SearchStrategy[list[Tenant]]:
    one = st.builds(
        Tenant,
        id=st.just(""),
        state=st.sampled_from([s for s in State if s is not State.GONE] + [State.READY] * 4),
        busy=st.booleans(),
        charge=needs,
        keep_value=st.integers(0, 5).map(float),
        settled=st.booleans(),
        pinned=st.sampled_from([False, False, True]),
        is_text=st.booleans(),
    )
    return st.lists(one, max_size=size).map(
        lambda several: [replace(t, id=f"t{number}") for number, t in enumerate(several)]
    )


def fits(need: Need, tenants: Iterable[Tenant], budget: Budget) -> bool:
    """The sums, written out."""
    tenants = list(tenants)
    vram = need.vram + sum(t.charge.vram for t in tenants)
    sysmem = need.sysmem + sum(t.charge.sysmem for t in tenants)
    return (
        len(tenants) + 1 <= budget.max_instances
        and (not need.vram or all(vram <= x for x in (budget.vram, budget.vram_now) if x is not None))
        and (not need.sysmem or all(sysmem <= x for x in (budget.sysmem, budget.sysmem_now) if x is not None))
    )


def may_go(tenants: Sequence[Tenant], *, is_text: bool, busy: bool) -> list[Tenant]:
    return [
        t
        for t in tenants
        if t.state is State.READY
        and not t.pinned
        and (is_text or not t.is_text)
        and (not t.busy or (busy and t.settled))
    ]


def check(
    need: Need, tenants: list[Tenant], budget: Budget, promised: list[Tenant], *, is_text: bool
) -> Room:
    staying = [*(t for t in tenants if t.state not in LEAVING), *promised]
    answer = room(need, tenants, budget, is_text=is_text, promised=promised)
    assert isinstance(answer, Never) == (not fits(need, [], budget))
    match answer:
        case Fits():
            assert fits(need, tenants, budget)
            assert fits(need, staying, budget)
        case Evict(ids):
            chosen = [t for t in tenants if t.id in ids]
            assert len(chosen) == len(set(ids)) == len(ids) > 0
            assert not fits(need, staying, budget)
            assert fits(need, [t for t in staying if t not in chosen], budget)
            assert all(t in may_go(tenants, is_text=is_text, busy=True) for t in chosen)
            idle = may_go(tenants, is_text=is_text, busy=False)
            if any(t.busy for t in chosen):
                assert not fits(need, [t for t in staying if t not in idle], budget)
            for one in chosen:  # nobody goes in vain
                rest = [t for t in chosen if t is not one]
                assert not fits(need, [t for t in staying if t not in rest], budget)
        case Later(reason):
            assert reason
            free = may_go(tenants, is_text=is_text, busy=True)
            if fits(need, staying, budget):
                assert not fits(need, tenants, budget)
            else:
                assert not fits(need, [t for t in staying if t not in free], budget)
    return answer


@settings(max_examples=400)
@given(needs, tenants_of(7), budgets, st.lists(needs, max_size=2), st.booleans())
def test_what_holds_for_every_answer(
    need: Need, tenants: list[Tenant], budget: Budget, promised: list[Need], is_text: bool
) -> None:
    next_ones = [Tenant(f"p{n}", State.STARTING, True, charge=c) for n, c in enumerate(promised)]
    answer = check(need, tenants, budget, next_ones, is_text=is_text)
    if not isinstance(answer, Evict):
        return
    # The fewest there are; among those the least valuable.
    chosen = [t for t in tenants if t.id in answer.ids]
    staying = [*(t for t in tenants if t.state not in LEAVING), *next_ones]
    candidates = may_go(tenants, is_text=is_text, busy=any(t.busy for t in chosen))

    def cost(group: Iterable[Tenant]) -> tuple[int, float]:
        group = list(group)
        return sum(t.busy for t in group), sum(t.keep_value for t in group)

    for size in range(1, len(chosen) + 1):
        for group in itertools.combinations(candidates, size):
            if fits(need, [t for t in staying if t not in group], budget):
                assert size == len(chosen)
                assert cost(group) >= cost(chosen)


@settings(max_examples=60, deadline=None)
@given(needs, st.data(), st.booleans())
def test_too_many_sets_to_try_them_all(need: Need, data: st.DataObject, is_text: bool) -> None:
    """100 instances: the answer is a good one all the same, though it may not be the best."""
    some = data.draw(tenants_of(8).filter(bool))
    everyone = [
        replace(t, id=f"{t.id}.{n}", keep_value=t.keep_value + n)
        for n in range(100 // len(some))
        for t in some
    ]
    total = sum(t.charge.vram for t in everyone)
    budget = Budget(data.draw(st.integers(60, 120)), data.draw(st.integers(12, total + 12)))
    check(need, everyone, budget, [], is_text=is_text)


@given(needs, st.one_of(st.none(), needs), tenants_of(6), budgets)
def test_small_models_leave_text_alone_while_there_is_a_place_beside_it(
    need: Need, cpu_only: Need | None, tenants: list[Tenant], budget: Budget
) -> None:
    answer = room_beside_text(need, cpu_only, tenants, budget)
    wants = [need] if cpu_only is None else [need, cpu_only]
    immovable = [t for t in tenants if t.state not in LEAVING and (t.is_text or t.pinned)]
    match answer:
        case Fits(on_cpu):
            assert fits(wants[on_cpu], tenants, budget)
        case Evict(ids, on_cpu):
            chosen = [t for t in tenants if t.id in ids]
            staying = [t for t in tenants if t.state not in LEAVING and t not in chosen]
            assert fits(wants[on_cpu], staying, budget)
            if any(t.is_text for t in chosen):
                assert not any(fits(want, immovable, budget) for want in wants)
        case Later(reason):
            assert reason
        case Never():
            assert not any(fits(want, [], budget) for want in wants)


@given(tenants_of(7), budgets)
def test_who_leaves_for_strangers(tenants: list[Tenant], budget: Budget) -> None:
    leaving = over_budget(tenants, budget)
    chosen = [t for t in tenants if t.id in leaving]
    assert all(t.state is State.READY for t in chosen)
    staying = [t for t in tenants if t.state not in LEAVING and t not in chosen]
    for kind, limit in (("vram", budget.vram_now), ("sysmem", budget.sysmem_now)):
        over = limit is not None and sum(getattr(t.charge, kind) for t in staying) > limit
        # Either it fits now, or there is nobody left to send away who has any of it.
        assert not over or not any(getattr(t.charge, kind) for t in staying if t.state is State.READY)
    order = [next(t for t in tenants if t.id == id) for id in leaving]  # noqa: A001
    ranks = [(t.busy, t.pinned, t.keep_value) for t in order]
    assert ranks == sorted(ranks)
