"""A command on a terminal of its own, for tests that type and look.

async with on_terminal(["llamesh", "top"], directory, environment) as terminal:
    await terminal.wait_for("Requests")
    terminal.type("q")
    assert await terminal.wait_end() == 0
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import trio

from tests.support.node import PATIENCE_SECONDS

_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>()][A-Z0-9]?)")


class Terminal:
    """`raw` is all that came; `text` the same without colours and movements."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.raw = ""
        self._process = process
        self._master = master
        self._from = 0

    @property
    def text(self) -> str:
        """What was written, one after the other."""
        return _ESCAPES.sub("", self.raw).replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        """Press keys: `\\x03` is Ctrl-C, `\\x04` Ctrl-D, `\\r` Enter."""
        os.write(self._master, keys.encode())

    def echoes(self) -> bool:
        """Whether the terminal shows what is typed, line by line, as it did before."""
        flags = termios.tcgetattr(self._master)[3]
        return bool(flags & termios.ECHO and flags & termios.ICANON)

    async def wait_for(self, words: str) -> str:
        """Wait until `words` come, after those that were waited for before; what came until then."""
        with trio.move_on_after(PATIENCE_SECONDS):
            while (at := self.text.find(words, self._from)) < 0:
                if not await self._read():
                    break
            if at >= 0:
                before, self._from = self.text[self._from : at], at + len(words)
                return before
        raise AssertionError(
            f"{words!r} doesn't come; after {self.text[: self._from]!r}: {self.text[self._from :]!r}"
        )

    async def wait_end(self) -> int:
        """Wait for the end of the command; its exit code."""
        with trio.fail_after(PATIENCE_SECONDS):
            while await self._read():
                pass
            return await trio.to_thread.run_sync(self._process.wait, PATIENCE_SECONDS)

    async def _read(self) -> bool:
        await trio.lowlevel.wait_readable(self._master)
        try:
            data = os.read(self._master, 65_536)
        except OSError:  # Linux says EIO when the other side is closed
            return False
        self.raw += data.decode("utf-8", "replace")
        return bool(data)


def _own_terminal() -> None:
    """Ctrl-C goes to whom the terminal belongs to, and counts, though who runs the tests may ignore it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.asynccontextmanager
async def on_terminal(
    command: Sequence[str],
    directory: Path,
    environment: Mapping[str, str],
    *,
    columns: int = 100,
    lines: int = 40,
) -> AsyncIterator[Terminal]:
    """Start a command whose stdin, stdout and stderr are a terminal of this size. It ends with the block."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={"TERM": "xterm-256color", **environment},
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)
