"""Who holds the memory: our instances, strangers, nobody. Pure arithmetic on one reading.

On each device `ours + external` is what the driver says is in use, whenever it says so. What is ours comes
from the driver's list of processes. Where that can't name an instance that is loaded (WSL2, the process ids
of another namespace, no list at all), the instance's own figure stands in: its engine's memory breakdown, the
learned peak or the estimate. Strangers have the rest, and that is never below zero.

An instance that is loading takes memory between two looks: what it will still take is `pending`. Where the
driver can't name it, what is taken during the load can't be told from a stranger's, so strangers are held to
have what they had when nothing was loading (`calm`), or more where even the whole load can't explain it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from llamesh.core.readings import Device, Reading


@dataclass(frozen=True, slots=True)
class Claim:
    """What one instance of ours is expected to hold, in bytes.

    `pid` is the root of its process tree, None before it is started. `device_bytes` goes by uuid, of the
    devices that it may use: 0 where nobody knows what for.
    `settled`: loaded, so what it holds now is all. `mapped_counts`: its weights are used from system memory,
    so file-backed pages count as its own; else they are only on their way to a device.
    """

    id: str
    pid: int | None
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    sysmem_bytes: int = 0
    settled: bool = False
    mapped_counts: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """The memory of one device, of all devices, or of the machine, in bytes.

    `ours` is held by our instances, `external` by others, `pending` will be taken by instances that are
    loading, `free` is what is left after that. None: unknown. Never negative.
    """

    total: int | None
    ours: int
    external: int | None
    pending: int
    free: int | None


@dataclass(frozen=True, slots=True)
class Holding:
    """What one instance holds, in bytes. `measured`: seen from outside, on every device that it uses."""

    device_bytes: Mapping[str, int]
    sysmem_bytes: int | None
    measured: bool

    @property
    def all_devices(self) -> int:
        """The sum over all devices."""
        return sum(self.device_bytes.values())


@dataclass(frozen=True, slots=True)
class Accounts:
    """`devices` by uuid; `device_wide` sums those whose use is known, None where none is; `unknown` the rest.

    `instances` goes by the id of the claim. `calm` belongs into the next call of `account`.
    """

    devices: Mapping[str, Pool]
    device_wide: Pool
    unknown: tuple[str, ...]
    sysmem: Pool
    instances: Mapping[str, Holding]
    calm: Mapping[str, int]


def account(reading: Reading, claims: Sequence[Claim], *, calm: Mapping[str, int] | None = None) -> Accounts:
    """Share out the memory in `reading` among `claims` and strangers.

    Claims of instances that have not been started count as pending. A GPU cut into MIG devices isn't counted,
    its parts are. Where memory is unified, the device is a part of the system memory, not added to it.
    `calm` is that of the previous result.
    """
    calm = calm or {}
    devices: dict[str, Pool] = {}
    holdings: dict[str, dict[str, int]] = {claim.id: {} for claim in claims}
    guessed: set[str] = set()
    unknown: list[str] = []
    next_calm: dict[str, int] = {}
    for device in reading.devices:
        if not device.holds_models:
            continue
        share = _Share(device, reading.trees, claims)
        pool = devices[device.uuid] = share.pool(calm.get(device.uuid))
        for claim_id, held in share.held.items():
            holdings[claim_id][device.uuid] = held
        guessed |= share.guessed
        if pool.free is None:
            unknown.append(device.uuid)
        if pool.external is not None and not share.loading_unseen:
            next_calm[device.uuid] = pool.external
        elif device.uuid in calm:
            next_calm[device.uuid] = calm[device.uuid]
    sysmem, resident = _system(reading, claims)
    instances = {
        claim.id: Holding(
            holdings[claim.id],
            resident[claim.id],
            measured=claim.id not in guessed and resident[claim.id] is not None,
        )
        for claim in claims
    }
    # A device that is unknown now was calm once: keep that for when it is back.
    next_calm = {**{uuid: was for uuid, was in calm.items() if uuid not in devices}, **next_calm}
    return Accounts(devices, _sum(devices.values()), tuple(unknown), sysmem, instances, next_calm)


class _Share:
    """One device, divided. `loading_unseen`: bytes expected by loads that can't be told from strangers."""

    def __init__(self, device: Device, trees: Mapping[int, tuple[int, ...]], claims: Sequence[Claim]) -> None:
        self.device = device
        self.held: dict[str, int] = {}
        self.guessed: set[str] = set()
        self.pending = 0
        self.loading_unseen = 0
        named = None if device.processes is None else dict(device.processes)
        for claim in claims:
            self._take(claim, named, trees)

    def _take(
        self, claim: Claim, named: dict[int, int | None] | None, trees: Mapping[int, tuple[int, ...]]
    ) -> None:
        expected = claim.device_bytes.get(self.device.uuid, 0)
        if claim.pid is None:
            self.pending += expected
            return
        seen = [named[pid] for pid in trees.get(claim.pid, (claim.pid,)) if pid in named] if named else []
        told = [held for held in seen if held is not None]
        if seen and len(told) == len(seen):
            self.held[claim.id] = sum(told)
            if not claim.settled:
                self.pending += max(0, expected - sum(told))
            return
        if claim.settled:
            # It is there, even if the driver doesn't say so.
            held = max(expected, sum(told))
            if held:
                self.held[claim.id] = held
            if held or seen or (named is None and self.device.uuid in claim.device_bytes):
                self.guessed.add(claim.id)
        else:
            # Not listed: it has taken nothing yet, or the driver doesn't know it by this process id.
            self.guessed.add(claim.id)
            self.loading_unseen += expected

    def pool(self, calm: int | None) -> Pool:
        total, used = self.device.usable_bytes, self.device.used_bytes
        ours = sum(self.held.values())
        if used is None:
            return Pool(total, ours, None, self.pending + self.loading_unseen, None)
        # The list of processes and the sum are two questions; and a figure of the engine's may be too high.
        ours = min(ours, used)
        rest = used - ours
        external = rest
        if self.loading_unseen:
            external = max(0, rest - self.loading_unseen, min(rest, rest if calm is None else calm))
        loaded = rest - external
        pending = self.pending + max(0, self.loading_unseen - loaded)
        free = None if total is None else max(0, total - used - pending)
        return Pool(total, ours + loaded, external, pending, free)


def _sum(pools: Iterable[Pool]) -> Pool:
    pools = list(pools)
    known = [pool for pool in pools if pool.free is not None]
    ours, pending = sum(pool.ours for pool in pools), sum(pool.pending for pool in pools)
    if not known:
        return Pool(None, ours, None, pending, None)
    return Pool(
        total=sum(pool.total or 0 for pool in known),
        ours=ours,
        external=sum(pool.external or 0 for pool in known),
        pending=pending,
        free=sum(pool.free or 0 for pool in known),
    )


def _system(reading: Reading, claims: Sequence[Claim]) -> tuple[Pool, dict[str, int | None]]:
    """System memory, and what each claim holds of it."""
    resident: dict[str, int | None] = {}
    own = needed_pages = guessed = pending = 0
    for claim in claims:
        measured = None if claim.pid is None else reading.sysmem_used_by.get(claim.pid)
        if claim.pid is None or measured is None:
            resident[claim.id] = None
            # Not started, or not to be measured: a loaded one is there all the same.
            if claim.settled:
                guessed += claim.sysmem_bytes
            else:
                pending += claim.sysmem_bytes
            continue
        pages = reading.sysmem_mapped_by.get(claim.pid, 0) if claim.mapped_counts else 0
        own += measured
        needed_pages += pages
        resident[claim.id] = measured + pages
        if not claim.settled:
            pending += max(0, claim.sysmem_bytes - measured - pages)
    total, available = reading.sysmem_total, reading.sysmem_available
    if total is None or available is None:
        return Pool(total, own + needed_pages + guessed, None, pending, None), resident
    used = max(0, total - available)
    # File-backed pages count as available, since the kernel can drop them: not those that a model works on.
    ours = min(own + guessed, used)
    free = max(0, available - needed_pages - pending)
    return Pool(total, ours + needed_pages, used - ours, pending, free), resident
