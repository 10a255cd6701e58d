"""What one node says of itself: its part of the state document. Reads, asks nobody, changes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import trio

import llamesh
from llamesh.config.cookbook import ModelPath
from llamesh.config.cookbook import Profile as CookbookProfile
from llamesh.config.store import Store
from llamesh.core.capacity import Evict, Fits, Later, Need, Never
from llamesh.core.lifecycle import State as Life
from llamesh.core.memory import Pool as MemoryPool
from llamesh.dispatch import Dispatch
from llamesh.local.instance import Instance as Child
from llamesh.local.pool import Pool
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.recorder import Record, Recorder
from llamesh.telemetry.stats import NodeStats
from llamesh.web.attention import Attention, Finding
from llamesh.web.history import Now, Ring
from llamesh.web.requests import request_document
from llamesh.web.state_schema import (
    MOST_DEVICES,
    MOST_EVENTS,
    MOST_INSTANCES,
    MOST_MODELS,
    MOST_REQUESTS,
    Cell,
    CellState,
    Device,
    Event,
    Instance,
    Memory,
    Node,
    Part,
    Profile,
    Request,
    Room,
)

_MIB = 1 << 20

# Of a larger cookbook, an idle profile is looked at every so many times.
_FEW = 40
_TURNS = 4

# How often model files are looked for, and how long a disk may take to answer.
_LOOK_SECONDS = 5.0
_LOOK_PATIENCE = 1.0


class OwnState:
    """See the module. `address`: of the node's API; `findings`: of the mesh, for the attention block."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        dispatch: Dispatch,
        stats: NodeStats,
        learned: LearnedValues,
        recorder: Recorder,
    ) -> None:
        self.address: Callable[[], str] = lambda: ""
        self.findings: Callable[[], Iterator[Finding]] = lambda: iter(())
        self.recorder = recorder
        self.attention = Attention(store, pool, dispatch, recorder)
        self.ring = Ring(self._now)
        self._store = store
        self._pool = pool
        self._dispatch = dispatch
        self._stats = stats
        self._learned = learned
        self._started = time.time()
        self._missing: frozenset[str] = frozenset()
        self._look_again = 0.0
        self._told: dict[str, tuple[CookbookProfile, Profile]] = {}
        self._turn = 0

    @property
    def node_id(self) -> str:
        """Of this node."""
        return self._store.current.settings.node_id

    @property
    def accepts_administration(self) -> bool:
        """Whether operators of other nodes may do something here."""
        return self._store.current.settings.cluster.accept_administration

    def part(self) -> Part:
        """Everything, as it is now."""
        return Part(
            self._node(),
            self._profiles(),
            self._instances(),
            self.requests(),
            self.attention.concerns(self.node_id, self.findings()),
            self.events(MOST_EVENTS),
        )

    async def look(self) -> None:
        """See which model files are there, unless that was done a moment ago. Bounded."""
        now = trio.current_time()
        if now < self._look_again:
            return
        self._look_again = now + _LOOK_SECONDS
        paths = {
            p.key: p.source.path
            for p in self._store.current.cookbook.profiles
            if isinstance(p.source, ModelPath)
        }
        with trio.move_on_after(_LOOK_PATIENCE):
            self._missing = await trio.to_thread.run_sync(_missing, paths, abandon_on_cancel=True)

    def requests(self) -> list[Request]:
        """Those that are under way, the oldest first."""
        offset = time.time() - trio.current_time()
        live = list(self.recorder.live.values())[:MOST_REQUESTS]
        return [self.request(record, offset) for record in live]

    def request(self, record: Record, offset: float) -> Request:
        """One, with its times in Unix seconds. `offset`: Unix time less trio's."""
        return request_document(record, self.node_id, offset, self._is_loading)

    def events(self, most: int, *, after: int = 0) -> list[Event]:
        """The last events of this node, oldest first."""
        node = self.node_id
        return [
            Event(one.id, one.time, one.level, node, one.event, one.text)
            for one in self.recorder.events(most, after=after)
        ]

    # Parts.

    def _node(self) -> Node:
        closed, reading, engine = self._dispatch.closed, self._pool.memory.reading, self._pool.engine
        devices = [
            Device(
                device.name[:200],
                _mib(device.usable_bytes),
                _mib(device.used_bytes),
                device.utilisation,
                device.error[:500] if device.error else None,
            )
            for device in (reading.devices if reading is not None else ())
            if device.holds_models
        ]
        # Where there is no GPU, that its driver is missing isn't a problem.
        problems = [text[:500] for text in reading.problems] if reading is not None and devices else []
        now = time.time()
        return Node(
            id=self.node_id,
            self=True,
            fresh=True,
            ready=not closed,
            reason=closed or None,
            version=llamesh.__version__,
            engine=engine.origin,
            engine_version=engine.version[:200] if engine.version else None,
            address=self.address() or None,
            started=self._started,
            last_seen=now,
            memory=self._memory(),
            devices=devices[:MOST_DEVICES],
            queue=self._dispatch.queue_length(),
            running=sum(child.busy_slots for child in self._pool.all()),
            problems=problems[:64],
            accepts_administration=self.accepts_administration,
            drained=self._dispatch.drained,
        )

    def _memory(self) -> Memory:
        memory, budget = self._pool.memory, self._pool.memory.budget()
        held = Need()
        for child in self._pool.all():
            held += memory.charge(child)
        accounts = memory.accounts
        device = accounts.device_wide if accounts is not None else None
        system = accounts.sysmem if accounts is not None else None
        return Memory(
            _room(device, budget.vram, budget.vram_now, held.vram),
            _room(system, budget.sysmem, budget.sysmem_now, held.sysmem),
        )

    def _now(self) -> Now:
        accounts = self._pool.memory.accounts
        device = accounts.device_wide if accounts is not None else None
        system = accounts.sysmem if accounts is not None else None
        return Now(
            self.recorder.tokens_now(),
            self._dispatch.queue_length(),
            _mib(_used(device)),
            _mib(_used(system)),
            sum(1 for record in self.recorder.live.values() if not record.peer),
        )

    def _profiles(self) -> list[Profile]:
        """In a large cookbook those with nothing going on take turns: what could be started is worked out
        from the memory of all, and costs a tenth of a millisecond each.
        """
        profiles = self._store.current.cookbook.profiles[:MOST_MODELS]
        before, self._told = self._told, {}
        self._turn = (self._turn + 1) % _TURNS
        for number, profile in enumerate(profiles):
            key = profile.key
            known = before.get(key)
            if (
                known is None
                or known[0] is not profile
                or len(profiles) <= _FEW
                or number % _TURNS == self._turn
                or known[1].cell.instances
                or self._pool.instances(key)
                or self._dispatch.queue_length(key)
            ):
                known = (profile, self._profile(profile))
            self._told[key] = known
        return [told for _, told in self._told.values()]

    def _profile(self, profile: CookbookProfile) -> Profile:
        learned = self._learned.of(profile.key)
        tps = self._stats.profile(profile.key).tokens_per_second or learned.tokens_per_second
        return Profile(
            profile.key,
            profile.public_name,
            profile.kind,
            (profile.description or profile.model_description)[:1000],
            learned.context_length or None,
            self._cell(profile, tps),
        )

    def _cell(self, profile: CookbookProfile, tps: float) -> Cell:
        state, why = self._situation(profile)
        size = self._pool.memory.size(profile)
        known = size is not None and size.source != "unknown"
        return Cell(
            state,
            why[:500] or None,
            len(self._pool.instances(profile.key)),
            self._dispatch.queue_length(profile.key),
            round(tps, 1) or None,
            size.need.vram if size is not None and known else None,
            size.need.sysmem if size is not None and known else None,
            self._download(profile) if state == "missing" else None,
        )

    def _download(self, profile: CookbookProfile) -> Literal["needed", "coming"] | None:
        weights = self._pool.weights
        if weights.lacking(profile) is None:
            return None
        return "coming" if weights.progress(profile) is not None else "needed"

    def _situation(self, profile: CookbookProfile) -> tuple[CellState, str]:
        """State of a cell, and why."""
        children, trouble = self._pool.instances(profile.key), self._pool.trouble(profile.key)
        states = {child.state for child in children}
        if Life.READY in states:
            return "loaded", ""
        if Life.STARTING in states:
            return "loading", ""
        if profile.key in self._missing and isinstance(profile.source, ModelPath):
            return "missing", f"there is no model file {Path(profile.source.path).name}"
        if trouble is not None and (trouble.exhausted or trouble.rounds):
            return "failed", trouble.last.message if trouble.last is not None else ""
        if not self._pool.max_instances(profile):
            return "never", "its max_instances is 0: it is listed, but not run on this node"
        lacking = self._pool.weights.lacking(profile)
        if lacking is not None:
            return "failed" if isinstance(lacking, Never) else "missing", lacking.reason
        match self._pool.room(profile):
            case Fits():
                return "fits", ""
            case Evict(ids):
                return "needs_eviction", f"{', '.join(ids)} would have to leave"
            case Later(reason):
                unknown = self._pool.memory.size(profile) is None
                return "unknown" if unknown else "needs_eviction", reason
            case Never(reason):
                return "never", reason

    def _instances(self) -> list[Instance]:
        now, offset = trio.current_time(), time.time() - trio.current_time()
        return [self._instance(child, now, offset) for child in self._pool.all()][:MOST_INSTANCES]

    def _instance(self, child: Child, now: float, offset: float) -> Instance:
        key, memory = child.profile.key, self._pool.memory
        held, charged = memory.held(child), memory.charge(child)
        tps = self._stats.profile(key).tokens_per_second
        return Instance(
            node=self.node_id,
            id=child.id,
            model=key,
            state=child.state.value,
            slots=child.slots,
            busy=child.busy_slots,
            started=round(child.created + offset, 1),
            age=round(now - child.created, 1),
            load_ms=round(child.ready_after * 1000, 1) if child.was_ready else None,
            tps=round(tps, 1) or None,
            pid=child.child.pid if child.child is not None else None,
            vram=held.vram if held is not None else None,
            ram=held.sysmem if held is not None else None,
            reserved_vram=charged.vram,
            reserved_ram=charged.sysmem,
            on_cpu=child.on_cpu,
            reason=child.end_reason[:500] or None,
            last_used=round(child.last_used + offset, 1),
        )

    def _is_loading(self, key: str) -> bool:
        return any(child.state is Life.STARTING for child in self._pool.instances(key))


def _missing(paths: dict[str, str]) -> frozenset[str]:
    found = []
    for key, path in paths.items():
        try:
            if not Path(path).exists():
                found.append(key)
        except (OSError, ValueError):
            found.append(key)
    return frozenset(found)


def _used(pool: MemoryPool | None) -> int | None:
    return None if pool is None or pool.external is None else pool.ours + pool.external


def _room(pool: MemoryPool | None, most: int | None, now: int | None, reserved: int) -> Room:
    return Room(
        total=_mib(pool.total) if pool is not None else None,
        max=most,
        used=_mib(_used(pool)),
        reserved=reserved,
        external=_mib(pool.external) if pool is not None else None,
        free=None if now is None else max(0, now - reserved),
    )


def _mib(size: int | None) -> int | None:
    return None if size is None else size // _MIB
