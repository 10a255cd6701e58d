"""May this machine work for others? What `cluster.serve_peers` asks about its owner.

    always     it may
    idle       nobody has touched the machine for 5 minutes
    on_power   it isn't running on its battery
    never      it may not

Whether somebody is there, sources tell that know different things; whoever was there last counts:

- Terminals, Linux and macOS: the kernel moves the access time of a terminal's device when something is
  typed (to 8 seconds on Linux); `w` computes its IDLE column from it. Knows shells and SSH sessions.
- logind, Linux: `IdleHint` of all sessions together; desktops set it when their screen saver would
  start, and the 5 minutes begin then. A desktop that doesn't set it counts as in use, and so does one
  that plays a film. With no session at all, nobody is there.
- HIDIdleTime, macOS: nanoseconds since keyboard or mouse moved, from `ioreg`.

The access times of /dev/input are no source: the kernel doesn't move them when a key is pressed.

Where no source can say anything, the machine counts as in use, and the reason says so: whoever chose
`idle` asked for not being disturbed, and a server that has no users is meant to have `always`. Power
is the other way round: a machine without a battery, or one that doesn't say, is on mains.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import psutil
import trio

from llamesh.telemetry.logs import get_logger

log = get_logger("owner")

Mode: TypeAlias = Literal["always", "idle", "on_power", "never"]

# Seconds since somebody touched the machine, infinity when nobody is there; None: it can't say.
IdleSource: TypeAlias = Callable[[], float | None]

_IDLE_AFTER = 300.0

# A look starts a small program; an owner who comes back waits this long at the most.
_LOOK_EVERY = 10.0

# Programs that are asked answer in milliseconds.
_PATIENCE = 5.0

# An access time further ahead than this is from before the clock was set back, and says nothing.
_CLOCKS_DIFFER = 60.0


class Owner:
    """See the module. `sample` looks, `willing` answers from the last look, and never blocks."""

    def __init__(
        self,
        *,
        idle: Sequence[IdleSource] | None = None,
        on_battery: Callable[[], bool] | None = None,
        idle_after: float = _IDLE_AFTER,
    ) -> None:
        """The arguments replace what is right for this platform. `idle_after`: seconds."""
        self._sources = tuple(idle) if idle is not None else idle_sources()
        self._on_battery = on_battery or runs_on_battery
        self._idle_after = idle_after
        self._looked = False
        self._idle: float | None = None  # seconds, at the last look
        self._battery = False

    def willing(self, mode: Mode) -> str:
        """ "" when this machine serves peers now, else why not, for people."""
        if mode == "always":
            return ""
        if mode == "never":
            return "it does nothing for others (cluster.serve_peers is never)"
        if not self._looked:
            return f"it doesn't know yet whether its owner needs it (cluster.serve_peers is {mode})"
        if mode == "on_power":
            return "it runs on its battery (cluster.serve_peers is on_power)" if self._battery else ""
        if self._idle is None:
            return (
                "it can't tell whether somebody uses it (cluster.serve_peers is idle; where nobody does, "
                "set it to always)"
            )
        if self._idle < self._idle_after:
            return f"it was in use {self._idle:.0f} s ago (cluster.serve_peers is idle)"
        return ""

    def sample(self) -> None:
        """Look at the machine. Blocking, so call it in a thread; never raises."""
        known = [seconds for seconds in map(_ask, self._sources) if seconds is not None]
        idle = min(known) if known else None
        battery = bool(_ask(self._on_battery))
        self._idle, self._battery, self._looked = idle, battery, True

    async def run(self, mode: Callable[[], Mode]) -> None:
        """Look every ten seconds for ever, while `mode()` asks for it."""
        was_willing = True
        while True:
            now = mode()
            if now in ("idle", "on_power"):
                await trio.to_thread.run_sync(self.sample, abandon_on_cancel=True)
                reason = self.willing(now)
                if was_willing and reason:
                    log.info("serves no peers for the time being", reason=reason)
                elif not was_willing and not reason:
                    log.info("serves peers again")
                was_willing = not reason
            await trio.sleep(_LOOK_EVERY)


def _ask(source: Callable[[], float | bool | None]) -> float | bool | None:
    try:
        return source()
    # The border to the system: one source that fails must not hide the others.
    except Exception as error:
        name = getattr(source, "__name__", type(source).__name__)
        log.debug("can't be asked", source=name, error=f"{type(error).__name__}: {error}")
        return None


def idle_sources() -> tuple[IdleSource, ...]:
    """Those of this platform."""
    if sys.platform == "darwin":
        return (macos_idle, terminals_idle)
    return (logind_idle, terminals_idle)


def runs_on_battery() -> bool:
    """Whether it is known that the machine draws on its battery. Raises what psutil raises."""
    battery = psutil.sensors_battery()
    return battery is not None and battery.power_plugged is False


def terminals_idle(
    devices: Iterable[Path] | None = None, clock: Callable[[], float] = time.time
) -> float | None:
    """Seconds since something was typed into any terminal; None where there is no terminal.

    Not "nobody" then: somebody at a desktop may have none open. `devices`: those to look at.
    """
    now, latest = clock(), -math.inf
    for device in _terminals() if devices is None else devices:
        try:
            touched = device.stat().st_atime
        except OSError:
            continue  # closed a moment ago
        if touched <= now + _CLOCKS_DIFFER:
            latest = max(latest, touched)
    return max(0.0, now - latest) if latest > -math.inf else None


def _terminals() -> set[Path]:
    # Not every terminal window is in the list of users, and not every user has a pseudo terminal.
    found = {Path("/dev", user.terminal) for user in psutil.users() if user.terminal}
    found.update(path for path in Path("/dev/pts").glob("[0-9]*"))
    return found


def logind_idle(
    run: Callable[[list[str]], str | None] | None = None, clock: Callable[[], float] = time.time
) -> float | None:
    """Seconds since logind's sessions became idle, 0 while one isn't, infinity with none; None without it."""
    text = (run or _output)(["loginctl", "show-session", "--property=IdleHint", "--property=IdleSinceHint"])
    if text is None:
        return None
    values = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if values.get("IdleHint") == "no":
        return 0.0
    if values.get("IdleHint") != "yes":
        return None
    since = values.get("IdleSinceHint", "")
    if since.isdecimal() and int(since) > 0:
        return max(0.0, clock() - int(since) / 1e6)
    return math.inf


def macos_idle(run: Callable[[list[str]], str | None] | None = None) -> float | None:
    """Seconds since keyboard or mouse of a Mac moved; None where `ioreg` doesn't say."""
    text = (run or _output)(["ioreg", "-r", "-d", "1", "-k", "HIDIdleTime", "-c", "IOHIDSystem"])
    found = re.search(r'"HIDIdleTime"\s*=\s*(\d+)', text or "")
    return int(found[1]) / 1e9 if found else None


def _output(command: list[str]) -> str | None:
    """What a program prints; None where there is no such program, or it fails."""
    path = shutil.which(command[0])
    if path is None:
        return None
    try:
        done = subprocess.run(
            [path, *command[1:]],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace") if done.returncode == 0 else None
