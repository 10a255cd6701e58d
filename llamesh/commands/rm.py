"""`llamesh rm`: take downloaded weights off this disk."""

from __future__ import annotations

import os
import sys

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.completing import complete_models
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import fail, out
from llamesh.commands.shared.shelf import Item, inventory
from llamesh.config.cookbook import Cookbook
from llamesh.config.problems import ConfigError
from llamesh.local.weights import WeightsError, find_cache
from llamesh.local.weights.progress import in_words
from llamesh.local.weights.wanted import wanted_of


@make(("llamesh rm gemma-3-1b-it", "after a question"), ("llamesh rm -y gemma-3-1b-it", "without one"))
@click.argument("models", nargs=-1, required=True, metavar="MODEL...", shell_complete=complete_models)
@click.option("-y", "--yes", is_flag=True, help="don't ask")
@files_options(cookbook=True)
def command(models: tuple[str, ...], yes: bool, files: Files) -> int:
    """Remove downloaded weights: MODEL as `llamesh models` names it, or of the cookbook.

    Files of your own it leaves alone.
    """
    cache = find_cache(os.environ)
    try:
        settings, cookbook = files.read()
        items = inventory(settings, cookbook, cache)
        chosen = list({id(item): item for name in models for item in _named(items, cookbook, name)}.values())
        if not yes and not _agreed(chosen):
            out("nothing was removed")
            return exit_codes.FAILED
        for item in chosen:
            assert item.record is not None  # noqa: S101
            freed = cache.remove(item.record)
            out(f"removed {item.name}: {in_words(freed)} are free")
    except (ConfigError, WeightsError, Failed, OSError) as error:
        return fail(error)
    return exit_codes.OK


def _named(items: list[Item], cookbook: Cookbook, name: str) -> list[Item]:
    profile = cookbook.find(name)
    wanted = wanted_of(profile) if profile is not None else None
    found = [
        item
        for item in items
        if item.name == name
        or (wanted is not None and item.record is not None and item.record.key == wanted.key)
    ]
    if not found:
        if profile is not None and wanted is None:
            raise Failed(f"{name} is a file of yours: remove it yourself, where it lies")
        raise Failed(f"there are no weights called {name} on this disk; see `llamesh models`")
    kept = [item for item in found if item.record is None]
    if kept:
        raise Failed(f"{kept[0].path} is a file of yours: remove it yourself")
    return found


def _agreed(items: list[Item]) -> bool:
    for item in items:
        used = f", used by {', '.join(item.profiles)} and then fetched again" if item.profiles else ""
        out(f"{item.name}: {in_words(item.size)} in {item.path}{used}")
    if not sys.stdin.isatty():
        raise Failed("there is nobody to ask: --yes removes them without a question")
    sys.stdout.write("remove this? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")
