"""`llamesh pull`: fetch weights now, with a bar to look at."""

from __future__ import annotations

import os
import shutil
import signal
import sys

import click
import trio

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.completing import complete_models
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import fail, out
from llamesh.config.cookbook import Cookbook, HubFile
from llamesh.config.model_names import BadName, split_repo
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings
from llamesh.local.weights import WeightsError, find_cache
from llamesh.local.weights.budget import make_room
from llamesh.local.weights.fetch import Fetcher
from llamesh.local.weights.progress import Progress, in_words
from llamesh.local.weights.wanted import Wanted, wanted_of

_BAR_SECONDS = 0.25
_LINE_SECONDS = 5.0


@make(
    ("llamesh pull", "all that the cookbook names"),
    ("llamesh pull ggml-org/gemma-3-1b-it-GGUF:Q4_K_M", "this one"),
)
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=complete_models)
@files_options(cookbook=True)
def command(models: tuple[str, ...], files: Files) -> int:
    """Fetch the weights of MODELs now: OWNER/NAME[:QUANTISATION], or models of the cookbook, all without one.

    Ctrl-C stops it; the next time goes on from there.
    """
    try:
        settings, cookbook = files.read()
        wishes = [wish for model in models for wish in find(cookbook, model)]
    except (ConfigError, Failed) as error:
        return fail(error)
    if not models:
        found = (wanted_of(profile) for profile in cookbook.profiles)
        wishes = [wanted for wanted in found if wanted is not None]
    wishes = list(dict.fromkeys(wishes))
    if not wishes:
        out("nothing to fetch: no model of the cookbook comes from a hub or an address")
        return exit_codes.OK
    return trio.run(_fetch_until_told, settings, wishes)


def find(cookbook: Cookbook, name: str) -> list[Wanted]:
    """The weights that a name means: of a model of the cookbook, or on the hub. Raises Failed."""
    profile = cookbook.find(name)
    if profile is not None:
        wanted = wanted_of(profile)
        if wanted is None:
            raise Failed(f"{name} is a file of this machine: there is nothing to fetch")
        return [wanted]
    if "/" not in name:
        raise Failed(f"the cookbook has no model {name}; one of the hub is named OWNER/NAME:QUANTISATION")
    try:
        split_repo(name)
    except BadName as error:
        raise Failed(str(error)) from None
    return [Wanted(HubFile(name, None), projector=True)]


async def _fetch_until_told(settings: Settings, wishes: list[Wanted]) -> int:
    """Fetch until all is there, or a signal comes."""
    code = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:

            async def listen() -> None:
                nonlocal code
                async for number in signals:
                    code = 128 + number
                    nursery.cancel_scope.cancel()

            nursery.start_soon(listen)
            code = await _fetch_all(settings, wishes)
            nursery.cancel_scope.cancel()
    if code >= 128:
        fail("stopped; what has come stays, and the next time goes on from there")
    return code


async def _fetch_all(settings: Settings, wishes: list[Wanted]) -> int:
    cache = find_cache(os.environ)
    kept = frozenset(wanted.key for wanted in wishes)

    def clear(size: int) -> None:
        make_room(cache, size, settings.disk_budget_gb, lambda: kept)

    fetcher, code = Fetcher(cache, make_room=clear), 0
    for wanted in wishes:
        progress = Progress(wanted.name)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_show, progress)
                problem: WeightsError | None = None
                try:
                    record = await fetcher.obtain(wanted, progress, fresh=True)
                except WeightsError as error:
                    problem = error
                nursery.cancel_scope.cancel()
        finally:
            _clear_line()
        if problem is not None:
            code = fail(problem)
            continue
        size = sum(file.size for file in record.files)
        out(f"{wanted.name}: {in_words(size)}, {record.parts[0].path}")
    return code


async def _show(progress: Progress) -> None:
    """A bar that moves on a terminal, else a line now and then."""
    if not sys.stderr.isatty():
        while True:
            await trio.sleep(_LINE_SECONDS)
            sys.stderr.write(f"{progress}\n")
    while True:
        width = shutil.get_terminal_size().columns - 1
        fraction, words = progress.fraction, str(progress)
        room = width - len(words) - 3
        if fraction is not None and room >= 10:
            full = int(fraction * room)
            words = f"{words} [{'#' * full}{'.' * (room - full)}]"
        sys.stderr.write("\r\x1b[K" + words[:width])
        sys.stderr.flush()
        await trio.sleep(_BAR_SECONDS)


def _clear_line() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")
