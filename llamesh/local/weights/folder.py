"""`models_dir`: every GGUF file below that folder is a model that can be asked for.

A model is called by its file's name without `.gguf`; what the file says of itself makes it one for text,
embeddings or reranking. The folder is looked at every few seconds, since events don't come from everywhere
(network mounts), and by one thread at a time: where it hangs, nothing else does.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import trio

from llamesh.config.arguments import Kind
from llamesh.config.cookbook import ModelPath, Profile
from llamesh.config.store import Store
from llamesh.core.model_files import is_projector, later_part, part_names
from llamesh.local.gguf import BadGguf, read_header
from llamesh.telemetry.logs import get_logger

log = get_logger("weights")

_LOOK_SECONDS = 2.0
_PATIENCE_SECONDS = 10.0

# A file that changed so recently (seconds) may still be on its way.
_SETTLE_SECONDS = 1.0

_MOST_FILES = 2000
_MOST_DEPTH = 6

# Pooling as GGUF names it (`llama_pooling_type` of llama.cpp): a model with one isn't for text.
_NO_POOLING, _RANK = 0, 4

_Stamp = tuple[int, int, int]


class ModelsFolder:
    """See the module. Publishes what it finds through the store."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._known: dict[str, tuple[_Stamp, Kind | None]] = {}
        self._looking = threading.Event()
        self._threads = trio.CapacityLimiter(1)
        self._silent = False

    async def run(self) -> None:
        """Look for ever."""
        while True:
            if not self._looking.is_set():
                await self._look()
            await trio.sleep(_LOOK_SECONDS)

    async def _look(self) -> None:
        found: tuple[Profile, ...] | None = None
        with trio.move_on_after(_PATIENCE_SECONDS):
            found = await trio.to_thread.run_sync(
                self._in_thread, abandon_on_cancel=True, limiter=self._threads
            )
        if found is None:
            if not self._silent:
                log.warning(
                    "models_dir doesn't answer; what was found before stays", folder=str(self._folder)
                )
            self._silent = True
            return
        self._silent = False
        self._store.publish_found(found)

    def _in_thread(self) -> tuple[Profile, ...]:
        self._looking.set()
        try:
            return self.scan()
        finally:
            self._looking.clear()

    def scan(self) -> tuple[Profile, ...]:
        """The models in the folder, by name. Blocks."""
        files = sorted(_files(self._folder))
        known, profiles = {}, dict[str, Profile]()
        for path in files:
            stamp = _stamp(path)
            if stamp is None or is_projector(path.name) or later_part(path.name):
                continue
            if not all(path.with_name(part).exists() for part in part_names(path.name)):
                continue
            seen = self._known.get(str(path))
            kind = seen[1] if seen is not None and seen[0] == stamp else _kind(path)
            known[str(path)] = (stamp, kind)
            if kind is not None:
                profile = _profile(path, kind, files, self._folder, profiles)
                profiles[profile.model.casefold()] = profile
        self._known = known
        return tuple(profiles.values())


def _files(folder: Path) -> Iterator[Path]:
    count = 0
    for place, folders, names in os.walk(folder):
        if len(Path(place).relative_to(folder).parts) >= _MOST_DEPTH:
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.lower().endswith(".gguf") and not name.startswith("."):
                yield Path(place, name)
                count += 1
                if count >= _MOST_FILES:
                    return


def _stamp(path: Path) -> _Stamp | None:
    """Of a file that has come to rest, None for any other."""
    try:
        status = path.stat()
    except OSError:
        return None
    if time.time() - status.st_mtime < _SETTLE_SECONDS:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _kind(path: Path) -> Kind | None:
    """What the model is for; None when it can't be used."""
    try:
        header = read_header(path)
    except BadGguf as error:
        log.info("a file in models_dir isn't a model", path=str(path), problem=error.message)
        return None
    pooling = header.numbers.get("pooling_type", _NO_POOLING)
    if pooling == _NO_POOLING:
        return "text"
    return "rerank" if pooling == _RANK else "embedding"


def _profile(path: Path, kind: Kind, files: list[Path], root: Path, others: dict[str, Profile]) -> Profile:
    name = _name(part_names(path.name)[0].removesuffix(".gguf"))
    if name.casefold() in others:
        name = _name("-".join(path.relative_to(root).with_suffix("").parts))
    arguments: tuple[str, ...] = {"rerank": ("--reranking",), "embedding": ("--embedding",)}.get(kind, ())
    beside = [one for one in files if one.parent == path.parent]
    projectors = [one for one in beside if is_projector(one.name)]
    models = [one for one in beside if not is_projector(one.name) and not later_part(one.name)]
    # Whose projector it is can only be told where there is one model and one projector.
    if kind == "text" and len(projectors) == len(models) == 1:
        arguments = (*arguments, "--mmproj", str(projectors[0]))
    return Profile(name, "default", "", "found in models_dir", ModelPath(str(path)), arguments, kind)


def _name(text: str) -> str:
    """A model's name: without colons, blanks and control characters, and without the number of its part."""
    plain = re.sub(r"-\d{5}-of-\d{5}$", "", text)
    return re.sub(r"[^\w.+@-]+", "-", plain).strip("-") or "model"
