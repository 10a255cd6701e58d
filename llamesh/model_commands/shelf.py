"""`llamesh models` and `llamesh rm`: which weights are on this disk, and taking some of them away."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamesh.command import read_state
from llamesh.config.cookbook import Cookbook, ModelPath
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings
from llamesh.core.model_files import is_projector, later_part, part_names
from llamesh.local.weights import Cache, WeightsError, find_cache
from llamesh.local.weights.cache import Record
from llamesh.local.weights.hashes import Hashes
from llamesh.local.weights.progress import in_words
from llamesh.local.weights.wanted import wanted_of
from llamesh.model_commands.common import Failed, fail, read_files, say

_MOST_FILES = 2000

# States of a model on a node in which its weights are there, see docs/api.md.
_WITH_WEIGHTS = ("loaded", "loading", "fits", "needs_eviction")


@dataclass(slots=True)
class Item:
    """A model on this disk. `size`: bytes of all its files; `sha256`: of its first file, "" while unknown;
    `origin`: "download", "hub cache" (somebody else fetched it), "models_dir", "path", or "mesh": only other
    nodes have it, and `path` is ""; `nodes`: those that have it; `record`: our note.
    """

    name: str
    path: str
    size: int
    sha256: str
    origin: str
    nodes: list[str]
    profiles: list[str] = field(default_factory=list)
    record: Record | None = None


def models(options: argparse.Namespace) -> int:
    """`llamesh models`: a table, or JSON; the exit code."""
    try:
        settings, cookbook = read_files(options)
        items = inventory(settings, cookbook, find_cache(os.environ), work_out=options.hash)
        _add_other_nodes(items, settings.node_id, read_state(settings, os.environ))
    except (ConfigError, WeightsError, OSError) as error:
        return fail(error)
    if options.json:
        say(json.dumps([_document(item) for item in items], indent=1))
        return 0
    if not items:
        say("no models on this disk nor in the mesh; `llamesh add` and `llamesh pull` bring some")
        return 0
    rows = [("MODEL", "SIZE", "SHA256", "FROM", "USED BY", "NODE")]
    for item in items:
        used = ", ".join(item.profiles) or "-"
        rows.append(
            (
                item.name,
                in_words(item.size) if item.path else "-",
                item.sha256[:12] or "-",
                item.origin,
                used,
                ", ".join(item.nodes),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _add_other_nodes(items: list[Item], own: str, state: dict[str, Any]) -> None:
    """Who else has the weights of the profiles, as the running node knows it; and what only others have."""
    for model in state.get("models", ()):
        having = {
            node
            for node, cell in model["nodes"].items()
            if node != own and cell.get("state") in _WITH_WEIGHTS
        }
        known = [item for item in items if model["name"] in item.profiles]
        for item in known:
            item.nodes += sorted(having - set(item.nodes))
        if having and not known:
            items.append(Item(model["name"], "", 0, "", "mesh", sorted(having), [model["name"]]))


def remove(options: argparse.Namespace) -> int:
    """`llamesh rm`: what was asked for, after a question; the exit code."""
    cache = find_cache(os.environ)
    try:
        settings, cookbook = read_files(options)
        items = inventory(settings, cookbook, cache)
        chosen = list(
            {id(item): item for name in options.models for item in _named(items, cookbook, name)}.values()
        )
        if not options.yes and not _agreed(chosen):
            say("nothing was removed")
            return 1
        for item in chosen:
            assert item.record is not None  # noqa: S101
            freed = cache.remove(item.record)
            say(f"removed {item.name}: {in_words(freed)} are free")
    except (ConfigError, WeightsError, Failed, OSError) as error:
        return fail(error)
    return 0


def inventory(settings: Settings, cookbook: Cookbook, cache: Cache, *, work_out: bool = False) -> list[Item]:
    """The models on this disk that this node knows of: fetched, named by the cookbook, or in models_dir.

    `work_out`: hash what wasn't hashed yet, which takes a second per gigabyte. Blocks. Raises OSError.
    """
    shelf = _Shelf(settings.node_id, Hashes(cache.own / "hashes.json"), work_out)
    for record in cache.records():
        shelf.of_record(record)
    for profile in cookbook.profiles:
        item = None
        if isinstance(profile.source, ModelPath):
            item = shelf.of_path(Path(profile.source.path), "path")
        elif (wanted := wanted_of(profile)) is not None and (there := cache.look(wanted)) is not None:
            item = shelf.of_record(there)
        if item is not None:
            item.profiles.append(profile.public_name)
    for path in _in_folder(settings.models_dir):
        shelf.of_path(path, "models_dir")
    return sorted(shelf.items.values(), key=lambda item: item.name.casefold())


class _Shelf:
    """Items by what tells them apart: the record, or the path."""

    def __init__(self, node: str, hashes: Hashes, work_out: bool) -> None:
        self.items: dict[str, Item] = {}
        self._node = node
        self._hashes = hashes
        self._work_out = work_out

    def of_path(self, path: Path, origin: str) -> Item | None:
        """The item of a file of the user's, None when there is no such file."""
        key = str(path)
        if key not in self.items and path.is_file():
            parts = [path.with_name(name) for name in part_names(path.name)]
            size = sum(part.stat().st_size for part in parts if part.is_file())
            self.items[key] = Item(path.name, key, size, self._sha256(key), origin, [self._node])
        return self.items.get(key)

    def of_record(self, record: Record) -> Item | None:
        """The item of what was fetched, None when that isn't there any more."""
        first = record.parts[0]
        if record.key not in self.items and Path(first.path).is_file():
            size = sum(file.size for file in record.files)
            known = first.sha256 or self._sha256(first.path)
            origin = "download" if first.ours else "hub cache"
            self.items[record.key] = Item(
                record.name, first.path, size, known, origin, [self._node], record=record
            )
        return self.items.get(record.key)

    def _sha256(self, path: str) -> str:
        return (self._hashes.of(path) if self._work_out else self._hashes.known(path)) or ""


def _in_folder(folder: Path | None) -> list[Path]:
    if folder is None:
        return []
    found = [path for path in sorted(folder.rglob("*.gguf"))[:_MOST_FILES] if path.is_file()]
    return [path for path in found if not is_projector(path.name) and not later_part(path.name)]


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
        say(f"{item.name}: {in_words(item.size)} in {item.path}{used}")
    if not sys.stdin.isatty():
        raise Failed("there is nobody to ask: --yes removes them without a question")
    sys.stdout.write("remove this? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _document(item: Item) -> dict[str, object]:
    document = asdict(item)
    del document["record"]
    return document
