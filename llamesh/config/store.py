"""The files as they are now: read, watched, and published as one value when they change.

A change is taken in whole or not at all: a file with a mistake leaves everything as it was, and the
mistake stays in `problems` until it is mended. Parts keep `store.current` and read from it each time
they need to know, so replacing its two values is the whole of publishing. Files are looked at and
read in a thread (a nasty one takes a second), and published in trio's.

Watching
- The system tells of changes in the folders of the files, not of the files: an atomic rename would cut
  that tie. The truth is each file's signature (identity, size, times), looked at after an event and
  every 0.8 s besides, for where no events come: network mounts, and symlinks whose target is swapped
  in a folder far away.
- A signature has to hold still for a moment before the file is read, and while it is read: an editor
  that writes in place empties the file first.
- A file that was there and is empty or gone is refused. Both happen in the middle of an edit, or with
  a full disk, and would take all models or all keys away.
"""

from __future__ import annotations

import contextlib
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import trio
import watchfiles

from llamesh.config.check import load_files
from llamesh.config.cookbook import Cookbook, Profile
from llamesh.config.current import Current
from llamesh.config.problems import ConfigError, Problem
from llamesh.config.settings import Settings

# Settings that running parts read anew each time. Everything else needs a restart.
RELOADABLE = frozenset(
    {
        "auth",
        "default_model",
        "disk_budget_gb",
        "keep_downloading",
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

# Together with the time to read them: in force within a second.
_LOOK_SECONDS = 0.8
_SETTLE_SECONDS = 0.15

# A file that never holds still is given up on after so many looks or reads, until the next look.
_SETTLE_LOOKS = 20
_READS = 3


class Stamp(NamedTuple):
    """What tells a file from the one that was there before, or from itself before a write."""

    mode: int
    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int


# Of config, cookbook and secrets; None where there is no file.
Signature = tuple[Stamp | None, ...]


@dataclass(frozen=True, slots=True)
class Files:
    """Where a node's files are. A file that isn't `required` may be missing at the start."""

    config: Path
    cookbook: Path
    secrets: Path
    config_required: bool = False
    secrets_required: bool = False


@dataclass(frozen=True, slots=True)
class Change:
    """What a reload did: profile keys, names of aliases, and names of settings.

    `needs_restart`: settings that say something else now than what is in force, and wait for a restart.
    """

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    needs_restart: tuple[str, ...] = ()


class _Read(NamedTuple):
    """One attempt: the signature around it (None: it changed meanwhile), and what it brought."""

    signature: Signature | None
    outcome: tuple[Settings, Cookbook] | ConfigError


class Store:
    """Settings and cookbook of a running node.

    `on_change` is called after each change that was taken in, `on_problem` for each that was refused.
    """

    def __init__(self, files: Files, environ: Mapping[str, str]) -> None:
        """Reads the files. Raises ConfigError."""
        self._files = files
        self._environ = environ
        self._good: Signature = (None, None, None)  # of what is in force
        self._seen = self._signature()
        self._found: tuple[Profile, ...] = ()
        settings, cookbook = self._load()
        self._written = cookbook
        self._good = self._seen
        self._pending: tuple[str, ...] = ()
        self._lock = trio.Lock()
        self._news = trio.Event()
        self.current = Current(settings, cookbook)
        self.reloads = self.refusals = 0
        self.problems: ConfigError | None = None
        self.on_change: Callable[[Change], None] = lambda change: None
        self.on_problem: Callable[[ConfigError], None] = lambda error: None

    async def reload(self) -> Change:
        """Read the files and publish what is new. Raises ConfigError, and then nothing has changed.

        Two at once are done one after the other.
        """
        async with self._lock:
            return await self._reload()

    def publish_found(self, found: tuple[Profile, ...]) -> None:
        """These models were found in `models_dir`, and no others: they are served beside the cookbook's."""
        if found != self._found:
            self._found = found
            change = _difference(self.current, self.current.settings, self._whole())
            self.current.cookbook = self._whole()
            self.on_change(change)

    async def watch(self) -> None:
        """Reload whenever a file changes, for ever. Cancelling it takes a tenth of a second."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            await self._watch()

    async def _watch(self) -> None:
        while True:
            self._news = trio.Event()
            with trio.move_on_after(_LOOK_SECONDS):
                await self._news.wait()
            now = await self._look()
            if now == self._seen:
                continue
            await self._settle(now)
            async with self._lock:
                if await self._look() == self._seen:
                    continue  # somebody else asked for it
                try:
                    await self._reload()
                except ConfigError:
                    continue  # told by `on_problem`

    async def _listen(self) -> None:
        """Have the system say when something happens in the folders of the files."""
        folders = {
            folder for path in self._paths() for folder in (path.absolute().parent, path.resolve().parent)
        }
        there = [folder for folder in folders if folder.is_dir()]
        if not there:
            return
        # Without events (no watches left, a network mount) looking now and then has to do.
        with contextlib.suppress(OSError, RuntimeError):
            async for _ in watchfiles.awatch(*there, recursive=False, debounce=50, step=20, rust_timeout=100):
                self._news.set()

    async def _reload(self) -> Change:
        for _ in range(_READS):
            read = await trio.to_thread.run_sync(self._read, abandon_on_cancel=True)
            if read.signature is not None:
                self._seen = read.signature
                break
        else:
            message = "this or another file changes while it is read"
            raise self._refused(ConfigError([self._problem(message, "write it in one go")]))
        if isinstance(read.outcome, ConfigError):
            raise self._refused(read.outcome)
        return self._publish(*read.outcome)

    def _publish(self, settings: Settings, cookbook: Cookbook) -> Change:
        self.problems = None
        self.reloads += 1
        self._good = self._seen
        self._written, current = cookbook, self.current
        cookbook = self._whole()
        change = _difference(current, settings, cookbook)
        current.settings = current.settings.model_copy(
            update={name: getattr(settings, name) for name in RELOADABLE}
        )
        current.cookbook = cookbook
        before, self._pending = self._pending, change.needs_restart
        if replace(change, needs_restart=()) != Change() or before != self._pending:
            self.on_change(change)
        return change

    def _whole(self) -> Cookbook:
        return self._written.with_found(self._found)

    def _refused(self, error: ConfigError) -> ConfigError:
        self.problems = error
        self.refusals += 1
        self.on_problem(error)
        return error

    async def _settle(self, last: Signature) -> None:
        for _ in range(_SETTLE_LOOKS):
            await trio.sleep(_SETTLE_SECONDS)
            now = await self._look()
            if now == last:
                return
            last = now

    async def _look(self) -> Signature:
        # Even this can hang: the files may be on a network.
        return await trio.to_thread.run_sync(self._signature, abandon_on_cancel=True)

    # In a thread.

    def _read(self) -> _Read:
        before = self._signature()
        outcome: tuple[Settings, Cookbook] | ConfigError
        try:
            emptied = self._emptied(before)
            if emptied:
                raise ConfigError(emptied)
            outcome = self._load()
        except ConfigError as error:
            outcome = error
        except Exception as error:
            # Whatever it is, a node that runs doesn't end for a file that somebody edits.
            outcome = ConfigError([self._problem(f"can't be read: {type(error).__name__}")])
        return _Read(before if self._signature() == before else None, outcome)

    def _emptied(self, now: Signature) -> list[Problem]:
        hint = "a line `models: []` or `{}` says that nothing is wanted"
        return [
            Problem(str(path), None, "", "is empty now", hint)
            for path, stamp, good in zip(self._paths(), now, self._good, strict=True)
            if stamp is not None and stat.S_ISREG(stamp.mode) and not stamp.size and good and good.size
        ]

    def _problem(self, message: str, hint: str = "") -> Problem:
        return Problem(str(self._files.cookbook), None, "", message, hint)

    def _paths(self) -> tuple[Path, ...]:
        return (self._files.config, self._files.cookbook, self._files.secrets)

    def _signature(self) -> Signature:
        return tuple(_stamp(path) for path in self._paths())

    def _load(self) -> tuple[Settings, Cookbook]:
        files, good = self._files, self._good
        return load_files(
            files.config,
            files.cookbook,
            files.secrets,
            self._environ,
            config_required=files.config_required or good[0] is not None,
            secrets_required=files.secrets_required or good[2] is not None,
        )


def runs_the_same(one: Profile, other: Profile) -> bool:
    """Whether an instance of `one` is an instance of `other`: same weights, arguments and key."""
    return (one.source, one.arguments, one.api_key, one.kind) == (
        other.source,
        other.arguments,
        other.api_key,
        other.kind,
    )


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return Stamp(
        found.st_mode, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
    )


def _difference(current: Current, settings: Settings, cookbook: Cookbook) -> Change:
    before = {p.key: p for p in current.cookbook.profiles}
    after = {p.key: p for p in cookbook.profiles}
    aliases = current.cookbook.aliases.items() ^ cookbook.aliases.items()
    names = [n for n in Settings.model_fields if getattr(current.settings, n) != getattr(settings, n)]
    return Change(
        added=tuple(key for key in after if key not in before),
        removed=tuple(key for key in before if key not in after),
        changed=tuple(key for key in after if key in before and after[key] != before[key]),
        aliases=tuple(sorted({name for name, _ in aliases})),
        settings=tuple(name for name in names if name in RELOADABLE),
        needs_restart=tuple(name for name in names if name not in RELOADABLE),
    )
