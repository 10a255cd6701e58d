"""Which weights of this disk another node may have, by their SHA-256.

Only whole GGUF files that this node knows as weights: those of our records, of the hub's cache, and of the
cookbook's paths where their hash is known already. No path comes from outside, so none leads elsewhere. All
calls block.
"""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from llamesh.config.model_names import BadName, split_repo
from llamesh.core.model_files import RemoteFile, part_names
from llamesh.local.weights.cache import Cache
from llamesh.local.weights.hashes import Hashes

SHA256 = re.compile(r"[0-9a-f]{64}")
_MAGIC = b"GGUF"


class SharedFile:
    """An open file of weights. `size` in bytes."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        self._descriptor = descriptor
        self._guard = threading.Lock()
        self._reading = 0
        self._closed = False

    def read(self, buffer: memoryview, at: int) -> int:
        """Bytes from `at` on into `buffer`, which is filled where the file is long enough; how many.

        Blocks; raises OSError.
        """
        with self._guard:
            if self._closed:
                return 0
            self._reading += 1
        try:
            done = 0
            while done < len(buffer):
                count = os.preadv(self._descriptor, [buffer[done:]], at + done)
                if not count:
                    break
                done += count
            return done
        finally:
            self._end_reading()

    def _end_reading(self) -> None:
        with self._guard:
            self._reading -= 1
            if self._closed and not self._reading:
                os.close(self._descriptor)

    def close(self) -> None:
        """Idempotent, and doesn't wait for a `read` that hangs: the last one closes it."""
        with self._guard:
            if not self._closed and not self._reading:
                os.close(self._descriptor)
            self._closed = True


class Shared:
    """See the module. `paths`: the model files that the cookbook names."""

    def __init__(self, cache: Cache, hashes: Hashes, paths: Callable[[], Iterable[str]]) -> None:
        self._cache = cache
        self._hashes = hashes
        self._paths = paths

    def size(self, sha256: str) -> int | None:
        """How long a file is, None when it isn't here."""
        file = self.open(sha256)
        if file is None:
            return None
        file.close()
        return file.size

    def open(self, sha256: str) -> SharedFile | None:
        """The file, None when it isn't here."""
        if not SHA256.fullmatch(sha256):
            return None
        for path, size in self._candidates(sha256):
            with suppress(OSError):
                if (file := _open(path, size)) is not None:
                    return file
        return None

    def files(self, repo: str) -> tuple[str, tuple[RemoteFile, ...]]:
        """What is here of a repository: the commit, and its files that have a SHA-256. "" for nothing."""
        try:
            repo = split_repo(repo)[0]
        except BadName:
            return "", ()
        commit, found = self._cache.snapshot(repo)
        files = [
            file
            for file in found
            if file.sha256 is not None
            and SHA256.fullmatch(file.sha256)
            and _is_there(self._cache.blob(repo, file.sha256), file.size)
        ]
        return (commit, tuple(files)) if files else ("", ())

    def _candidates(self, sha256: str) -> Iterator[tuple[Path, int | None]]:
        """Where it may be, and how long it has to be where that is known."""
        for record in self._cache.records():
            for file in record.files:
                if file.sha256 == sha256:
                    yield Path(file.blob), file.size
        with suppress(OSError):
            # A blob has that name only when it is whole: theirs and ours are called otherwise before.
            for folder in sorted(self._cache.hub.glob("models--*")):
                yield folder / "blobs" / sha256, None
        for path in self._paths():
            first = Path(path)
            for name in part_names(first.name):
                one = str(first.with_name(name))
                if self._hashes.known(one) == sha256:
                    yield Path(one), None


def _open(path: Path, size: int | None) -> SharedFile | None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        good = (
            stat.S_ISREG(status.st_mode)
            and status.st_size == (status.st_size if size is None else size)
            and os.pread(descriptor, len(_MAGIC), 0) == _MAGIC
        )
    except BaseException:
        os.close(descriptor)
        raise
    if not good:
        os.close(descriptor)
        return None
    return SharedFile(descriptor, status.st_size)


def _is_there(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
