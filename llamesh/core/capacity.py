"""May one more instance start on this machine, and what has to leave for it?

The rule, in the order in which it is asked (`room`):

1. What can never fit is refused, and evicts nobody.
2. What strangers' memory leaves no room for is refused, too: evicting our own wouldn't help.
3. Used, plus loading at its estimate, plus the new one must stay within the budget. Instances that
   are leaving count until they have left, since their memory does. Room that is being made for
   somebody else is promised to them: nobody takes it in the meantime.
4. Idle instances are evicted: the fewest that make room; among sets of the same size those that are
   worth least to keep (`keep_value`: the time to load them again, times how likely they are wanted).
5. Busy ones are drained only when their tenure is over.
6. Embedding and rerank models don't evict text models while they can be served beside them: they are
   small, and can run on the CPU (`room_beside_text`).

Sizes are MiB; an unknown limit is None and limits nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from llamesh.core.lifecycle import State

# A model that wasn't used for this long is half as likely to be wanted as one used just now.
_HALF_LIFE_SECONDS = 600.0

# Above this many sets of one size, the search for the cheapest one gives way to a greedy choice.
_MAX_SETS = 5000

# They count until they have left.
LEAVING = (State.DRAINING, State.STOPPING)


@dataclass(frozen=True, slots=True)
class Need:
    """Memory of one instance, in MiB."""

    vram: int = 0
    sysmem: int = 0

    def __add__(self, other: Need) -> Need:
        return Need(self.vram + other.vram, self.sysmem + other.sysmem)


@dataclass(frozen=True, slots=True)
class Budget:
    """What instances may take, in MiB. `vram`, `sysmem`: at the most, whatever else runs.
    `vram_now`, `sysmem_now`: at present, with strangers' memory taken off.
    """

    max_instances: int
    vram: int | None = None
    sysmem: int | None = None
    vram_now: int | None = None
    sysmem_now: int | None = None


@dataclass(frozen=True, slots=True)
class Tenant:
    """An instance that takes up room (not GONE).

    `charge`: what it is counted with: measured, or estimated while it loads. `settled`: its tenure
    is over. `keep_value`: seconds, see `keep_value`.
    """

    id: str
    state: State
    busy: bool
    charge: Need = Need()
    keep_value: float = 0.0
    settled: bool = True
    pinned: bool = False  # one of its profile's `min_instances`
    is_text: bool = True


@dataclass(frozen=True, slots=True)
class Fits:
    """Start it now; `on_cpu`: without the GPU, where it would be in others' way."""

    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Evict:
    """Drain these; start when they are gone. `on_cpu`: the room is for one without the GPU."""

    ids: tuple[str, ...]
    on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class Later:
    """There is room in principle, but what there is is busy or leaving already."""

    reason: str


@dataclass(frozen=True, slots=True)
class Never:
    """It can't fit. `reason` completes "can't start X: ..."; `failed`: it isn't for want of room."""

    reason: str
    failed: bool = False


Room = Fits | Evict | Later | Never


def keep_value(reload_seconds: float, idle_seconds: float) -> float:
    """What evicting an idle instance costs: seconds to load it again, times the chance that it is wanted."""
    return reload_seconds * math.exp2(-idle_seconds / _HALF_LIFE_SECONDS)


def room(
    need: Need,
    tenants: Sequence[Tenant],
    budget: Budget,
    *,
    is_text: bool = True,
    promised: Sequence[Tenant] = (),
) -> Room:
    """Room for one more instance that needs `need`, beside `tenants`. See the module for the rule.

    `promised`: those who aren't started yet, but for whom others are leaving already.
    """
    never = _never(need, budget)
    if never is not None:
        return never
    running = [t for t in tenants if t.state not in LEAVING]
    staying = [*running, *promised]
    short = _shortage(need, staying, budget)
    if not any(short):
        if not any(_shortage(need, tenants, budget)):
            return Fits()
        return Later(f"waiting for {next(t.id for t in tenants if t.state in LEAVING)} to leave")
    evictable = [t for t in running if t.state is State.READY and not t.pinned and (is_text or not t.is_text)]
    idle = [t for t in evictable if not t.busy]
    for candidates in (idle, [*idle, *(t for t in evictable if t.busy and t.settled)]):
        chosen = _cheapest(short, candidates)
        if chosen is not None:
            return Evict(chosen)
    return Later(_who_is_in_the_way(need, staying, budget))


def room_beside_text(
    need: Need,
    cpu_only: Need | None,
    tenants: Sequence[Tenant],
    budget: Budget,
    *,
    promised: Sequence[Tenant] = (),
) -> Room:
    """Room for an embedding or rerank model: on the GPU or, with `cpu_only`, without it.

    Text models leave only for one that has no place beside them, however long it waits.
    """
    answer = room(need, tenants, budget, is_text=False, promised=promised)
    if isinstance(answer, Fits):
        return answer
    immovable = [*(t for t in tenants if t.state not in LEAVING and (t.is_text or t.pinned)), *promised]
    beside = not any(_shortage(need, immovable, budget)) and not isinstance(answer, Never)
    if cpu_only is not None:
        on_cpu = room(cpu_only, tenants, budget, is_text=False, promised=promised)
        if isinstance(on_cpu, Fits):
            return Fits(on_cpu=True)
        if isinstance(on_cpu, Evict) and not isinstance(answer, Evict):
            return Evict(on_cpu.ids, on_cpu=True)
        if not isinstance(on_cpu, Never) and not any(_shortage(cpu_only, immovable, budget)):
            # It will have its place, if not at once.
            return answer if beside or isinstance(answer, Evict) else on_cpu
        if isinstance(answer, Never) and not isinstance(on_cpu, Never):
            answer = room(cpu_only, tenants, budget, promised=promised)
            return Evict(answer.ids, on_cpu=True) if isinstance(answer, Evict) else answer
    if beside or isinstance(answer, Evict):
        return answer
    return room(need, tenants, budget, promised=promised)


def room_after_failure(
    tenants: Sequence[Tenant], answer: Fits | Evict, *, is_text: bool, busy_too: bool
) -> Room:
    """Room for one that failed to start for want of memory, though by `answer` it should have had it.

    What was estimated or measured was wrong then, so this doesn't ask for sizes: first all idle ones
    leave, after a second failure the busy ones, too, whose tenure is over.
    """
    if any(t.state in LEAVING for t in tenants):
        return Later("waiting for others to leave, since memory was short")
    others = [t for t in tenants if t.state is State.READY and not t.pinned and (is_text or not t.is_text)]
    leave = tuple(t.id for t in others if not t.busy or (busy_too and t.settled))
    return Evict(leave, answer.on_cpu) if leave else answer


def _never(need: Need, budget: Budget) -> Never | None:
    if budget.max_instances < 1:
        return Never("max_instances_per_node is 0")
    kinds = (
        ("GPU memory", "max_vram_mb", need.vram, budget.vram, budget.vram_now),
        ("memory", "max_sysmem_mb", need.sysmem, budget.sysmem, budget.sysmem_now),
    )
    for name, key, wanted, limit, now in kinds:
        if wanted and limit is not None and wanted > limit:
            return Never(f"it needs about {wanted} MiB of {name}; {limit} MiB may be used here ({key})")
        if wanted and now is not None and wanted > now:
            return Never(
                f"it needs about {wanted} MiB of {name}; other programs leave {max(0, now)} MiB at present"
            )
    return None


def _shortage(need: Need, tenants: Iterable[Tenant], budget: Budget) -> tuple[int, int, int]:
    """How much has to leave before it fits beside `tenants`: instances, MiB on the GPU, MiB of memory."""
    count, total = 1, need
    for tenant in tenants:
        count += 1
        total += tenant.charge
    return (
        max(0, count - budget.max_instances),
        _over(total.vram, need.vram, budget.vram, budget.vram_now),
        _over(total.sysmem, need.sysmem, budget.sysmem, budget.sysmem_now),
    )


def _over(total: int, wanted: int, *limits: int | None) -> int:
    # One that wants none of a kind isn't held up by a shortage of it.
    return max([0, *(total - limit for limit in limits if limit is not None)]) if wanted else 0


def _covers(group: Sequence[Tenant], short: tuple[int, int, int]) -> bool:
    instances, vram, sysmem = short
    return (
        len(group) >= instances
        and sum(t.charge.vram for t in group) >= vram
        and sum(t.charge.sysmem for t in group) >= sysmem
    )


def _cheapest(short: tuple[int, int, int], candidates: Sequence[Tenant]) -> tuple[str, ...] | None:
    """Ids of the fewest, least valuable `candidates` that cover what is short; None when all don't."""
    if not _covers(candidates, short):
        return None
    ranked = sorted(candidates, key=lambda t: (t.busy, t.keep_value))
    for size in range(1, len(ranked) + 1):
        if math.comb(len(ranked), size) > _MAX_SETS:
            return _greedy(short, ranked)
        sets = [group for group in combinations(ranked, size) if _covers(group, short)]
        if sets:
            best = min(sets, key=lambda group: (sum(t.busy for t in group), sum(t.keep_value for t in group)))
            return tuple(t.id for t in best)
    return None


def _greedy(short: tuple[int, int, int], ranked: Sequence[Tenant]) -> tuple[str, ...]:
    """Largest first until it fits, then give back what turned out not to be needed, dearest first."""
    chosen: list[Tenant] = []
    for tenant in sorted(ranked, key=lambda t: (t.busy, -(t.charge.vram + t.charge.sysmem), t.keep_value)):
        chosen.append(tenant)
        if _covers(chosen, short):
            break
    for tenant in sorted(chosen, key=lambda t: (not t.busy, -t.keep_value)):
        rest = [t for t in chosen if t is not tenant]
        if _covers(rest, short):
            chosen = rest
    return tuple(t.id for t in chosen)


def _who_is_in_the_way(need: Need, staying: Sequence[Tenant], budget: Budget) -> str:
    pinned = [t for t in staying if t.pinned]
    if pinned and any(_shortage(need, pinned, budget)):
        return f"no room beside what is kept loaded (min_instances): {', '.join(t.id for t in pinned)}"
    loading = [t.id for t in staying if t.state is State.STARTING]
    if loading:
        return f"waiting for room: {loading[0]} is loading"
    busy = [t.id for t in staying if t.busy]
    return f"waiting for room: {(busy or [t.id for t in staying])[0]} is in use"


def over_budget(tenants: Sequence[Tenant], budget: Budget) -> tuple[str, ...]:
    """Who has to leave because strangers took memory after our loads: idle ones first, then busy ones
    (which finish their requests), least valuable first, until the rest fits. Starting ones stay.
    """
    leaving: list[str] = []
    staying = [t for t in tenants if t.state not in LEAVING]
    order = sorted(
        (t for t in staying if t.state is State.READY), key=lambda t: (t.busy, t.pinned, t.keep_value)
    )
    for tenant in order:
        total = Need()
        for other in staying:
            total += other.charge
        vram_over = budget.vram_now is not None and total.vram > budget.vram_now
        sysmem_over = budget.sysmem_now is not None and total.sysmem > budget.sysmem_now
        if not (vram_over and tenant.charge.vram) and not (sysmem_over and tenant.charge.sysmem):
            continue
        leaving.append(tenant.id)
        staying = [t for t in staying if t.id != tenant.id]
    return tuple(leaving)
