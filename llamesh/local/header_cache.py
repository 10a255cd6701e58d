"""Headers of GGUF files, read once as long as the files don't change."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TypeAlias

from llamesh.local.gguf import GgufHeader, read_header

__all__ = ["HeaderCache"]

# Size, modification time (ns) and inode of each file.
_Stamp: TypeAlias = tuple[tuple[int, int, int], ...]


class HeaderCache:
    """Headers of files that haven't changed since they were read, least recently used out first.

    `read` blocks like `read_header` and may be called in several threads at once: no lock is held while a
    file is touched, so one on a mount that hangs holds up nobody but its own callers. Failures aren't kept,
    since a missing part may arrive.
    """

    def __init__(self, limit: int = 64) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[GgufHeader, _Stamp]] = OrderedDict()

    def read(self, path: str | os.PathLike[str]) -> GgufHeader:
        """`read_header(path)`, from memory while size, time and inode of all its parts are the same."""
        name = os.fspath(path)
        with self._lock:
            known = self._known.get(name)
        if known is not None and _stamp(known[0].files) == known[1]:
            with self._lock:
                if name in self._known:
                    self._known.move_to_end(name)
            return known[0]
        before = _stamp((name,))
        header = read_header(name)
        after = _stamp(header.files)
        with self._lock:
            self._known.pop(name, None)
            # What was replaced while it was read is told to this caller, and read anew for the next.
            if before is not None and after is not None and after[:1] == before:
                self._known[name] = (header, after)
            while len(self._known) > self._limit:
                self._known.popitem(last=False)
        return header


def _stamp(files: tuple[str, ...]) -> _Stamp | None:
    stamps = []
    for file in files:
        try:
            status = os.stat(file)
        except (OSError, ValueError):
            return None
        stamps.append((status.st_size, status.st_mtime_ns, status.st_ino))
    return tuple(stamps)
