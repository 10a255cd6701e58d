"""Which weights are on this disk."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llamesh.config.cookbook import Cookbook, ModelPath
from llamesh.config.settings import Settings
from llamesh.core.model_files import is_projector, later_part, part_names
from llamesh.local.weights import Cache
from llamesh.local.weights.cache import Record
from llamesh.local.weights.hashes import Hashes
from llamesh.local.weights.wanted import wanted_of

_MOST_FILES = 2000


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
