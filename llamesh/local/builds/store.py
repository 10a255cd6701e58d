"""The builds on disk: each in a folder of its own, one of them live.

    build_path/
        3f2a90c41b7d-5b0c9e11/     a finished build: commit and recipe
            build.json             what it is
            bin/llama-server       and the libraries that it needs
        work/5b0c9e11/             where that recipe is compiled; kept, so the next commit takes less
        .lock                      held while somebody builds
    binary_path -> build_path/3f2a90c41b7d-5b0c9e11/bin/llama-server

The live one is where `binary_path`, a symlink, leads. It changes by a rename: whoever starts the engine
gets the old one or the new one. Who runs a build holds a lock on its `build.json`, so that nobody deletes it,
another process included.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import trio

from llamesh.core.builds import TARGET, Kept, to_delete
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.record import RECORD, Build, build_behind, read_build

STAGE = "installing the build"

_LOCK = ".lock"
_LOCK_POLL_SECONDS = 0.25


class Store:
    """See the module. Everything here blocks for the disk's sake, for milliseconds; `add` for longer."""

    def __init__(self, build_path: Path, binary_path: Path) -> None:
        self._root = build_path.absolute()
        self._link = binary_path.absolute()

    @property
    def root(self) -> Path:
        """The folder of all builds."""
        return self._root

    def work(self, recipe: str) -> Path:
        """Where a recipe is compiled."""
        return self._root / "work" / recipe

    def folder(self, key: str) -> Path:
        """The folder of a build."""
        return self._root / key

    def program(self, key: str) -> Path:
        """The engine of a build."""
        return self.folder(key) / "bin" / TARGET

    def builds(self) -> Iterator[Build]:
        """All that are whole."""
        with contextlib.suppress(OSError):
            for folder in sorted(self._root.iterdir()):
                if (build := read_build(folder)) is not None:
                    yield build

    def find(self, key: str) -> Build | None:
        """A whole build by its key."""
        return read_build(self.folder(key))

    def live(self) -> Build | None:
        """The one that `binary_path` leads to; None when it leads elsewhere, or there is none."""
        found = build_behind(self._link)
        return None if found is None else found[0]

    @asynccontextmanager
    async def lock(self, on_wait: Callable[[], None]) -> AsyncIterator[None]:
        """Be the only one that builds here, over all processes; `on_wait` is told when somebody else does."""
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            file = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise BuildFailed(STAGE, f"{self._root} can't be written to: {error}") from error
        try:
            told = False
            while not _locks(file):
                if not told:
                    on_wait()
                told = True
                await trio.sleep(_LOCK_POLL_SECONDS)
            yield
        finally:
            os.close(file)

    def stage(self, key: str, products: Path) -> Path:
        """Copy the products of a compilation beside their later place; the program there.

        What is copied is what lies in the folder of the program, libraries among it. Raises BuildFailed.
        """
        part = self._root / f"{key}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(products, part / "bin", symlinks=True)
        except (OSError, shutil.Error) as error:
            raise BuildFailed(STAGE, f"{products} can't be copied to {part}: {error}") from error
        return part / "bin" / TARGET

    def discard(self, key: str) -> None:
        """Throw away what `stage` made."""
        shutil.rmtree(self._root / f"{key}.part", ignore_errors=True)

    def add(self, build: Build) -> Build:
        """What `stage` made, and was tested, is a build from now on. Raises BuildFailed."""
        part, folder = self._root / f"{build.key}.part", self.folder(build.key)
        try:
            self._write(part, build)
            # A folder of this name is a build that was forced anew: out of the way first, whole again soon.
            if folder.exists():
                old = self._root / f"{build.key}.old"
                shutil.rmtree(old, ignore_errors=True)
                folder.rename(old)
                part.rename(folder)
                shutil.rmtree(old, ignore_errors=True)
            else:
                part.rename(folder)
        except OSError as error:
            raise BuildFailed(STAGE, f"{folder} can't be written: {error}") from error
        return build

    def make_live(self, key: str) -> Path | None:
        """Have `binary_path` lead to a build. The program that it was or led to before, None for none.

        A file that somebody put there is kept beside it, under another name. Raises BuildFailed.
        """
        try:
            self._link.parent.mkdir(parents=True, exist_ok=True)
            if self._link.is_dir():
                raise BuildFailed(STAGE, f"llama_cpp.binary_path {self._link} is a folder: name a file in it")
            before = self._link.resolve() if self._link.exists() else None
            if before is not None and not self._link.is_symlink():
                before = self._free_name()
                self._link.rename(before)
            self._lead_to(self.program(key))
        except (OSError, RuntimeError) as error:
            raise BuildFailed(STAGE, f"{self._link} can't be set: {error}") from error
        return before

    def lead_back(self, program: Path | None) -> None:
        """Have `binary_path` lead to what it led to before `make_live`. Raises BuildFailed."""
        try:
            if program is not None:
                self._lead_to(program)
            elif self._link.is_symlink():
                self._link.unlink()
        except OSError as error:
            raise BuildFailed(STAGE, f"{self._link} can't be set: {error}") from error

    def reject(self, key: str, why: str) -> None:
        """Note that a build isn't to be used. Where that can't be written, this life has to remember."""
        build = self.find(key)
        if build is not None:
            with contextlib.suppress(OSError):
                self._write(self.folder(key), msgspec.structs.replace(build, rejected=why))

    def prune(self, keep: int) -> tuple[str, ...]:
        """Delete the oldest builds beyond `keep` besides the live one; the keys of those that went.

        One that somebody runs (see `hold`) stays, too, and what a process that was killed left behind goes.
        While somebody builds, nothing does: it could be theirs, and they prune when they are done.
        """
        try:
            file = os.open(self._root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return ()  # nothing can be deleted there, or there is nothing
        try:
            if not _locks(file):
                return ()
            live = self.live()
            used = {live.key} if live is not None else set()
            builds = [Kept(build.key, build.built_at) for build in self.builds()]
            gone = tuple(key for key in to_delete(builds, used, keep) if self._delete(self.folder(key)))
            with contextlib.suppress(OSError):
                for left in (*self._root.glob("*.part"), *self._root.glob("*.old")):
                    shutil.rmtree(left, ignore_errors=True)
            return gone
        finally:
            os.close(file)

    def _delete(self, folder: Path) -> bool:
        try:
            file = os.open(folder / RECORD, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # First the record: what is half deleted isn't a build.
            (folder / RECORD).unlink()
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            return False  # in use
        finally:
            os.close(file)
        return True

    def _lead_to(self, program: Path) -> None:
        new = self._link.with_name(f".{self._link.name}.{os.getpid()}.new")
        new.unlink(missing_ok=True)
        new.symlink_to(program)
        os.replace(new, self._link)

    def _free_name(self) -> Path:
        """A name for a program of the user's own that was in the place of ours."""
        name = self._link.with_name(f"{self._link.name}.own")
        return name if not name.exists() else name.with_name(f"{name.name}.{time.time_ns()}")

    @staticmethod
    def _write(folder: Path, build: Build) -> None:
        new = folder / f".{RECORD}.{os.getpid()}"
        with new.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(build), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, folder / RECORD)


def _locks(file: int) -> bool:
    """Take the lock unless another has it. On a file system without locks everybody has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
