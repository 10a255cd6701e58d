"""The files as they are now: read, watched, and published as one value when they change.

A change is taken in whole or not at all: a file with a mistake leaves everything as it was, and the
mistake stays in `problems` until it is mended. Components ask `store.settings` and `store.cookbook`
each time they need them, so replacing the two is the whole of publishing.

Watching
- watchfiles tells of changes in the folders of the files (not of the files: an atomic rename would
  cut that tie). The truth is the files' signature (identity, size, time), looked at after each event
  and every two seconds besides, for file systems that send no events and for symlinks whose target
  is swapped in a folder that nobody watches.
- A signature has to hold still for a moment before the file is read: an editor that writes in place
  empties the file first, and an empty cookbook is a valid one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import trio
import watchfiles

from llamesh.config.check import load_files
from llamesh.config.cookbook import Cookbook, Profile
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings

# Settings that running parts read anew each time. Everything else needs a restart.
RELOADABLE = frozenset(
    {
        "auth",
        "default_model",
        "http",
        "max_hops",
        "max_instances_per_node",
        "max_sysmem_mb",
        "max_total_queue_entries",
        "max_vram_mb",
        "model_defaults",
        "shutdown_grace_period_seconds",
        "upstream_read_timeout_ms",
        "wedge_detector",
        "yield_to",
    }
)

_SETTLE_SECONDS = 0.15
_LOOK_SECONDS = 2.0

Signature = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True, slots=True)
class Files:
    """Where a node's files are. A file that isn't `required` may be missing."""

    config: Path
    cookbook: Path
    secrets: Path
    config_required: bool = False
    secrets_required: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What a reload did: profile keys, and dotted names of settings."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return any((self.added, self.removed, self.changed, self.settings, self.needs_restart))


class Store:
    """Settings and cookbook of a running node; `on_change` is called after each that was taken in."""

    def __init__(self, files: Files, environ: Mapping[str, str]) -> None:
        """Reads the files. Raises ConfigError."""
        self._files = files
        self._environ = environ
        self._seen = self._signature()
        self.settings, self.cookbook = self._load()
        self._written = self.settings  # as in the file, where `settings` keeps what needs a restart
        self.problems: ConfigError | None = None
        self.on_change: Callable[[Change], None] = lambda change: None
        self.on_problem: Callable[[ConfigError], None] = lambda error: None

    def reload(self) -> Change:
        """Read the files and publish what is new. Raises ConfigError, and then nothing has changed."""
        self._seen = self._signature()
        try:
            settings, cookbook = self._load()
        except ConfigError as error:
            self.problems = error
            raise
        self.problems = None
        change = _difference(self._written, settings, self.cookbook, cookbook)
        self._written = settings
        self.settings = self.settings.model_copy(
            update={name: getattr(settings, name) for name in RELOADABLE & set(Settings.model_fields)}
        )
        self.cookbook = cookbook
        if change:
            self.on_change(change)
        return change

    async def watch(self) -> None:
        """Reload whenever a file changes, for ever. Mistakes go to `on_problem`, once each."""
        poke, events = trio.open_memory_channel[None](1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, poke)
            while True:
                with trio.move_on_after(_LOOK_SECONDS):
                    await events.receive()
                if self._signature() != self._seen:
                    await self._settle()
                    self._reload_quietly()

    async def _settle(self) -> None:
        last = self._signature()
        while True:
            await trio.sleep(_SETTLE_SECONDS)
            now = self._signature()
            if now == last:
                return
            last = now

    def _reload_quietly(self) -> None:
        try:
            self.reload()
        except ConfigError as error:
            self.on_problem(error)

    async def _listen(self, poke: trio.MemorySendChannel[None]) -> None:
        folders = {path.absolute().parent for path in self._paths()}
        folders |= {path.resolve().parent for path in self._paths()}
        existing = [folder for folder in folders if folder.is_dir()]
        stop = trio.Event()
        try:
            # Without a bound the watching thread would hold up a shutdown for seconds.
            async for _ in watchfiles.awatch(
                *existing, stop_event=stop, rust_timeout=300, step=20, debounce=50, recursive=False
            ):
                try:
                    poke.send_nowait(None)
                except trio.WouldBlock:
                    continue  # one that is due already is enough
        except OSError:
            return  # no events here (too many watches, a network mount): looking every 2 s goes on

    def _paths(self) -> tuple[Path, ...]:
        return (self._files.config, self._files.cookbook, self._files.secrets)

    def _signature(self) -> Signature:
        return tuple(_stamp(path) for path in self._paths())

    def _load(self) -> tuple[Settings, Cookbook]:
        files = self._files
        return load_files(
            files.config,
            files.cookbook,
            files.secrets,
            self._environ,
            config_required=files.config_required,
            secrets_required=files.secrets_required,
        )


def runs_the_same(one: Profile, other: Profile) -> bool:
    """Whether an instance of `one` is an instance of `other`: same weights, arguments and key."""
    return (one.source, one.arguments, one.api_key, one.kind) == (
        other.source,
        other.arguments,
        other.api_key,
        other.kind,
    )


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _difference(old: Settings, new: Settings, old_book: Cookbook, new_book: Cookbook) -> Change:
    before = {p.key: p for p in old_book.profiles}
    after = {p.key: p for p in new_book.profiles}
    names = [name for name in Settings.model_fields if getattr(old, name) != getattr(new, name)]
    return Change(
        added=tuple(key for key in after if key not in before),
        removed=tuple(key for key in before if key not in after),
        changed=tuple(key for key in after if key in before and after[key] != before[key]),
        settings=tuple(name for name in names if name in RELOADABLE),
        needs_restart=tuple(name for name in names if name not in RELOADABLE),
    )
