"""`llamesh build`, the same as `scripts/build_llama`: a build with its progress in the terminal.

The path of the engine goes to stdout, everything else to stderr. Exit codes: 0 when it is live, 1 when
not, with the reason; 2 for a bad option.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO

import trio

from llamesh.config.sections import LlamaCpp
from llamesh.core.backends import BACKENDS, arguments_for, missing_for, names_backend
from llamesh.local.builds import machine
from llamesh.local.builds.compile import CONFIGURE
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.maker import Made, Progress, make
from llamesh.local.builds.prebuilt import install
from llamesh.local.builds.store import Store

# A line each so many percent where nobody watches it move.
_STEP_PERCENT = 5

_REDRAW_SECONDS = 0.1

_KEPT = "the engine in use is as it was"


class Screen:
    """Progress on a terminal: one line that moves; elsewhere: a line now and then."""

    def __init__(self, progress: Progress, out: IO[str]) -> None:
        self._progress = progress
        self._out = out
        self._moves = out.isatty()
        self._stage = ""
        self._step = -1
        self._drawn_at = 0.0
        progress.changed = self.draw

    def draw(self) -> None:
        """Show what is new."""
        progress = self._progress
        if progress.stage != self._stage:
            self.finish()
            self._stage, self._step = progress.stage, -1
            if progress.stage and not self._moves:
                self._out.write(f"{progress.stage}\n")
        if not progress.stage:
            return
        if self._moves:
            if time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
                self._drawn_at = time.monotonic()
                self._out.write(f"\r\x1b[K{self._line()}"[: _columns() + 4])
        elif progress.percent is not None and int(progress.percent) // _STEP_PERCENT > self._step:
            self._step = int(progress.percent) // _STEP_PERCENT
            self._out.write(f"  {progress.percent:.0f} %\n")
        self._out.flush()

    def finish(self) -> None:
        """Leave what is there, for good."""
        if self._moves and self._stage:
            percent = " 100 %" if self._progress.percent is not None else ""
            self._out.write(f"\r\x1b[K{self._stage}{percent}\n")
        self._out.flush()

    def _line(self) -> str:
        progress = self._progress
        percent = f" {progress.percent:.0f} %" if progress.percent is not None else ""
        tail = progress.tail[-1] if progress.tail else ""
        return f"{progress.stage}{percent}  {tail}"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says; None is what the configuration says."""

    backend: str | None = None
    repo_url: str | None = None
    branch: str | None = None
    prebuilt: bool = False
    force: bool = False


def build(settings: LlamaCpp, wanted: Wanted, environ: Mapping[str, str]) -> int:
    """Build, test and make live. The exit code."""
    progress = Progress()
    screen = Screen(progress, sys.stderr)
    started = time.monotonic()
    try:
        settings = as_wanted(settings, wanted, environ)
        store = Store(settings.build_path, settings.binary_path)
        if wanted.prebuilt:
            work = partial(install, store, environ, progress, backend=wanted.backend or "auto")
        else:
            work = partial(make, settings, store, environ, progress, force=wanted.force)
        made = trio.run(_until_signal, work)
        if made is not None:
            store.prune(settings.keep_builds)
    except BuildFailed as error:
        screen.finish()
        sys.stderr.write(f"llamesh: {error.report()}\n{_KEPT}\n")
        return 1
    if made is None:
        screen.finish()
        sys.stderr.write(f"llamesh: interrupted; {_KEPT}\n")
        return 1
    _tell(made, store, time.monotonic() - started, settings)
    return 0


def as_wanted(settings: LlamaCpp, wanted: Wanted, environ: Mapping[str, str]) -> LlamaCpp:
    """The configuration with what the command line says instead. Raises BuildFailed for a missing tool."""
    changes: dict[str, object] = {}
    if wanted.repo_url is not None:
        changes["repo_url"] = wanted.repo_url
    if wanted.branch is not None:
        changes["branch"] = wanted.branch
    if wanted.backend is not None and not wanted.prebuilt:
        others = tuple(word for word in settings.build_args if not names_backend([word]))
        if wanted.backend in BACKENDS:
            missing = missing_for(wanted.backend, machine.look(environ))
            if missing:
                raise BuildFailed(CONFIGURE, f"{wanted.backend} can't be built here: {'; '.join(missing)}")
            others = (*arguments_for(wanted.backend), *others)
        changes["build_args"] = others
    return settings.model_copy(update=changes)


def _tell(made: Made, store: Store, seconds: float, settings: LlamaCpp) -> None:
    """What came of it."""
    one = made.build
    if made.changed:
        sys.stderr.write(f"{one.version}: live after {seconds:.0f} s, {settings.binary_path}\n")
    else:
        sys.stderr.write(f"{one.version}: it is the newest, nothing to do\n")
    if one.always:
        sys.stderr.write(
            "WARNING: this build mixes up conversations in its prompt cache in host memory. "
            f"llamesh runs it with {' '.join(one.always)}.\n"
        )
    sys.stdout.write(f"{store.program(one.key)}\n")


async def _until_signal(work: Callable[[], Awaitable[Made]]) -> Made | None:
    """What `work` returns; None when it was interrupted. Raises BuildFailed."""
    made: Made | None = None
    failure: BuildFailed | None = None
    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

        nursery.start_soon(watch)
        try:
            made = await work()
        except BuildFailed as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return made


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        return 80
