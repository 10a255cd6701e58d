"""Our children's process trees and the memory in them.

A tree is a root with all its descendants and with the members of the process group that it leads: a wrapper
script's engine belongs to it even when the script is gone. On Linux /proc is read directly (psutil takes
several times as long, and this runs every second); elsewhere psutil is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

# Going through all processes of a machine costs milliseconds, and trees rarely change but at their beginning.
_YOUNG_SECONDS = 10.0
_SCAN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """Resident bytes: `private` without file-backed pages, `mapped` those alone."""

    private: int
    mapped: int


class ProcessTable:
    """The processes of this machine. `proc` is where the kernel's files are; without them, psutil."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self.native = (proc / "self/status").exists()
        self._trees: dict[int, tuple[int, ...]] = {}
        self._first_seen: dict[int, float] = {}
        self._scan_at = 0.0

    def trees(self, roots: Iterable[int], now: float) -> dict[int, tuple[int, ...]]:
        """All processes of each root's tree, the root first; as they were up to 5 s ago for old trees."""
        wanted = tuple(dict.fromkeys(roots))
        self._first_seen = {root: self._first_seen.get(root, now) for root in wanted}
        young = any(now - since < _YOUNG_SECONDS for since in self._first_seen.values())
        if wanted and (young or now >= self._scan_at or any(root not in self._trees for root in wanted)):
            self._scan_at = now + _SCAN_SECONDS
            self._trees = _trees(wanted, self._links())
        else:
            self._trees = {root: self._trees[root] for root in wanted}
        return dict(self._trees)

    def memory(self, pids: Iterable[int]) -> ProcessMemory | None:
        """The sum over `pids`; those that are gone hold nothing. None where not one could be measured."""
        found = [held for pid in pids if (held := self._memory_of(pid)) is not None]
        if not found:
            return None
        return ProcessMemory(sum(held.private for held in found), sum(held.mapped for held in found))

    def _memory_of(self, pid: int) -> ProcessMemory | None:
        return _status_memory(f"{self._proc}/{pid}/status") if self.native else _psutil_memory(pid)

    def _links(self) -> dict[int, tuple[int, int]]:
        """Parent and process group of every process."""
        return _proc_links(str(self._proc)) if self.native else _psutil_links()


def _trees(roots: Iterable[int], links: Mapping[int, tuple[int, int]]) -> dict[int, tuple[int, ...]]:
    roots = frozenset(roots)
    children: dict[int, list[int]] = {}
    for pid, (parent, group) in links.items():
        children.setdefault(parent, []).append(pid)
        if group in roots and group not in (parent, pid):
            children.setdefault(group, []).append(pid)
    trees = {}
    for root in roots:
        members = dict.fromkeys([root])
        waiting = [root]
        while waiting:
            for child in children.get(waiting.pop(), ()):
                # Another root below this one has its own tree.
                if child not in members and child not in roots:
                    members[child] = None
                    waiting.append(child)
        trees[root] = (root, *sorted(members.keys() - {root}))
    return trees


def _proc_links(proc: str) -> dict[int, tuple[int, int]]:
    links: dict[int, tuple[int, int]] = {}
    try:
        names = os.listdir(proc)
    except OSError:
        return links
    for name in names:
        if not name.isdecimal():
            continue
        stat = _read(f"{proc}/{name}/stat")
        # The name of the program, in brackets, may hold anything: what counts begins after the last one.
        fields = stat[stat.rfind(b")") + 1 :].split(maxsplit=4)
        if len(fields) > 2:
            links[int(name)] = (int(fields[1]), int(fields[2]))
    return links


def _status_memory(path: str) -> ProcessMemory | None:
    status = _read(path)
    if not status:
        return None
    # A zombie has no such lines, and no memory.
    private = _kilobytes(status, b"\nRssAnon:") + _kilobytes(status, b"\nRssShmem:")
    return ProcessMemory(private << 10, _kilobytes(status, b"\nRssFile:") << 10)


def _kilobytes(status: bytes, label: bytes) -> int:
    start = status.find(label)
    if start < 0:
        return 0
    start += len(label)
    return int(status[start : status.index(b"kB", start)])


def _read(path: str) -> bytes:
    """The file's bytes, none where it can't be read: processes end while one looks at them."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(descriptor, 8192)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _psutil_links() -> dict[int, tuple[int, int]]:
    links = {}
    for process in psutil.process_iter():
        try:
            links[process.pid] = (process.ppid(), os.getpgid(process.pid))
        except (psutil.Error, OSError):
            continue
    return links


def _psutil_memory(pid: int) -> ProcessMemory | None:
    """Private memory where the system tells it (USS), else all resident memory.

    Neither leaves out file-backed pages that nobody shares: too much rather than too little.
    """
    try:
        process = psutil.Process(pid)
        try:
            full = process.memory_full_info()
            return ProcessMemory(full.uss, max(0, full.rss - full.uss))
        except psutil.AccessDenied:
            return ProcessMemory(process.memory_info().rss, 0)
    except psutil.Error:
        return None
