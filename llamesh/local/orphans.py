"""What an earlier life left behind: a ledger of children on disk, and the sweep at the next start.

While a node has children, its ledger directory holds one small file, `node-<pid>-<start>.json`:

    {"owner": {"pid": 4711, "started": 1790000000.25, "session": 4000},
     "children": [{"pid": 4720, "started": 1790000031.5}]}

Times are seconds since the epoch as psutil gives them; a child leads a process group of its own number.

Who is dead
    The owner keeps the file locked (flock) for as long as it lives; the kernel drops the lock with the
    process. Where a file system has no locks, pid and start time of the owner decide. A file whose owner
    lives by either sign is left alone, so several nodes may share a directory and start at once.

Who may be killed
    A process that leads the group and started when the ledger says. The leader may be gone while its group
    is not (a wrapper script that died with us): then only members of this user and of the owner's session
    which started after the leader and since the last boot. As long as a group has members the kernel
    doesn't give its number to anybody else. When in doubt nothing is signalled: an orphan that stays costs
    memory, a stranger that is killed costs trust.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llamesh.local.process import group_members, has_ended

__all__ = ["Ledger", "Swept"]

# The same start time read twice may differ by a second on Linux: the kernel reports the time of boot in
# whole seconds, and the start of a process relative to it.
_TOLERANCE_SECONDS = 2.0
# SIGKILL takes milliseconds. What was killed holds ports and memory that we are about to ask for.
_GONE_SECONDS = 3.0
_POLL_SECONDS = 0.005


@dataclass(frozen=True, slots=True)
class Swept:
    """What a sweep did: the children (process ids, each a group) it killed, and what it couldn't do."""

    killed: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Entry:
    pid: int
    started: float


@dataclass(frozen=True, slots=True)
class _Page:
    """One ledger file, read and checked."""

    owner: _Entry
    session: int
    children: tuple[_Entry, ...]


class Ledger:
    """The children of this process, on disk for the next start to find.

    `directory` is created (0700) when it is first needed. The file exists only while there are children and
    is replaced atomically. A disk that refuses doesn't stop a node from serving: `record` and `forget` return
    what is wrong, for the log, and never raise.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._owner = _Entry(os.getpid(), psutil.Process().create_time())
        self._path = directory / f"node-{self._owner.pid}-{self._owner.started:.2f}.json"
        self._children: dict[int, float] = {}
        self._locked: int | None = None

    def record(self, pid: int) -> str | None:
        """Note a child that was just started and isn't reaped yet. None, or what is wrong."""
        try:
            self._children[pid] = psutil.Process(pid).create_time()
        except psutil.Error:
            return None  # Gone already, and with it the reason to note it.
        return self._update()

    def forget(self, pid: int) -> str | None:
        """A child is gone with its whole group; nothing happens for one that isn't recorded."""
        return None if self._children.pop(pid, None) is None else self._update()

    def close(self) -> None:
        """Remove the file and its lock: nothing of ours is left. `record` may be called again."""
        self._children.clear()
        with contextlib.suppress(OSError):
            self._path.unlink()
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def _update(self) -> str | None:
        if not self._children:
            self.close()
            return None
        try:
            self._write()
        except OSError as problem:
            return f"children can't be noted in {self._directory}: {problem}"
        return None

    def sweep(self) -> Swept:
        """Kill what dead owners left and remove their files. Blocks for milliseconds, at most about 3 s.

        Call it once at the start, before the first child. Never raises: what can't be read or killed is
        a warning.
        """
        killed: list[int] = []
        warnings: list[str] = []
        victims: list[psutil.Process] = []
        try:
            paths = sorted(self._directory.glob("node-*.json"))
        except OSError as problem:
            return Swept(warnings=(f"{self._directory}: {problem}",))
        for path in paths:
            try:
                with _abandoned(path) as text:
                    if text is None:
                        continue
                    page = _parse(text)
                    if page is not None and not _is_alive(page.owner):
                        for child in page.children:
                            members = _left_of(child, page.session)
                            if members and _kill(child.pid):
                                killed.append(child.pid)
                                victims.extend(members)
                            elif members:
                                warnings.append(f"{path}: not permitted to end process {child.pid}")
                        path.unlink(missing_ok=True)
                    elif page is None:
                        path.unlink(missing_ok=True)
                        warnings.append(f"{path}: not a ledger of children; removed")
            except OSError as problem:
                warnings.append(f"{path}: {problem}")
        self._remove_halves()
        deadline = time.monotonic() + _GONE_SECONDS
        while (alive := [p for p in victims if not has_ended(p)]) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        warnings += [f"process {process.pid} did not end on SIGKILL" for process in alive]
        return Swept(tuple(killed), tuple(warnings))

    def _write(self) -> None:
        """Replace the file by a new one that is locked before it gets the name: it is never seen unlocked."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        document = {
            "owner": {"pid": self._owner.pid, "started": self._owner.started, "session": os.getsid(0)},
            "children": [{"pid": pid, "started": started} for pid, started in self._children.items()],
        }
        half = self._path.with_suffix(".half")
        fd = os.open(half, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _lock(fd)
            with open(fd, "w", encoding="utf-8", closefd=False) as file:
                json.dump(document, file)
            half.replace(self._path)
        except BaseException:
            os.close(fd)
            raise
        if self._locked is not None:
            os.close(self._locked)
        self._locked = fd

    def _remove_halves(self) -> None:
        """Delete what a writer that died between writing and renaming left."""
        with contextlib.suppress(OSError):
            for half in self._directory.glob("node-*.half"):
                pid = half.name.split("-")[1]
                if not (pid.isdecimal() and psutil.pid_exists(int(pid))):
                    half.unlink(missing_ok=True)


@contextlib.contextmanager
def _abandoned(path: Path) -> Iterator[str | None]:
    """The text of a ledger file that nobody holds, locked meanwhile; None when its owner (or another sweep)
    holds it, or when it was replaced or removed before we had the lock."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    try:
        held = _lock(fd)
        if held:
            # The owner may have renamed a new file over the one that we opened: then it lives.
            with contextlib.suppress(FileNotFoundError):
                held = os.path.samestat(os.fstat(fd), path.stat())
        with open(fd, encoding="utf-8", errors="replace", closefd=False) as file:
            yield file.read() if held else None
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Whether nobody else holds the file; True also where the file system knows no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _parse(text: str) -> _Page | None:
    """The page, or None for anything that isn't one."""
    try:
        document = json.loads(text)
        session = document["owner"]["session"]
        if type(session) is not int:
            return None
        children = tuple(_entry(child) for child in document["children"])
        return _Page(_entry(document["owner"]), session, children)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _entry(value: dict[str, Any]) -> _Entry:
    pid, started = value["pid"], float(value["started"])
    # 0 means our own group to killpg, and 1 everybody.
    if type(pid) is not int or not 1 < pid < 2**31 or not math.isfinite(started):
        raise ValueError("not a child")
    return _Entry(pid, started)


def _is_alive(entry: _Entry) -> bool:
    """Whether the process of `entry` is there, the same one, not another under its number."""
    try:
        process = psutil.Process(entry.pid)
        return not has_ended(process) and _same_moment(process.create_time(), entry.started)
    except psutil.Error:
        return False


def _left_of(child: _Entry, session: int) -> list[psutil.Process]:
    """The living members of a dead owner's group; none when it isn't certain that it is that group."""
    if child.pid == os.getpgrp() or psutil.boot_time() > child.started + _TOLERANCE_SECONDS:
        return []
    members = group_members(child.pid)
    leader = next((member for member in members if member.pid == child.pid), None)
    if leader is None:
        with contextlib.suppress(psutil.Error):
            # Not in the group that bears its number: whoever has the number now isn't the child.
            psutil.Process(child.pid)
            return []
    try:
        if leader is not None:
            ours = _same_moment(leader.create_time(), child.started)
        else:
            ours = all(_may_descend(member, child, session) for member in members)
    except (psutil.Error, OSError):
        return []
    return [member for member in members if not has_ended(member)] if ours else []


def _may_descend(member: psutil.Process, child: _Entry, session: int) -> bool:
    return (
        os.getsid(member.pid) == session
        and member.uids().real == os.getuid()
        and member.create_time() >= child.started - _TOLERANCE_SECONDS
    )


def _same_moment(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE_SECONDS


def _kill(group: int) -> bool:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return True
