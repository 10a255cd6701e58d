"""System memory, as far as this process may have it: the machine's, cut by the limits of its cgroups.

Formats: Documentation/admin-guide/cgroup-v2 and cgroup-v1/memory in the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath

import psutil

# Version 1 writes "no limit" as the largest multiple of a page; nobody has an exbibyte.
_NO_LIMIT = 1 << 60


def machine_memory() -> tuple[int, int]:
    """Total and available bytes of the machine."""
    memory = psutil.virtual_memory()
    return memory.total, memory.available


class SystemMemory:
    """Reads total and available memory. `root` is where /proc and /sys are found."""

    def __init__(
        self, root: Path = Path("/"), *, machine: Callable[[], tuple[int, int]] = machine_memory
    ) -> None:
        self._root = root
        self._machine = machine

    def read(self) -> tuple[int | None, int | None]:
        """Total and available bytes, both within every cgroup limit above us; None where unknown.

        Available is what can be had without swapping: free memory and file cache. So a cgroup's use is its
        current figure less its file cache, active or not, as the kernel counts MemAvailable for the machine.
        """
        try:
            total, available = self._machine()
        except (OSError, psutil.Error, RuntimeError):
            return None, None
        for limit, used in self._limits():
            total = min(total, limit)
            available = min(available, max(0, limit - used))
        return total, min(total, available)

    def _limits(self) -> list[tuple[int, int]]:
        """Limit and use of each cgroup from our own upward that has a limit."""
        place = self._own_cgroup()
        if place is None:
            return []
        mount, path, names = place
        limits = []
        # A container may see its own group at the mount's root while /proc names it from outside: the folders
        # in between aren't there and are passed over.
        for folder in (path, *path.parents):
            here = mount.joinpath(*[part for part in folder.parts if part not in ("/", "..")])
            limit = min((_limit(here / name) for name in names.limits), default=_NO_LIMIT)
            if limit >= _NO_LIMIT:
                continue
            current = _number(here / names.current)
            if current is not None:
                limits.append((limit, max(0, current - _cache(here / "memory.stat", names.cache))))
        return limits

    def _own_cgroup(self) -> tuple[Path, PurePosixPath, _Names] | None:
        text = _text(self._root / "proc/self/cgroup") or ""
        unified: str | None = None
        for line in text.splitlines():
            number, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if "memory" in controllers.split(","):
                return self._root / "sys/fs/cgroup/memory", PurePosixPath(path), _VERSION_1
            if number == "0" and not controllers:
                unified = path
        if unified is None:
            return None
        return self._root / "sys/fs/cgroup", PurePosixPath(unified), _VERSION_2


class _Names:
    """What the files of one cgroup version are called."""

    def __init__(self, limits: tuple[str, ...], current: str, cache: frozenset[str]) -> None:
        self.limits = limits
        self.current = current
        self.cache = cache


# Above memory.high a group is slowed down until it is of no use, so that counts as the limit.
_VERSION_2 = _Names(
    ("memory.max", "memory.high"), "memory.current", frozenset({"inactive_file", "active_file"})
)
_VERSION_1 = _Names(
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    frozenset({"total_inactive_file", "total_active_file"}),
)


def _cache(path: Path, names: frozenset[str]) -> int:
    total = 0
    for line in (_text(path) or "").splitlines():
        name, _, value = line.partition(" ")
        if name in names and value.isdecimal():
            total += int(value)
    return total


def _limit(path: Path) -> int:
    number = _number(path)
    return _NO_LIMIT if number is None else number


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", for anything else, and where there is no such file."""
    text = _text(path)
    return int(text) if text is not None and text.strip().isdecimal() else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
