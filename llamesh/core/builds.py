"""Decisions about builds of llama.cpp: what a build is called, which ones go, how far one is.

A build is named after the commit and after everything else that decides what comes out: the arguments
of cmake, those of the build command that choose targets, and the processor (`-march=native` is
llama.cpp's default).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

# What `cmake --build` is always asked for; the rest of llama.cpp takes twice the time.
TARGET = "llama-server"

_COMMIT_LETTERS = 12
_RECIPE_LETTERS = 8

# A compiler at work on one of llama.cpp's larger files takes this much memory, in MiB.
_JOB_MIB = 1536

# After a failure at the start of a node: the first pause, doubled each time, in seconds.
_FIRST_PAUSE = 10.0
_LAST_PAUSE = 1800.0

# "[12/345] Building ..." is Ninja's, "[ 12%] Building ..." that of generated makefiles.
_NINJA = re.compile(r"\[\s*(\d{1,6})/(\d{1,6})\]")
_MAKE = re.compile(r"\[\s*(\d{1,3})%\]")

# "-j", "-j8", "--parallel 8" and so on: they change how long a build takes, not what comes out.
_JOBS = re.compile(r"-j\d*|--parallel(=\d+)?")


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to build: `arguments` for cmake, `command` for `cmake --build`, and what it is built for."""

    arguments: tuple[str, ...]
    command: tuple[str, ...]
    processor: str

    @property
    def name(self) -> str:
        """Eight letters that stand for it; equal recipes have equal names."""
        words = [*self.arguments, "\0", *without_jobs(self.command), "\0", self.processor]
        return hashlib.sha256("\n".join(words).encode()).hexdigest()[:_RECIPE_LETTERS]


@dataclass(frozen=True, slots=True)
class Kept:
    """A finished build as far as tidying up is concerned. `built_at`: seconds since the epoch."""

    key: str
    built_at: float


def build_key(commit: str, recipe: Recipe) -> str:
    """The name of a build's folder."""
    return f"{commit[:_COMMIT_LETTERS]}-{recipe.name}"


def without_jobs(command: Sequence[str]) -> list[str]:
    """`command` without what only says how many compilers may run at once."""
    kept: list[str] = []
    takes_number = False
    for word in command:
        if _JOBS.fullmatch(word):
            takes_number = word in ("-j", "--parallel")
            continue
        if not (takes_number and word.isdecimal()):
            kept.append(word)
        takes_number = False
    return kept


def with_jobs(command: Sequence[str], count: int) -> list[str]:
    """`command` with a number after a `-j` that has none: `make -j` alone starts hundreds of compilers."""
    words: list[str] = []
    for index, word in enumerate(command):
        words.append(word)
        following = command[index + 1] if index + 1 < len(command) else ""
        if word in ("-j", "--parallel") and not following.isdecimal():
            words.append(str(count))
    return words


def jobs(cores: int, free_mib: int | None) -> int:
    """How many compilers may run at once on so many cores with so much free memory."""
    by_memory = cores if free_mib is None else free_mib // _JOB_MIB
    return max(1, min(cores, by_memory))


def progress_of(line: str) -> float | None:
    """What part of the work is done (0 to 1) when the build tool prints `line`; None: it doesn't say."""
    if found := _NINJA.match(line):
        done, of = int(found[1]), int(found[2])
        return min(1.0, done / of) if of else None
    if found := _MAKE.match(line):
        return min(1.0, int(found[1]) / 100)
    return None


def to_delete(builds: Iterable[Kept], used: Collection[str], keep: int) -> tuple[str, ...]:
    """The keys of the builds that may go: all but the `keep` newest and those that are `used`.

    A used one doesn't count as kept.
    """
    others = sorted((b for b in builds if b.key not in used), key=lambda b: b.built_at, reverse=True)
    return tuple(build.key for build in others[max(0, keep) :])


def boot_pause(failures: int) -> float:
    """Seconds until the next try after so many failures (1 or more) at the start of a node."""
    return min(_LAST_PAUSE, _FIRST_PAUSE * 2.0 ** min(failures - 1, 30))
