"""What a starting child lets us know: what it can do, and whether its load still moves."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import trio

# n_ctx and n_slots as llama-server logs them; wrapper scripts may print them anywhere.
_FACTS = re.compile(r"\b(n_ctx|n_slots|n_ctx_train|n_ctx_slot)\s*=\s*(\d{1,9})\b")

# How often the process is looked at, in seconds.
_LOOK_SECONDS = 1.0


@dataclass(slots=True)
class Facts:
    """What the child said about itself, in tokens and requests at once; 0 where it said nothing (yet)."""

    n_ctx: int = 0
    n_ctx_slot: int = 0
    n_ctx_train: int = 0
    n_slots: int = 0

    def read_line(self, line: str) -> None:
        """Take what a line of the log says."""
        for name, number in _FACTS.findall(line):
            self._take(name, int(number))

    def read_props(self, reply: Any) -> None:
        """Take what `GET /props` says."""
        self._take("n_slots", _dig(reply, "total_slots"))
        self._take("n_ctx_slot", _dig(reply, "default_generation_settings", "n_ctx"))

    def read_models(self, reply: Any) -> None:
        """Take what `GET /v1/models` says."""
        self._take("n_ctx_train", _dig(reply, "data", 0, "meta", "n_ctx_train"))

    def complete(self) -> None:
        """Fill one context from the other, where only one is known."""
        self.n_ctx = self.n_ctx or self.n_ctx_slot
        self.n_ctx_slot = self.n_ctx_slot or self.n_ctx

    def _take(self, name: str, value: object) -> None:
        # A bool is an int to Python, and to nobody else.
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
            setattr(self, name, value)


class Progress:
    """Whether a start moves: it says something new, reads on, or fills more memory than before."""

    def __init__(self, pid: int) -> None:
        self._most = -1
        self._next_look = 0.0
        self._moved = False
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(pid)

    def read_line(self, line: str) -> None:
        """Count a line of the log as a step, unless it only echoes our asking."""
        if "/health" not in line:
            self._moved = True

    def moved(self, now: float) -> bool:
        """Whether it moved since the last call. Looks at the process once a second."""
        moved, self._moved = self._moved, False
        if now >= self._next_look:
            self._next_look = now + _LOOK_SECONDS
            most = self._mebibytes()
            if most > self._most:
                self._most, moved = most, True
        return moved

    def _mebibytes(self) -> int:
        """MiB in memory plus MiB read so far: a mapped file shows in the first, a read one in the second."""
        try:
            if self._process is None:
                return -1
            amount: int = self._process.memory_info().rss
            # Not everywhere (macOS), and without types where it is missing.
            counters = getattr(self._process, "io_counters", None)
            if counters is not None:
                amount += counters().read_chars
            return amount >> 20
        except (psutil.Error, AttributeError):
            return -1


async def file_exists(path: str, seconds: float) -> bool:
    """Whether there is a file; one on a disk that doesn't answer for so long is left to the child."""
    with trio.move_on_after(seconds):
        return await trio.to_thread.run_sync(Path(path).exists, abandon_on_cancel=True)
    return True


def _dig(value: Any, *path: str | int) -> Any:
    """value[path[0]][path[1]]..., None where a step isn't there."""
    for name in path:
        try:
            value = value[name]
        except (KeyError, IndexError, TypeError):
            return None
    return value
