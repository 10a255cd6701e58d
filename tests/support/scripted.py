"""A pool whose children are played by the test, for the virtual clock.

Everything is the real thing (queues, pool, instance, slots) but the child process: `Play` says, for
each start of a profile, how long it loads, how many slots it has and how it ends.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import trio
import trio.testing

from llamesh.config.cookbook import FromArguments, Profile
from llamesh.config.settings import Settings
from llamesh.core.lifecycle import State
from llamesh.dispatch import Ask, Dispatch, Lease
from llamesh.errors import LlameshError
from llamesh.local.instance import Failure, Instance
from llamesh.local.launch import Engine
from llamesh.local.orphans import Ledger
from llamesh.local.pool import Pool
from llamesh.local.ports import Ports
from llamesh.local.process import Child
from llamesh.local.startup import Progress
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.stats import NodeStats


@dataclass(frozen=True)
class Play:
    """One start: loads for `load` s (for ever: inf) and serves `slots` requests at once.

    `fails`: the process ends where it would have become ready. `crashes_after`: it ends so long
    after it became ready. `leaves`: how long it takes to end when told to. `progress`: whether the
    load moves. `work`: how long it works on a request that was abandoned.
    """

    load: float = 1.0
    slots: int = 1
    fails: bool = False
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
            self.failure = Failure("it crashed, as told", 1, "the last words")

    async def _become_healthy(self, child: Child, progress: Progress) -> bool:
        ready = trio.current_time() + self.play.load
        while (now := trio.current_time()) < ready:
            if self.play.progress:
                self.last_progress = now
            await trio.sleep(min(1.0, ready - now))
        if self.play.fails:
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


@dataclass
class World:
    """A dispatcher over scripted instances."""

    dispatch: Dispatch
    pool: Pool
    stage: Stage
    stats: NodeStats
    learned: LearnedValues
    nursery: trio.Nursery
    order: list[Client] = field(default_factory=list)  # as they were served or refused

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
    plays: dict[str, list[Play]] | None = None, *, ports: Ports | None = None, **settings: Any
) -> AsyncIterator[World]:
    """A running pool with a dispatcher; `plays` by model name. At the end everything is free again."""
    stage = Stage({f"{name}:default": list(several) for name, several in (plays or {}).items()})
    made = Settings(node_id="node-a", **settings)
    stats, learned = NodeStats(), LearnedValues(Path(os.devnull))
    ports = ports or Ports(None)
    pool = Pool(
        made,
        Engine(("none",), "configured", "0"),
        ports,
        Ledger(Path(os.devnull)),
        stats,
        learned,
        instance_type=type("Staged", (Scripted,), {"stage": stage}),
    )
    dispatch = Dispatch(made, pool, learned)
    # Virtual seconds: what waits for ever fails instead of hanging.
    with trio.fail_after(20_000):
        async with trio.open_nursery() as nursery:
            await nursery.start(pool.run)
            yield World(dispatch, pool, stage, stats, learned, nursery)
            await trio.testing.wait_all_tasks_blocked()  # those who were cancelled have left
            assert dispatch.queue_length() == 0
            assert [one for one in pool.all() if one._slots.leased] == []
            await pool.close()
            assert list(pool.all()) == []
            assert ports.reserved == {}
            nursery.cancel_scope.cancel()
