"""Apple silicon: one pool of memory for processor and GPU.

Metal gives a GPU a share of it, the `recommendedMaxWorkingSetSize`: two thirds of machines up to 36 GiB and
three quarters of larger ones, unless the sysctl `iogpu.wired_limit_mb` says otherwise. The share isn't set
aside: what programs use of the machine's memory, the GPU can't have.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import sys
from collections.abc import Callable, Mapping

from llamesh.core.readings import Device
from llamesh.local.sensors.system import SystemMemory

_LARGE = 36 << 30
_LIMIT = "iogpu.wired_limit_mb"


def is_apple_silicon() -> bool:
    """Whether this is a Mac whose GPU shares the memory."""
    return sys.platform == "darwin" and platform.machine() == "arm64"


def gpu_share(total: int, wired_limit_mb: int | None) -> int:
    """Bytes that the GPU may use of `total`. `wired_limit_mb`: the sysctl, 0 or None where it isn't set."""
    if wired_limit_mb:
        return min(total, wired_limit_mb << 20)
    return total * 3 // 4 if total > _LARGE else total * 2 // 3


class UnifiedSensor:
    """The one device of such a machine; `used` is what keeps the GPU from its share, whoever holds it."""

    def __init__(self, system: SystemMemory, *, sysctl: Callable[[str], int | None] | None = None) -> None:
        self.problem: str | None = None
        self._system = system
        self._sysctl = _sysctl if sysctl is None else sysctl

    def read(self, trees: Mapping[int, tuple[int, ...]], now: float) -> tuple[Device, ...]:
        """The device now; see `GpuSensor`. Metal names no processes."""
        total, available = self._system.read()
        if total is None or available is None:
            device = Device(0, "unified", "Apple GPU", "unified", error="system memory is unknown")
            return (device,)
        share = gpu_share(total, self._sysctl(_LIMIT))
        used = share - min(share, available)
        return (Device(0, "unified", "Apple GPU", "unified", total_bytes=share, used_bytes=used),)

    def close(self) -> None:
        """Nothing is held open."""


def _sysctl(name: str) -> int | None:
    """An integer of macOS's sysctl, None where there is no such name."""
    library = ctypes.CDLL(ctypes.util.find_library("c"))
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    failed = library.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return None if failed else value.value
