"""What a program says of itself: asked with `--version` and the like, for a bounded time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import trio

from llamesh.local.process import Child, Platform

_ANSWER_LINES = 4000

# An answer to --help without these isn't llama-server's own, and says nothing about which flags pass.
_PROOF_OF_HELP = frozenset({"--ctx-size", "--port", "--host"})

_VERSION_LINE = re.compile(r"version:\s*(\S.{0,79})")
# "-c,    --ctx-size N        size of ...": names joined by commas, up to the first thing that isn't one.
_FLAG_LINE = re.compile(r"\s{0,8}(-{1,2}[A-Za-z][\w.-]*(?:,\s*-{1,2}[A-Za-z][\w.-]*)*)")
# "  CUDA0: NVIDIA GeForce RTX 4090 (24563 MiB, 24111 MiB free)", below "Available devices:".
_DEVICE_LINE = re.compile(r"\s{1,8}([A-Za-z]+\d*):\s")


async def ask(
    command: Sequence[str], environment: Mapping[str, str], seconds: float, platform: Platform | None = None
) -> tuple[list[str], bool]:
    """What a program says, and whether it ended with success in time; its whole group is gone afterwards.

    `environment` is all that it gets. Raises OSError when it can't be started.
    """
    lines: list[str] = []

    def keep(line: str) -> None:
        if len(lines) < _ANSWER_LINES:
            lines.append(line)

    child = Child.spawn(command, env=environment, on_line=keep, platform=platform)
    code: int | None = None
    with trio.move_on_after(seconds):
        code = await child.run()
    return lines, code == 0


def version_in(lines: Iterable[str]) -> str:
    """What follows `version:`, "unknown" where nothing does."""
    for line in lines:
        if found := _VERSION_LINE.match(line):
            return found[1].strip()
    return "unknown"


def flags_in(lines: Iterable[str]) -> frozenset[str]:
    """The flags that an answer to `--help` lists; none when it isn't llama-server's."""
    flags: set[str] = set()
    for line in lines:
        if found := _FLAG_LINE.match(line):
            flags.update(re.split(r",\s*", found[1]))
    return frozenset(flags) if flags >= _PROOF_OF_HELP else frozenset()


def devices_in(lines: Iterable[str]) -> tuple[str, ...]:
    """The names of devices (`CUDA0`) in an answer to `--list-devices`."""
    return tuple(found[1] for line in lines if (found := _DEVICE_LINE.match(line)))
