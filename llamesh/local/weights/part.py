"""A file that is still coming: its bytes, and a journal of what is there for sure.

The journal lies beside the part and names the ranges that were on the disk when it was written, and the
SHA-256 of the beginning as it was then (see `digest`). So a node that was killed, or a machine that lost its
power, goes on where it was: nothing is fetched again but what came after the last journal, and nothing is
read again. A journal that doesn't fit its part is as good as none. All calls block.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

from llamesh.core.ranges import Ranges
from llamesh.local.weights.errors import DiskFull, Unusable, WeightsError

_VERSION = 1
_JOURNAL_BYTES = 1 << 20


class Part:
    """The part of `target`, which will have `size` bytes. Held by one process at a time: see `lock`."""

    def __init__(self, target: Path, size: int) -> None:
        """Opens what is there, or begins anew. Raises WeightsError."""
        self.path = target.with_name(target.name + ".llamesh.incomplete")
        self.size = size
        self.ranges = Ranges()
        self.hashed = 0
        self.state: str | None = None
        self._target = target
        self._journal = journal_of(target)
        try:
            self.fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise trouble(error, self.path) from None
        try:
            self._take(_read(self._journal))
        except OSError as error:
            self.close()
            raise trouble(error, self.path) from None

    def write(self, data: memoryview, offset: int) -> None:
        """Raises WeightsError."""
        try:
            while data:
                count = os.pwrite(self.fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise trouble(error, self.path) from None

    def read(self, buffer: memoryview, offset: int) -> int:
        """Raises WeightsError."""
        try:
            return os.preadv(self.fd, [buffer], offset)
        except OSError as error:
            raise trouble(error, self.path) from None

    def save(self, ranges: list[tuple[int, int]], hashed: int, state: str | None) -> None:
        """Have the disk take what was written, then note it. Raises WeightsError."""
        try:
            _flush(self.fd)
            status = os.fstat(self.fd)
            document = {
                "version": _VERSION,
                "size": self.size,
                "part": [status.st_dev, status.st_ino],
                "ranges": ranges,
                "hashed": hashed if state else 0,
                "state": state,
            }
            temporary = self._journal.with_name(self._journal.name + ".new")
            temporary.write_text(json.dumps(document))
            os.replace(temporary, self._journal)
        except OSError as error:
            raise trouble(error, self.path) from None

    def finish(self) -> None:
        """The part is whole: give it its name, for good. Raises WeightsError."""
        try:
            os.fsync(self.fd)
            os.replace(self.path, self._target)
            sync_folder(self._target.parent)
            self._journal.unlink(missing_ok=True)
        except OSError as error:
            raise trouble(error, self._target) from None

    def discard(self) -> None:
        """What came is worth nothing."""
        for path in (self._journal, self.path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _take(self, document: dict[str, Any]) -> None:
        """What the journal says, where it can be true; else the part is emptied."""
        status = os.fstat(self.fd)
        try:
            ranges = Ranges((int(start), int(end)) for start, end in document["ranges"])
            fits = (
                document["version"] == _VERSION
                and document["size"] == self.size
                and document["part"] == [status.st_dev, status.st_ino]
                and all(0 <= start < end <= min(self.size, status.st_size) for start, end in ranges)
            )
            hashed, state = int(document["hashed"]), document["state"]
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            os.ftruncate(self.fd, 0)
            return
        self.ranges = ranges
        if isinstance(state, str) and 0 < hashed <= ranges.covered_from(0):
            self.hashed, self.state = hashed, state


def journal_of(target: Path) -> Path:
    """Where the journal of a part lies."""
    return target.with_name(target.name + ".llamesh.journal")


def bytes_there(target: Path) -> int:
    """How much of a file that somebody is fetching has come, by its journal; 0 when unknown."""
    ranges = _read(journal_of(target)).get("ranges")
    try:
        return Ranges((int(start), int(end)) for start, end in ranges).total if ranges else 0
    except (TypeError, ValueError):
        return 0


def trouble(error: OSError, path: Path) -> WeightsError:
    """What an error of the disk means to the one who waits for a model."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(
            f"the disk of {path.parent} is full ({error.strerror}); "
            "free some of it, or name another folder in HF_HUB_CACHE"
        )
    return Unusable(f"{error.filename or path} can't be used: {error.strerror or type(error).__name__}")


def sync_folder(folder: Path) -> None:
    """Have the disk take the names in a folder. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _flush(fd: int) -> None:
    # macOS has none.
    getattr(os, "fdatasync", os.fsync)(fd)


def _read(journal: Path) -> dict[str, Any]:
    try:
        with journal.open("rb") as file:
            document = json.loads(file.read(_JOURNAL_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
