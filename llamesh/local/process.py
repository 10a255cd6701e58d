"""One child process: started in its own group, tied to our life, its output kept, its end never missed.

How it is tied to our life
    Where `setpriv` knows `--pdeathsig` (Linux), the kernel kills the child the moment we die, however we
    die. That promise hangs on the *thread* that forked, so `Child.spawn` is synchronous and belongs on the
    main thread; a worker thread of trio ends after ten idle seconds and would take the child with it. The
    promise begins a moment after the start, so a shell then looks whether we still are the parent before it
    turns into the command: there is no gap in which we could die unnoticed.
    Elsewhere, and for what a wrapper script started behind our back, `orphans.Ledger` cleans up at the
    next start.

Whom a signal reaches
    Always the whole group, since the configured binary may be a wrapper script. A process id may be given
    to a stranger as soon as it is reaped, so the order at the end of a child is fixed: see that the leader
    exited *without* reaping it (a zombie keeps the number, of the process and of the group), kill what is
    left of the group, reap, and never signal that number again. `Child` is the only one to reap.

How it is watched
    By pidfd where the kernel has it, else by polling the process state. Output is read without blocking
    until the end of the leader plus a short grace, not until end-of-file: a grandchild that left the
    group may hold the pipe for ever.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

from llamesh.local.output import LineCutter, LogTail

__all__ = ["Child", "LogTail", "Platform", "group_members", "has_ended"]

_READ_BYTES = 65536

# After the leader's exit its last words are already in the pipe; more than this is a stranger holding it.
LOG_GRACE_SECONDS = 0.5
# llama-server lingers after one SIGTERM when a stream is open and leaves at once on a second one.
SECOND_TERM_SECONDS = 2.0
# SIGKILL takes milliseconds unless the process is stuck inside a driver; then waiting doesn't help.
_REAP_SECONDS = 5.0
_GROUP_SECONDS = 1.0
_FIRST_POLL_SECONDS = 0.01
_LAST_POLL_SECONDS = 0.25
_TRY_SETPRIV_SECONDS = 5.0

# Run by `sh -c` with our process id as $0 and the command as the rest; see the module.
_UNLESS_ORPHANED = '[ "$PPID" = "$0" ] || exit 1; exec "$@"'


@dataclass(frozen=True, slots=True)
class Platform:
    """What this system offers for watching children. `Platform()` is the plain path that works anywhere."""

    setpriv: str | None = None
    """Path of a `setpriv` that can tie a child to our life, None where there is none."""
    pidfd: bool = False
    """Whether the end of a process can be awaited as a file descriptor."""

    @staticmethod
    @functools.cache
    def detect() -> Platform:
        """Look once: runs `setpriv` on a trivial command, since busybox has one without `--pdeathsig`."""
        return Platform(setpriv=_working_setpriv(), pidfd=_has_pidfd())


def _working_setpriv() -> str | None:
    path = shutil.which("setpriv") if sys.platform == "linux" else None
    if path is None:
        return None
    command = [path, "--pdeathsig", "KILL", "--", "sh", "-c", ":"]
    try:
        outcome = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TRY_SETPRIV_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return path if outcome.returncode == 0 else None


def _has_pidfd() -> bool:
    # The function may be there while the kernel, or a sandbox around us, refuses the call.
    return _open_pidfd(os.getpid(), close=True) is not None


def _open_pidfd(pid: int, *, close: bool = False) -> int | None:
    if not hasattr(os, "pidfd_open"):
        return None
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return None
    if close:
        os.close(fd)
    return fd


class Child:
    """One OS process in its own group. Made by `spawn`, owned by the task that runs `run`.

    `terminate`, `kill` and `stop` may be called at any time, also before `run` and long after the end.
    """

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        output: int,
        on_line: Callable[[str], None] | None,
        platform: Platform,
    ) -> None:
        self.pid = popen.pid
        self.tail = LogTail()
        self._popen = popen
        self._output = trio.lowlevel.FdStream(output)
        self._on_line = on_line
        self._on_line_failed = False
        # Opened while the child can't have been reaped, so it is certainly about this process.
        self._pidfd = _open_pidfd(popen.pid) if platform.pidfd else None
        self._poll_seconds = _FIRST_POLL_SECONDS
        self._returncode: int | None = None
        self._entered = False
        self._reader_gone = trio.Event()
        self._done = trio.Event()

    def __repr__(self) -> str:
        # No arguments: they may hold a key.
        return f"<Child pid={self.pid} returncode={self._returncode}>"

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal, None while the process lives."""
        return self._returncode

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        cwd: Path | None = None,
        on_line: Callable[[str], None] | None = None,
        platform: Platform | None = None,
    ) -> Child:
        """Start `argv` with the environment `env` and no other; a bare name is looked up in `env`'s PATH.

        `on_line` gets each line of stdout and stderr together; it must be quick and should not raise.
        `platform` is for tests. Raises FileNotFoundError, PermissionError or another OSError when nothing
        was started, RuntimeError off the main thread. The caller must `run` the result.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("children are started on the main thread: their life is tied to it")
        platform = Platform.detect() if platform is None else platform
        command = [_find_program(argv[0], env, cwd), *argv[1:]]
        if platform.setpriv is not None:
            # Each executes the next in its own place, so the process id stays.
            tie = [platform.setpriv, "--pdeathsig", "KILL", "--"]
            command = [*tie, "/bin/sh", "-c", _UNLESS_ORPHANED, str(os.getpid()), *command]
        reader, writer = os.pipe()
        try:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
                process_group=0,
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return cls(popen, reader, on_line, platform)

    async def run(self) -> int:
        """Read the output and wait for the end; returns the exit code (negative: the signal).

        On return the process is reaped, the rest of its group killed, and the last lines are in `tail`. If
        cancelled, kills the group and does the same, shielded, in a bounded time. Call it once.
        """
        if self._entered:
            raise RuntimeError("run() was called before")
        self._entered = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read)
                try:
                    await self._leader_exit()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._bury()
                    nursery.cancel_scope.cancel()
        finally:
            if self._pidfd is not None:
                os.close(self._pidfd)
                self._pidfd = None
            self._done.set()
        return self._code()

    async def wait(self) -> int:
        """Wait until `run` is through; any number of tasks may. Returns the exit code."""
        await self._done.wait()
        return self._code()

    def terminate(self) -> None:
        """SIGTERM to the group; nothing when it is gone."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to the group; nothing when it is gone."""
        self._signal(signal.SIGKILL)

    async def stop(self, grace: float) -> None:
        """SIGTERM, a second one after 2 s, SIGKILL after `grace` seconds; returns when the child is gone.

        Not cut short by cancellation, but bounded: `grace` plus a few seconds. `run` must be running.
        """
        with trio.CancelScope(shield=True):
            for patience in (min(grace, SECOND_TERM_SECONDS), grace - SECOND_TERM_SECONDS):
                if patience > 0 and not self._done.is_set():
                    self.terminate()
                    with trio.move_on_after(patience):
                        await self._done.wait()
            if not self._done.is_set():
                self.kill()
                with trio.move_on_after(_REAP_SECONDS + LOG_GRACE_SECONDS + _GROUP_SECONDS):
                    await self._done.wait()
        await trio.lowlevel.checkpoint_if_cancelled()

    def _code(self) -> int:
        # None here: not even SIGKILL ended it in time, and nobody will learn more about it.
        return -signal.SIGKILL if self._returncode is None else self._returncode

    def _signal(self, number: signal.Signals) -> None:
        if self._returncode is not None:
            return  # Reaped: the number may be somebody else's by now.
        self._poll_seconds = _FIRST_POLL_SECONDS
        # Gone already; macOS says "not permitted" for a group that is only zombies.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    async def _leader_exit(self) -> None:
        """Return once the leader has exited, leaving it unreaped."""
        if self._pidfd is not None:
            await trio.lowlevel.wait_readable(self._pidfd)
            return
        while not _has_exited(self.pid):
            await trio.sleep(self._poll_seconds)
            self._poll_seconds = min(self._poll_seconds * 1.5, _LAST_POLL_SECONDS)

    async def _bury(self) -> None:
        """End the whole group, reap the leader, let the reader finish. Runs shielded, so: bounded."""
        self.kill()
        with trio.move_on_after(_REAP_SECONDS):
            await self._leader_exit()
        self._returncode = self._popen.poll()
        if self._returncode is None:
            self.tail.append("[llamesh] the process did not end on SIGKILL (stuck in the kernel?)")
        with trio.move_on_after(LOG_GRACE_SECONDS):
            await self._reader_gone.wait()
        # What was killed with it may need a moment to give its memory and ports back. Signal 0 only asks.
        with trio.move_on_after(_GROUP_SECONDS):
            while self._returncode is not None and _group_lives(self.pid):
                await trio.sleep(_FIRST_POLL_SECONDS)

    async def _read(self) -> None:
        cutter = LineCutter()
        try:
            async with self._output:
                while chunk := await self._output.receive_some(_READ_BYTES):
                    for line in cutter.feed(chunk):
                        self._keep(line)
        except trio.BrokenResourceError:
            pass  # A pipe that can't be read has nothing more to say.
        finally:
            for line in cutter.finish():
                self._keep(line)
            self._reader_gone.set()

    def _keep(self, line: str) -> None:
        self.tail.append(line)
        if self._on_line is None:
            return
        try:
            self._on_line(line)
        # The border between a child's output and whoever listens: whatever is wrong with the listener, the
        # pipe must be drained on, or the child blocks in its next write.
        except Exception as problem:
            if not self._on_line_failed:
                self._on_line_failed = True
                self.tail.append(f"[llamesh] a log reader failed: {type(problem).__name__}: {problem}")


def _find_program(name: str, env: Mapping[str, str], cwd: Path | None) -> str:
    """The program to execute; an OSError that names it when it can't be (setpriv would only exit 127)."""
    if os.sep not in name:
        found = shutil.which(name, path=env.get("PATH", os.defpath))
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "No such program on PATH", name)
        # Absolute: an entry of PATH may be relative to our directory, which isn't the child's.
        return os.path.abspath(found)
    path = Path(cwd or ".") / name
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, "No such program", str(path))
    if not path.is_file() or not os.access(path, os.X_OK):
        raise PermissionError(errno.EACCES, "Not an executable file", str(path))
    return name


def _has_exited(pid: int) -> bool:
    """Whether our child `pid` has ended; asks the process table, since waitpid would reap it."""
    try:
        return has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return True  # Reaped by the kernel itself: SIGCHLD is ignored in this process.


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except OSError:
        return False
    # A zombie has given everything back already; how soon it is reaped depends on the system's init.
    return any(not has_ended(member) for member in group_members(group))


def group_members(group: int) -> list[psutil.Process]:
    """The processes in a process group, zombies included."""
    members = []
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(pid) == group:
                members.append(psutil.Process(pid))
    return members


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.AccessDenied:
        return False
    except psutil.NoSuchProcess:
        return True
