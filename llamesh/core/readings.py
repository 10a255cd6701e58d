"""What the sensors saw at one moment: frozen values that cross from a thread to the deciding side.

Unknown is None, never zero: a driver that doesn't answer must not look like a free device. Sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DeviceKind = Literal["nvidia", "mig", "mig-parent", "amd", "unified"]
"""`mig-parent` is a GPU that was cut into MIG devices: nothing runs on it but through those."""


@dataclass(frozen=True, slots=True)
class Device:
    """One device that may hold model weights.

    `index` is its place in the driver's own order, among devices of its kind; MIG devices have that of their
    GPU. `uuid` is what the driver calls it for good; it is unique in a reading. `used_bytes` leaves out
    `reserved_bytes`, which the driver keeps for itself; where that isn't known, it is part of the former.
    `utilisation` is from 0 to 1. `processes` are pairs of process id and bytes: None where the driver can't
    name processes at all, bytes None where it can't say how much one holds. `error` says why values are
    missing that should be there. `parent` is the uuid of the GPU that a MIG device is part of.
    """

    index: int
    uuid: str
    name: str
    kind: DeviceKind
    total_bytes: int | None = None
    used_bytes: int | None = None
    reserved_bytes: int | None = None
    utilisation: float | None = None
    processes: tuple[tuple[int, int | None], ...] | None = None
    error: str | None = None
    parent: str | None = None

    @property
    def usable_bytes(self) -> int | None:
        """What programs can have at most: the total less what the driver keeps."""
        return None if self.total_bytes is None else self.total_bytes - (self.reserved_bytes or 0)

    @property
    def holds_models(self) -> bool:
        """Whether a child can use it as a device; a GPU cut into MIG devices is only their sum."""
        return self.kind != "mig-parent"


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the machine.

    `taken` is in seconds of the caller's monotonic clock. `sysmem_total` and `sysmem_available` obey cgroup
    limits. The mappings go by the process ids that were asked for; one that isn't there wasn't measured.
    `sysmem_used_by` is the resident memory of the whole process tree without file-backed pages,
    `sysmem_mapped_by` the file-backed pages alone (weights read by mmap), `trees` all processes of the tree.
    `problems` says in words what couldn't be read.
    """

    taken: float
    devices: tuple[Device, ...] = ()
    sysmem_total: int | None = None
    sysmem_available: int | None = None
    sysmem_used_by: Mapping[int, int] = field(default_factory=dict)
    sysmem_mapped_by: Mapping[int, int] = field(default_factory=dict)
    trees: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def gpu_telemetry(self) -> bool:
        """Whether the memory of at least one device is known."""
        return any(device.used_bytes is not None for device in self.devices if device.holds_models)
