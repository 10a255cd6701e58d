"""Whole lives of a dispatcher, made up by hypothesis: what holds whatever happens and in what order.

Clients come, wait, hold, abandon and leave; instances load, fail, crash and end as their plays say;
someone unloads. After every event and whenever nothing moves, the rules are checked.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamesh.config.cookbook import Profile
from llamesh.core.lifecycle import State
from llamesh.core.placement import Refuse, Serve, Spawn, choose, place
from llamesh.dispatch import Ticket
from llamesh.dispatch.lease import Lease
from llamesh.errors import NoCapacity, QueueFull, QueueTimeout, SpawnFailed
from tests.support.scripted import Play, Scripted, World, ask, profile, world

# All moments are multiples of this, so that many things happen at the same one.
STEP = 0.25


def moments(most: int) -> st.SearchStrategy[float]:
    return st.integers(0, most).map(lambda number: number * STEP)


@dataclass(frozen=True)
class Visit:
    """One client: comes, waits at most `patience`, holds what it got, and leaves in one of three ways."""

    comes: float
    model: int
    holds: float
    patience: float
    streams: bool
    abandons: bool


visits = st.lists(
    st.builds(
        Visit,
        comes=moments(40),
        model=st.integers(0, 2),
        holds=moments(12),
        patience=st.one_of(st.just(1e6), moments(20)),
        streams=st.booleans(),
        abandons=st.booleans(),
    ),
    min_size=1,
    max_size=14,
)
plays = st.lists(
    st.builds(
        Play,
        load=moments(12),
        slots=st.integers(1, 3),
        fails=st.sampled_from([False, False, True]),
        crashes_after=st.one_of(st.none(), moments(20)),
        leaves=moments(4),
        work=moments(30),
    ),
    min_size=1,
    max_size=4,
)
profiles = st.builds(
    dict[str, Any],
    max_instances=st.integers(1, 3),
    max_queue_size=st.sampled_from([0, 0, 2]),
    max_wait_in_queue_ms=st.sampled_from([0, 0, 3000]),
    idle_timeout_seconds=st.sampled_from([0.0, 2.0]),
)


class Watcher:
    """The rules."""

    def __init__(self, here: World, models: list[Profile], limit: int) -> None:
        self.here, self.models, self.limit = here, models, limit
        self.queues: dict[str, list[Ticket]] = {one.key: [] for one in models}
        self.outcomes: Counter[str] = Counter()

    def check(self) -> None:
        """What holds at every moment."""
        everyone = list(self.here.pool.all())
        assert len(everyone) <= self.limit
        for one in everyone:
            assert isinstance(one, Scripted)
            assert 0 <= one.busy_slots <= one.slots
            # What llama-server really has to do never exceeds its slots: nobody waits in there unseen.
            if one.state is State.READY:
                assert len(one._slots.leased) + one.really_working <= one.slots
        for model in self.models:
            assert len(self.here.pool.instances(model.key)) <= self.here.pool.max_instances(model)

    def check_at_rest(self) -> None:
        """What holds when nobody has anything to do before the clock moves: no wake-up was lost."""
        self.check()
        pool = self.here.pool
        for line in self.here.dispatch._lines.values():
            assert line.tickets
            instances = pool.instances(line.profile.key)
            assert choose(instances) < 0, "a free slot, and someone who waits for it"
            decision = place(
                instances,
                waiting=len(line.tickets),
                slots_expected=pool.slots_expected(line.profile.key),
                max_instances=pool.max_instances(line.profile),
                room=pool.room(line.profile),
                resting=pool.resting(line.profile.key),
            )
            assert not isinstance(decision, Serve | Spawn | Refuse), decision

    async def watch(self) -> None:
        while True:
            await trio.testing.wait_all_tasks_blocked()
            self.check_at_rest()
            await trio.sleep(STEP / 3)

    async def visit(self, visit: Visit) -> None:
        await trio.sleep(visit.comes)
        wanted = self.models[visit.model % len(self.models)]
        lease: Lease | None = None
        outcome = "left"
        with trio.move_on_after(visit.patience):
            try:
                lease = await self.get(wanted, visit)
                outcome = "served"
            except (SpawnFailed, QueueTimeout, QueueFull, NoCapacity) as error:
                outcome = error.type
        if lease is not None:
            self.check()
            await trio.sleep(visit.holds)
            lease.release(working=visit.abandons)
        self.check()
        self.outcomes[outcome] += 1

    async def get(self, wanted: Profile, visit: Visit) -> Lease:
        wish = ask(wanted, streams=visit.streams)
        queue = self.queues[wanted.key]
        lease = self.here.dispatch.take(wish)
        if lease is not None:
            assert not [one for one in queue if not one._turn.is_set()], "someone was overtaken"
            return lease
        with self.here.dispatch.join(wish) as ticket:
            queue.append(ticket)
            try:
                lease = await ticket.wait()
            finally:
                place_of_mine = queue.index(ticket)
                del queue[place_of_mine]
                if lease is not None:
                    overtaken = [one for one in queue[:place_of_mine] if not one._turn.is_set()]
                    assert not overtaken, "someone was overtaken"
        assert lease is not None
        return lease

    async def unload(self, moment: float) -> None:
        await trio.sleep(moment)
        ids = tuple(one.id for one in self.here.pool.all())
        self.here.pool.drain(ids[:1], "unloaded on request", cause="unload")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    visits=visits,
    plays=st.lists(plays, min_size=3, max_size=3),
    models=st.lists(profiles, min_size=1, max_size=3),
    limit=st.integers(1, 4),
    unloads=st.lists(moments(60), max_size=3),
    total=st.sampled_from([0, 0, 3]),
)
def test_whatever_happens(
    visits: list[Visit],
    plays: list[list[Play]],
    models: list[dict[str, Any]],
    limit: int,
    unloads: list[float],
    total: int,
) -> None:
    async def main() -> None:
        cookbook = [profile(f"m{number}", **more) for number, more in enumerate(models)]
        stage = {one.model: some for one, some in zip(cookbook, plays, strict=False)}
        limits: dict[str, Any] = {
            "max_instances_per_node": limit,
            "max_total_queue_entries": total,
            # Time alone decides nothing then: what is possible is done at once.
            "model_defaults": {"min_eviction_tenure_secs": 0},
        }
        async with world(stage, **limits) as here:
            watcher = Watcher(here, cookbook, limit)
            async with trio.open_nursery() as watching:
                watching.start_soon(watcher.watch)
                # Everything has an end, or a wake-up was lost.
                with trio.fail_after(3000):
                    async with trio.open_nursery() as clients:
                        for visit in visits:
                            clients.start_soon(watcher.visit, visit)
                        for moment in unloads:
                            clients.start_soon(watcher.unload, moment)
                    # Abandoned slots come back too.
                    while any(one.busy_slots for one in here.pool.all()):
                        await trio.sleep(STEP)
                watching.cancel_scope.cancel()
            assert watcher.outcomes.total() == len(visits)
            assert not here.dispatch._lines

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
