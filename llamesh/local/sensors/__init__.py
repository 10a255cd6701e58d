"""What this machine's memory is used for: one look at everything, in plain blocking calls.

Drivers may block, so `Sensors.sample` belongs in a thread. Each source is behind the same small interface and
fails alone: what one can't say is None in the reading, with the reason beside it, and the others still speak.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llamesh.core.readings import Device, Reading
from llamesh.local.sensors.amd import AmdSensor
from llamesh.local.sensors.nvidia import NvidiaSensor
from llamesh.local.sensors.processes import ProcessMemory, ProcessTable
from llamesh.local.sensors.system import SystemMemory
from llamesh.local.sensors.unified import UnifiedSensor, is_apple_silicon

__all__ = ["AmdSensor", "GpuSensor", "NvidiaSensor", "Sensors", "SystemMemory", "UnifiedSensor"]


class GpuSensor(Protocol):
    """A source of devices. `problem` says why it has none, None where there is nothing to complain about."""

    problem: str | None

    def read(self, trees: Mapping[int, tuple[int, ...]], now: float) -> tuple[Device, ...]:
        """The devices now. `trees`: our processes, by root; `now`: seconds, monotonic."""

    def close(self) -> None:
        """Give up what the driver lent."""


class Sensors:
    """Everything that can be measured here. Cheap to make: drivers are opened by the first sample."""

    def __init__(
        self,
        *,
        root: Path = Path("/"),
        gpus: Sequence[GpuSensor] | None = None,
        system: SystemMemory | None = None,
        processes: ProcessTable | None = None,
    ) -> None:
        """`root` is where /proc and /sys are found; the others replace what is right for this platform."""
        self._system = system or SystemMemory(root)
        self._processes = processes or ProcessTable(root / "proc")
        self._gpus = tuple(gpus) if gpus is not None else _gpu_sensors(root, self._system)

    def sample(self, pids: Iterable[int], *, now: float) -> Reading:
        """Look at the machine and at the process trees whose roots are `pids`; never raises.

        `now` is in seconds of any monotonic clock, the same one at each call. Blocking, for milliseconds as a
        rule and without bound when a driver hangs: call it in a thread, give up on that after a while, and
        call again as usual. What hangs is skipped and reported until it is back.
        """
        problems: list[str] = []
        trees = self._processes.trees(pids, now)
        memory = {root: self._processes.memory(members) for root, members in trees.items()}
        known: dict[int, ProcessMemory] = {root: held for root, held in memory.items() if held is not None}
        total, available = self._system.read()
        devices: list[Device] = []
        for gpu in self._gpus:
            try:
                devices += gpu.read(trees, now)
            # The border to drivers: whatever one of them comes up with must not hide the others.
            except Exception as error:
                problems.append(f"{type(gpu).__name__}: {type(error).__name__}: {error}")
            else:
                if gpu.problem is not None:
                    problems.append(gpu.problem)
        return Reading(
            taken=now,
            devices=tuple(devices),
            sysmem_total=total,
            sysmem_available=available,
            sysmem_used_by={root: held.private for root, held in known.items()},
            sysmem_mapped_by={root: held.mapped for root, held in known.items()},
            trees=trees,
            problems=tuple(problems),
        )

    def close(self) -> None:
        """Close the drivers. A later sample opens them again."""
        for gpu in self._gpus:
            gpu.close()


def _gpu_sensors(root: Path, system: SystemMemory) -> tuple[GpuSensor, ...]:
    if sys.platform == "darwin":
        return (UnifiedSensor(system),) if is_apple_silicon() else ()
    return (NvidiaSensor(), AmdSensor(root))
