"""One build from start to end: fetch, configure, compile, test, install. For the command line and for a node.

Nothing that is in use changes before the very last step, and a failure anywhere before leaves it as it was.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio

from llamesh.config.sections import LlamaCpp
from llamesh.core.backends import arguments_for, choose_backend, names_backend
from llamesh.core.builds import Recipe, build_key
from llamesh.local.builds import machine
from llamesh.local.builds.compile import compile_source
from llamesh.local.builds.failure import FETCH, BuildFailed, TriedBefore
from llamesh.local.builds.record import Build
from llamesh.local.builds.smoke import smoke_test
from llamesh.local.builds.source import Source, source_of
from llamesh.local.builds.store import Store
from llamesh.local.builds.tiny_model import tiny_model
from llamesh.local.builds.tools import hide_credentials
from llamesh.local.builds.trial_server import STAGE as TEST
from llamesh.local.launch import ask_version

CHECK = "looking for a newer version"
WAIT = "waiting for another build"

_TAIL_LINES = 50


class Progress:
    """How far a build is. `changed` is called when there is news, often; it must be quick.

    `stage`: "" between builds; `percent`: of the stage, None where unknown; `commit`, `key`: of the build,
    "" while unknown; `tail`: the last lines.
    """

    def __init__(self) -> None:
        self.stage = ""
        self.percent: float | None = None
        self.commit = self.key = ""
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self.changed: Callable[[], None] = lambda: None

    def enter(self, stage: str) -> None:
        """Another stage begins."""
        self.stage, self.percent = stage, None
        self.changed()

    def advance(self, part: float) -> None:
        """`part` of the stage is done, 0 to 1."""
        self.percent = round(100 * part, 1)
        self.changed()

    def line(self, line: str) -> None:
        """A line of a tool."""
        self.tail.append(line)
        self.changed()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to build and where to put it."""

    source: Source
    recipe: Recipe
    shown: str  # where from, for people

    @staticmethod
    def of(settings: LlamaCpp, environ: Mapping[str, str], say: Callable[[str], None]) -> Plan:
        """From the configuration; without a backend among its arguments, the best that can be built here.

        Raises BuildFailed for names that are refused.
        """
        arguments = settings.build_args
        if not names_backend(arguments):
            choice = choose_backend(machine.look(environ))
            for note in choice.notes:
                say(note)
            arguments = (*arguments_for(choice.backend), *arguments)
        repo_path = settings.repo_path.absolute()
        work = settings.build_path.absolute() / "work"
        return Plan(
            source_of(settings.repo_url, settings.branch, repo_path, work, environ),
            Recipe(tuple(arguments), tuple(settings.build_command_args), machine.processor()),
            f"{hide_credentials(settings.repo_url)} {settings.branch}",
        )


@dataclass(frozen=True, slots=True)
class Made:
    """The build that is live now, and whether another one was before.

    `before`: the program that `binary_path` was or led to before, where it changed; None for none.
    """

    build: Build
    changed: bool
    before: Path | None = None


async def make(
    settings: LlamaCpp,
    store: Store,
    environ: Mapping[str, str],
    progress: Progress,
    *,
    force: bool = False,
    may_use: Callable[[Build | None, str], bool] = lambda build, key: True,
) -> Made:
    """Have the newest commit built and live. Raises BuildFailed; what is live is then as before.

    A commit that is built already is only made live; one that is live costs a question to the repository.
    `may_use(build or None, key)` is asked before work is put into a build. `force`: build it in any case.
    """
    progress.commit = progress.key = ""
    progress.enter(CHECK)
    try:
        plan = await trio.to_thread.run_sync(Plan.of, settings, environ, progress.line)
        commit = await plan.source.newest()
        progress.commit = commit
        key = progress.key = build_key(commit, plan.recipe)
        live = await trio.to_thread.run_sync(store.live)
        if live is not None and live.key == key and not force:
            return Made(live, changed=False)
        if not may_use(await trio.to_thread.run_sync(store.find, key), key):
            raise TriedBefore(CHECK, f"commit {commit[:12]} was tried before and can't be used")
        async with store.lock(lambda: progress.enter(WAIT)):
            live = await trio.to_thread.run_sync(store.live)
            if live is not None and live.key == key and not force:
                return Made(live, changed=False)  # somebody else was first
            made = await trio.to_thread.run_sync(store.find, key)
            if made is None or force:
                made = await _build(plan, commit, key, store, environ, progress)
            before = await trio.to_thread.run_sync(store.make_live, key)
            return Made(made, changed=True, before=before)
    finally:
        progress.enter("")


async def _build(
    plan: Plan, commit: str, key: str, store: Store, environ: Mapping[str, str], progress: Progress
) -> Build:
    started = time.monotonic()
    progress.enter(FETCH)
    folder = await plan.source.check_out(commit, progress.line)
    products = await compile_source(
        folder,
        store.work(plan.recipe.name),
        plan.recipe,
        environ,
        on_stage=progress.enter,
        on_progress=progress.advance,
        on_line=progress.line,
    )
    progress.enter(TEST)
    program = await trio.to_thread.run_sync(store.stage, key, products)
    try:
        always, version = await try_out(program, store.root, environ, progress.line)
        build = Build(
            key=key,
            commit=commit,
            recipe=plan.recipe.name,
            version=version,
            source=plan.shown,
            arguments=plan.recipe.arguments,
            always=always,
            built_at=time.time(),
            seconds=round(time.monotonic() - started, 1),
        )
        return await trio.to_thread.run_sync(store.add, build)
    except BaseException:
        store.discard(key)
        raise


async def try_out(
    program: Path, folder: Path, environ: Mapping[str, str], say: Callable[[str], None]
) -> tuple[tuple[str, ...], str]:
    """Test a program: the arguments that it must always be run with, and its version. Raises BuildFailed."""
    model = folder / f".tiny-{time.time_ns()}.gguf"
    try:
        await trio.to_thread.run_sync(model.write_bytes, tiny_model())
    except OSError as error:
        raise BuildFailed(TEST, f"{model} can't be written: {error}") from error
    try:
        always = await smoke_test(program, model, environ, say)
    finally:
        with contextlib.suppress(OSError):
            model.unlink()
    return always, await ask_version(program, environ)
