"""A machine that is short of everything, and anything that can happen to it, made up by hypothesis.

Models of several sizes share less memory than they need. A program of steps is carried out on the
virtual clock: requests come, are cancelled or abandoned; instances crash, fail to start, also for
memory; others take memory and give it back; the cookbook changes; the owner pauses, the operator
drains and unloads. After every step and again and again while time passes the rules are checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamesh.config.cookbook import Kind, Profile
from llamesh.core.capacity import Need
from llamesh.core.lifecycle import State
from llamesh.core.placement import choose
from llamesh.dispatch.lease import Lease
from llamesh.errors import LlameshError
from tests.support.scripted import Play, Scripted, World, get, profile, world

VRAM, SYSMEM = 1000, 600
STEP = 0.25

# How a request may end. Everything else would be a defect.
ANSWERS = {
    "served",
    "left",
    "queue_timeout",
    "spawn_failures_exhausted",
    "no_capacity",
    "draining",
    "model_not_found",
}

# Longer than a waiter's clock may stand still for loads that move, one after the other.
PATIENCE = 600.0


@dataclass(frozen=True)
class Model:
    """A profile, what it needs, and how its instances behave."""

    vram: int
    sysmem: int
    kind: Kind
    min_instances: int
    max_instances: int
    max_wait_ms: int
    idle_timeout: float
    tenure: float | None
    plays: tuple[Play, ...]

    def profile(self, number: int) -> Profile:
        return profile(
            f"m{number}",
            kind=self.kind,
            min_instances=self.min_instances,
            max_instances=self.max_instances,
            max_wait_in_queue_ms=self.max_wait_ms,
            idle_timeout_seconds=self.idle_timeout,
            min_eviction_tenure_secs=self.tenure,
        )


moments = st.integers(0, 24).map(lambda number: number * STEP)
plays = st.builds(
    Play,
    load=moments,
    slots=st.integers(1, 2),
    fails=st.sampled_from([False] * 5 + [True]),
    memory=st.sampled_from([False] * 4 + [True]),
    crashes_after=st.one_of(st.none(), st.none(), moments),
    leaves=st.sampled_from([0.0, 0.0, 1.0]),
    work=st.sampled_from([0.0, 5.0]),
)
models = st.builds(
    Model,
    vram=st.sampled_from([0, 200, 400, 600, 1000, 1200]),
    sysmem=st.sampled_from([0, 100, 300]),
    kind=st.sampled_from(["text", "text", "text", "embedding"]),
    min_instances=st.sampled_from([0, 0, 0, 1]),
    max_instances=st.sampled_from([1, 1, 2]),
    max_wait_ms=st.sampled_from([2000, 20_000, 0]),
    idle_timeout=st.sampled_from([0.0, 4.0]),
    tenure=st.sampled_from([None, 0.0, 3.0]),
    plays=st.lists(plays, min_size=1, max_size=3).map(tuple),
)

# A step is its name and up to two numbers, whose meaning is the step's.
steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["request"] * 6
            + ["wait"] * 4
            + ["cancel", "cancel", "crash", "strangers", "pause", "resume", "drain", "undrain"]
            + ["remove", "change", "restore", "unload", "grow", "instances"]
        ),
        st.integers(0, 12),
        st.integers(0, 12),
    ),
    min_size=8,
    max_size=50,
)


class Machine:
    """The steps, by name, and the rules."""

    def __init__(self, here: World, cookbook: list[Profile], clients: trio.Nursery) -> None:
        self.here, self.cookbook, self.clients = here, cookbook, clients
        self.original = tuple(cookbook)
        self.scopes: list[trio.CancelScope] = []
        self.outcomes: Counter[str] = Counter()
        self.asked = 0
        self.steps: dict[str, Callable[[int, int], None]] = {
            "request": self.request,
            "cancel": self.cancel,
            "crash": self.crash,
            "strangers": self.strangers,
            "pause": self.pause,
            "resume": self.resume,
            "drain": self.drain,
            "undrain": self.undrain,
            "remove": self.remove,
            "change": self.change,
            "restore": self.restore,
            "unload": self.unload,
            "grow": self.grow,
            "instances": self.instances,
        }
        self.watch_evictions()

    # Steps.

    def request(self, which: int, how: int) -> None:
        self.asked += 1
        wanted = self.cookbook[which % len(self.cookbook)] if self.cookbook else self.original[0]
        scope = trio.CancelScope()
        self.scopes.append(scope)
        self.clients.start_soon(self.visit, wanted, scope, how * 2 * STEP, how % 3 == 0, how % 2 == 0)

    async def visit(
        self, wanted: Profile, scope: trio.CancelScope, holds: float, abandons: bool, streams: bool
    ) -> None:
        lease: Lease | None = None
        outcome = "left"
        begun = trio.current_time()
        with scope:
            try:
                lease = await get(self.here.dispatch, wanted, streams=streams)
                outcome = "served"
                self.check()
                await trio.sleep(holds)
            except LlameshError as error:
                outcome = error.type
        if lease is not None:
            lease.release(working=abandons)
        assert outcome in ANSWERS
        assert trio.current_time() - begun < PATIENCE
        self.check()
        self.outcomes[outcome] += 1

    def cancel(self, which: int, _: int) -> None:
        if self.scopes:
            self.scopes[which % len(self.scopes)].cancel()

    def crash(self, which: int, _: int) -> None:
        everyone = list(self.here.pool.all())
        if everyone:
            one = everyone[which % len(everyone)]
            assert isinstance(one, Scripted)
            one.crash.set()

    def strangers(self, vram: int, sysmem: int) -> None:
        self.here.memory.strangers = Need(max(0, vram - 4) * 100, max(0, sysmem - 4) * 50)
        self.here.pool.leave_strangers_their_memory()

    def pause(self, seconds: int, _: int) -> None:
        self.here.keeper.paused_until = trio.current_time() + seconds

    def resume(self, _: int, __: int) -> None:
        self.here.keeper.paused_until = 0.0

    def drain(self, _: int, __: int) -> None:
        self.here.dispatch.drained = True

    def undrain(self, _: int, __: int) -> None:
        self.here.dispatch.drained = False

    def remove(self, which: int, _: int) -> None:
        if self.cookbook:
            del self.cookbook[which % len(self.cookbook)]
            self.here.cook(self.cookbook)

    def change(self, which: int, how: int) -> None:
        if self.cookbook:
            number = which % len(self.cookbook)
            new = replace(self.cookbook[number], arguments=("-c", str(how)) if how % 2 else ())
            self.cookbook[number] = replace(new, min_instances=how % 2, max_instances=1 + how % 3)
            self.here.cook(self.cookbook)

    def restore(self, _: int, __: int) -> None:
        self.cookbook[:] = self.original
        self.here.cook(self.cookbook)

    def unload(self, which: int, _: int) -> None:
        ids = tuple(one.id for one in self.here.pool.all())
        self.here.pool.drain(ids[: which + 1], "unloaded on request", cause="unload")

    def grow(self, which: int, size: int) -> None:
        """A sensor sees one hold more, or less, than was estimated."""
        everyone = [one for one in self.here.pool.all() if one.was_ready]
        if everyone:
            one = everyone[which % len(everyone)]
            self.here.memory.seen[one.id] = Need(one.need.vram * (size + 4) // 10, one.need.sysmem)

    def instances(self, most: int, _: int) -> None:
        settings = self.here.current.settings
        self.here.current.settings = settings.model_copy(update={"max_instances_per_node": 1 + most})

    # Rules.

    def watch_evictions(self) -> None:
        """Nobody leaves for one that can't fit, and no start breaks the budget."""
        pool, make_room, spawn = self.here.pool, self.here.pool.make_room, self.here.pool.spawn

        def checked_make_room(wanted: Profile, ids: tuple[str, ...], *, on_cpu: bool = False) -> None:
            size = self.here.memory.sizes[wanted.key]
            need = size.cpu_only if on_cpu and size.cpu_only is not None else size.need
            budget = self.here.memory.budget()
            assert need.vram <= (budget.vram_now or 0) or not need.vram
            assert need.sysmem <= (budget.sysmem_now or 0) or not need.sysmem
            fixed = [one for one in pool.tenants() if one.state is State.STARTING or one.pinned]
            assert len(fixed) < budget.max_instances
            assert not {one.id for one in fixed} & set(ids)
            make_room(wanted, ids, on_cpu=on_cpu)

        def checked_spawn(wanted: Profile, *, on_cpu: bool = False) -> Any:
            instance = spawn(wanted, on_cpu=on_cpu)
            vram, sysmem = self.charged()
            budget = self.here.memory.budget()
            assert vram <= (budget.vram_now or 0) or not instance.need.vram
            assert sysmem <= (budget.sysmem_now or 0) or not instance.need.sysmem
            assert len(list(pool.all())) <= budget.max_instances
            assert not self.here.keeper.away()
            return instance

        pool.make_room = checked_make_room  # type: ignore[assignment,method-assign]
        pool.spawn = checked_spawn  # type: ignore[assignment,method-assign]

    def charged(self) -> tuple[int, int]:
        charges = [self.here.memory.charge(one) for one in self.here.pool.all()]
        return sum(one.vram for one in charges), sum(one.sysmem for one in charges)

    def check(self) -> None:
        """What holds at every moment."""
        reserved = [one.need for one in self.here.pool.all() if one.id not in self.here.memory.seen]
        assert sum(need.vram for need in reserved) <= VRAM
        assert sum(need.sysmem for need in reserved) <= SYSMEM
        for one in self.here.pool.all():
            assert isinstance(one, Scripted)
            assert 0 <= one.busy_slots <= one.slots
            if one.state is State.READY:
                assert len(one._slots.leased) + one.really_working <= one.slots

    def check_at_rest(self) -> None:
        """What holds when nothing moves: nobody waits beside a free slot, no promise without a waiter."""
        self.check()
        dispatch, pool = self.here.dispatch, self.here.pool
        assert pool._promises.keys() <= set(dispatch._lines)
        for key, line in dispatch._lines.items():
            assert line.tickets
            assert line.reason
            assert choose(pool.instances(key)) < 0
        for key in sorted(pool._promises.keys()):
            assert pool.is_making_room(key)
        ours = {id for key in sorted(pool._promises.keys()) for id in pool._promises.leaves(key)}  # noqa: A001
        for one in pool.all():
            # Whoever leaves for somebody who waits leaves for one who still does.
            assert one.state is not State.DRAINING or not one._may_resume or one.id in ours

    async def watch(self) -> None:
        while True:
            await trio.testing.wait_all_tasks_blocked()
            self.check_at_rest()
            await trio.sleep(STEP / 2)

    async def play(self, program: list[tuple[str, int, int]]) -> None:
        for name, one, other in program:
            if name == "wait":
                await trio.sleep(one * one * STEP / 4)
            else:
                self.steps[name](one, other)
            self.check()
            await trio.sleep(0)
        # Whatever was forbidden is allowed again, so that everyone who waits has a chance.
        self.resume(0, 0)
        self.here.memory.strangers = Need()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(models, min_size=2, max_size=4), steps, st.integers(1, 4))
def test_whatever_happens(cast: list[Model], program: list[tuple[str, int, int]], most: int) -> None:
    async def main() -> None:
        # What is kept loaded may be in others' way for ever: they have a deadline then.
        if any(one.min_instances for one in cast) or any(name == "change" for name, _, _ in program):
            cast[:] = [replace(one, max_wait_ms=one.max_wait_ms or 30_000) for one in cast]
        cookbook = [one.profile(number) for number, one in enumerate(cast)]
        stage = {one.model: list(model.plays) for one, model in zip(cookbook, cast, strict=True)}
        limits: dict[str, Any] = {"max_instances_per_node": most, "vram": VRAM, "sysmem": SYSMEM}
        async with world(stage, cookbook=cookbook, **limits) as here:
            for one, model in zip(cookbook, cast, strict=True):
                here.needs(one, model.vram, model.sysmem, cpu_only=model.vram // 2 or None)
            async with trio.open_nursery() as watching:
                # Everything has an end, or somebody was forgotten.
                with trio.fail_after(4 * PATIENCE):
                    async with trio.open_nursery() as clients:
                        machine = Machine(here, cookbook, clients)
                        watching.start_soon(machine.watch)
                        await machine.play(program)
                assert machine.outcomes.total() == machine.asked
                assert not here.dispatch._lines
                here.cook([])
                with trio.fail_after(60):
                    while list(here.pool.all()):
                        await trio.sleep(STEP)
                watching.cancel_scope.cancel()
            assert machine.charged() == (0, 0)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
