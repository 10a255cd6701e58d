"""A pool whose children are played by the test, for the virtual clock.

Everything is the real thing (queues, pool, instance, slots) but the child process: `Play` says, for
each start of a profile, how long it loads, how many slots it has and how it ends.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import trio
import trio.testing

from llamesh.config.cookbook import Cookbook, FromArguments, Profile
from llamesh.config.current import Current
from llamesh.config.settings import Settings
from llamesh.core.capacity import Budget, Need
from llamesh.core.lifecycle import State
from llamesh.dispatch import Dispatch
from llamesh.dispatch.lease import Ask, Lease
from llamesh.errors import LlameshError
from llamesh.local.failure import Failure
from llamesh.local.instance import Instance
from llamesh.local.keeper import Keeper
from llamesh.local.launch import Engine
from llamesh.local.memory import Memory
from llamesh.local.orphans import Ledger
from llamesh.local.pool import Pool
from llamesh.local.ports import Ports
from llamesh.local.process import Child
from llamesh.local.sizing import Size
from llamesh.local.startup import Progress
from llamesh.local.weights import Weights
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.stats import NodeStats


@dataclass(frozen=True)
class Play:
    """One start: loads for `load` s (for ever: inf) and serves `slots` requests at once.

    `fails`: the process ends where it would have become ready; `memory`: for want of it.
    `crashes_after`: it ends so long after it became ready. `leaves`: how long it takes to end when told
    to. `progress`: whether the load moves. `work`: how long it works on a request that was abandoned.
    """

    load: float = 1.0
    slots: int = 1
    fails: bool = False
    memory: bool = False
    crashes_after: float | None = None
    leaves: float = 0.0
    progress: bool = True
    work: float = 0.0


@dataclass
class Stage:
    """The plays of each profile, one a start; the last one is repeated."""

    plays: dict[str, list[Play]] = field(default_factory=dict)
    started: list[Scripted] = field(default_factory=list)

    def next_play(self, key: str) -> Play:
        plays = self.plays.setdefault(key, [Play()])
        return plays.pop(0) if len(plays) > 1 else plays[0]


class Scripted(Instance):
    """An instance with a play in the place of a process."""

    stage: Stage

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.play = self.stage.next_play(self.profile.key)
        self.stage.started.append(self)
        self.crash = trio.Event()
        self.slots_reply: Callable[[], tuple[int, Any]] = self._say_slots
        self._abandoned_until: list[float] = []

    def vacate(self, lease: int, *, abandoned: bool) -> None:
        if abandoned:
            self._abandoned_until.append(trio.current_time() + self.play.work)
        super().vacate(lease, abandoned=abandoned)

    @property
    def really_working(self) -> int:
        """Abandoned requests that the engine still works on."""
        return sum(until > trio.current_time() for until in self._abandoned_until)

    async def ask(self, target: str) -> tuple[int, Any]:
        await trio.lowlevel.checkpoint()
        return self.slots_reply()

    def _say_slots(self) -> tuple[int, Any]:
        working = [True] * (len(self._slots.leased) + self.really_working)
        return 200, [{"is_processing": one} for one in working]

    async def _live(self) -> None:
        if self.state is not State.STARTING:
            return
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._serve, cast(Child, None), cast(Progress, None))
            nursery.start_soon(self._see_off, cast(Child, None))
            await self.crash.wait()
            nursery.cancel_scope.cancel()
        if not self.asked_to_end:
            out_of_memory = self.play.memory and not self.was_ready
            words = "cudaMalloc failed: out of memory" if out_of_memory else "the last words"
            self.failure = Failure("it crashed, as told", 1, words)

    async def _become_healthy(self, child: Child, progress: Progress) -> bool:
        ready = trio.current_time() + self.play.load
        while (now := trio.current_time()) < ready:
            if self.play.progress:
                self.last_progress = now
            await trio.sleep(min(1.0, ready - now))
        if self.play.fails or self.play.memory:
            self.crash.set()
            await trio.sleep_forever()
        return True

    async def _learn(self) -> None:
        self.facts.n_slots = self.play.slots
        if self.play.crashes_after is not None:
            self._nursery.start_soon(self._crash_later, self.play.crashes_after)

    async def _crash_later(self, seconds: float) -> None:
        await trio.sleep(seconds)
        self.crash.set()

    async def _see_off(self, child: Child) -> None:
        await self._stop.wait()
        await trio.sleep(self.play.leaves)
        self.crash.set()


class FakeMemory(Memory):
    """A machine of any size, whose sensors see what the test says, in MiB.

    `sizes`: what a profile's instances need, by key; 0 where nothing is said. `strangers`: what others
    have. `held`: what an instance was seen to hold, by id; else it counts with its need.
    """

    def __init__(self, current: Current, vram: int | None = None, sysmem: int | None = None) -> None:
        self.vram, self.sysmem = vram, sysmem
        self.sizes: defaultdict[str, Size] = defaultdict(lambda: Size(Need()))
        self.strangers = Need()
        self.seen: dict[str, Need] = {}
        self.look_seconds = 0.0
        self.intruder = ""
        self.reading = self.accounts = None
        self._current = current
        self._looked: set[str] = set()

    def size(self, profile: Profile) -> Size | None:
        if self.look_seconds and profile.key not in self._looked:
            return None
        return self.sizes[profile.key]

    async def look(self, profile: Profile) -> None:
        await trio.sleep(self.look_seconds)
        self._looked.add(profile.key)

    def forget(self, profile: Profile) -> None:
        self._looked.discard(profile.key)

    def use_engine(self, engine: Engine) -> None:
        pass

    def budget(self) -> Budget:
        return Budget(
            self._current.settings.max_instances_per_node,
            self.vram,
            self.sysmem,
            None if self.vram is None else self.vram - self.strangers.vram,
            None if self.sysmem is None else self.sysmem - self.strangers.sysmem,
        )

    def charge(self, instance: Instance) -> Need:
        return self.seen.get(instance.id, instance.need)


@dataclass
class World:
    """A dispatcher over scripted instances."""

    current: Current
    dispatch: Dispatch
    pool: Pool
    keeper: Keeper
    memory: FakeMemory
    stage: Stage
    stats: NodeStats
    learned: LearnedValues
    nursery: trio.Nursery
    order: list[Client] = field(default_factory=list)  # as they were served or refused

    def needs(self, wanted: Profile, vram: int = 0, sysmem: int = 0, *, cpu_only: int | None = None) -> None:
        """Say what an instance of it takes; `cpu_only`: memory without the GPU."""
        on_cpu = None if cpu_only is None else Need(0, cpu_only)
        self.memory.sizes[wanted.key] = Size(Need(vram, sysmem), cpu_only=on_cpu)

    def cook(self, profiles: Iterable[Profile]) -> None:
        """Put another cookbook in force, as a reload does."""
        self.current.cookbook = Cookbook(tuple(profiles), {})
        self.dispatch.apply_cookbook()
        self.pool.apply_cookbook()

    async def clients(self, count: int, wanted: Profile) -> list[Client]:
        """Clients that join one after the other."""
        made = []
        for _ in range(count):
            made.append(Client(self, wanted))
            await trio.testing.wait_all_tasks_blocked()
        return made

    def instance(self, profile: Profile) -> Scripted:
        """The profile's only instance."""
        [one] = self.pool.instances(profile.key)
        assert isinstance(one, Scripted)
        return one


def profile(name: str = "m", **more: Any) -> Profile:
    """A profile that needs no file."""
    return Profile(name, "default", "", "", FromArguments("-m", "x"), **more)


def ask(wanted: Profile, *, streams: bool = True) -> Ask:
    """A request for it."""
    return Ask(wanted, "id", streams)


async def get(dispatch: Dispatch, wanted: Profile, *, streams: bool = True) -> Lease:
    """A lease, as the relay gets one."""
    wish = ask(wanted, streams=streams)
    lease = dispatch.take(wish)
    if lease is None:
        with dispatch.join(wish) as ticket:
            lease = await ticket.wait()
    assert lease is not None
    return lease


class Client:
    """Someone who waits in a queue, and holds what came of it."""

    def __init__(self, here: World, wanted: Profile) -> None:
        self.lease: Lease | None = None
        self.error: LlameshError | None = None
        self.after = 0.0
        self.scope = trio.CancelScope()
        self._here, self._wanted = here, wanted
        here.nursery.start_soon(self._run)

    @property
    def waits(self) -> bool:
        return self.lease is None and self.error is None

    async def _run(self) -> None:
        begun = trio.current_time()
        with self.scope:
            try:
                self.lease = await get(self._here.dispatch, self._wanted)
            except LlameshError as error:
                self.error = error
            self._here.order.append(self)
            self.after = trio.current_time() - begun


@asynccontextmanager
async def world(
    plays: dict[str, list[Play]] | None = None,
    *,
    ports: Ports | None = None,
    vram: int | None = None,
    sysmem: int | None = None,
    cookbook: Iterable[Profile] = (),
    instance_type: type[Scripted] = Scripted,
    weights: Callable[[Current], Weights] | None = None,
    **settings: Any,
) -> AsyncIterator[World]:
    """A running pool with a dispatcher; `plays` by model name. At the end everything is free again."""
    stage = Stage({f"{name}:default": list(several) for name, several in (plays or {}).items()})
    current = Current(Settings(**{"node_id": "node-a", **settings}), Cookbook(tuple(cookbook), {}))
    memory = FakeMemory(current, vram, sysmem)
    stats, learned = NodeStats(), LearnedValues(Path(os.devnull))
    ports = ports or Ports(None)
    pool = Pool(
        current,
        Engine(("none",), "configured", "0"),
        ports,
        Ledger(Path(os.devnull)),
        stats,
        learned,
        memory,
        weights(current) if weights is not None else None,
        instance_type=type("Staged", (instance_type,), {"stage": stage}),
    )
    dispatch = Dispatch(current, pool, learned)
    keeper = Keeper(current, pool)
    dispatch.away = keeper.away
    # Virtual seconds: what waits for ever fails instead of hanging.
    with trio.fail_after(20_000):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            nursery.start_soon(keeper.run)
            yield World(current, dispatch, pool, keeper, memory, stage, stats, learned, nursery)
            await trio.testing.wait_all_tasks_blocked()  # those who were cancelled have left
            assert dispatch.queue_length() == 0
            assert [one for one in pool.all() if one._slots.leased] == []
            assert not pool._promises.keys()
            await pool.close()
            assert list(pool.all()) == []
            assert ports.reserved == {}
            nursery.cancel_scope.cancel()
