"""Running git, cmake and compilers: niced, in a group of their own, quoted when they fail."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import trio

from llamesh.local.builds.failure import BuildFailed
from llamesh.local.launch import child_environment
from llamesh.local.process import Child

# Told to end, a tool gets this long. Ninja ends its compilers, each in a group of its own, on SIGTERM only.
_STOP_SECONDS = 5.0

# Of the output of a tool that failed, so many lines are repeated.
LAST_LINES = 20

_NICENESS = "10"

# What a shell makes of SIGKILL.
_KILLED = 137

# Where we are killed, nobody tells Ninja to end its compilers: a watcher in the tool's group looks for us
# ($0) each second. It ends with the group. Its parent is gone at once: cmake, told to end, waits for all its
# children, and would wait for this one. The shell stays, and outlasts a SIGTERM to the group: the leader is
# killed at once when we are, and with the leader ends the group, before Ninja could do its part.
_WATCHED = (
    '( ( trap "" TERM; while kill -0 "$0" 2>/dev/null; do sleep 1; done; '
    "kill -TERM 0; sleep 3; kill -KILL 0 ) >/dev/null 2>&1 & ); "
    'trap : TERM; "$@"; exit $?'
)

# user:password@ in a url.
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")

# What brings each tool that everybody needs.
PACKAGES = {
    "git": "apt install git (Debian, Ubuntu), xcode-select --install (macOS)",
    "cmake": "apt install cmake (Debian, Ubuntu), brew install cmake (macOS), or pip install cmake",
    "c++": "apt install build-essential (Debian, Ubuntu), xcode-select --install (macOS)",
    "make": "apt install ninja-build (Debian, Ubuntu), brew install ninja (macOS), or pip install ninja",
}


def hide_credentials(text: str) -> str:
    """`text` with user names and passwords in urls replaced."""
    return _CREDENTIALS.sub("***@", text)


def need(tool: str, environ: Mapping[str, str], stage: str) -> str:
    """The path of a tool. Raises BuildFailed with the package that brings it."""
    found = shutil.which(tool, path=environ.get("PATH", os.defpath))
    if found is None:
        raise BuildFailed(stage, f"{tool} is missing on this machine: {PACKAGES[tool]}")
    return found


async def run_tool(
    command: Sequence[str],
    *,
    stage: str,
    environ: Mapping[str, str],
    more: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    silence: float = 600.0,
    limit: float = math.inf,
    explain: Callable[[Sequence[str]], str] = lambda lines: "",
) -> list[str]:
    """Run a tool to its end; the last 200 lines of its output, both streams together.

    `environ` is ours: what is secret in it isn't passed on, `more` is. `silence`, `limit`: seconds without
    a line, and altogether, after which it is ended. `explain` may say from the output what is wrong.
    Raises BuildFailed. Cancelling ends the tool and all that it started, within seconds.
    """
    shown = hide_credentials(" ".join(command))
    last_sign = trio.current_time()

    def note(line: str) -> None:
        nonlocal last_sign
        last_sign = trio.current_time()
        if on_line is not None:
            on_line(hide_credentials(line))

    environment = {**child_environment(environ, api_key=""), **(more or {})}
    path = environment.get("PATH", os.defpath)
    nice = shutil.which("nice", path=path)
    prefix = [nice, "-n", _NICENESS] if nice else []
    argv = [*prefix, "/bin/sh", "-c", _WATCHED, str(os.getpid()), *command]
    try:
        child = Child.spawn(argv, env=environment, cwd=cwd, on_line=note)
    except OSError as error:
        raise BuildFailed(stage, f"{command[0]} can't be started: {error}", command=shown) from error
    started = trio.current_time()
    overdue = ""

    async def watch() -> None:
        nonlocal overdue
        while True:
            await trio.sleep(1.0)
            now = trio.current_time()
            if now - last_sign > silence:
                overdue = f"silent for {silence:g} s"
            elif now - started > limit:
                overdue = f"not done after {limit:g} s"
            if overdue:
                await child.stop(_STOP_SECONDS)
                return

    code = -1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        nursery.start_soon(_shielded_run, child)
        try:
            code = await child.wait()
        except trio.Cancelled:
            await child.stop(_STOP_SECONDS)
            raise
        nursery.cancel_scope.cancel()
    lines = [hide_credentials(line) for line in child.tail.lines()]
    if overdue:
        raise BuildFailed(
            stage, f"{command[0]} was ended: {overdue}", command=shown, last_lines=lines[-LAST_LINES:]
        )
    if code:
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if code == _KILLED:
            ended += " (killed: often for want of memory)"
        reason = explain(lines) or f"{Path(command[0]).name} {ended}"
        raise BuildFailed(stage, reason, command=shown, exit_code=code, last_lines=lines[-LAST_LINES:])
    return lines


async def _shielded_run(child: Child) -> None:
    """Its life, which ends by `stop` alone: being cancelled it would be killed with SIGKILL."""
    with trio.CancelScope(shield=True):
        await child.run()
