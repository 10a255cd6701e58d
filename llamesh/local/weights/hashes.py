"""SHA-256 of files on this disk: worked out when asked for, remembered while the file stays the same."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

from llamesh.local.weights.digest import PlainDigest

_PIECE = 1 << 20
_MOST = 4096
_BYTES = 4 << 20


class Hashes:
    """What is known of each path, kept in a file that several programs may share. Safe for threads.

    A file is the same as long as its size, time of change (ns) and inode are. All calls block.
    """

    def __init__(self, path: Path) -> None:
        """`path`: where it is kept. It needn't be there; what can't be read is as good as empty."""
        self._path = path
        self._lock = threading.Lock()

    def known(self, file: str) -> str | None:
        """The hash of a file, if it was worked out for it as it is now."""
        stamp = _stamp(file)
        return self._read().get(file, {}).get(stamp) if stamp is not None else None

    def of(self, file: str, *, going_on: Callable[[int], bool] = lambda done: True) -> str | None:
        """The hash of a file. `going_on(bytes)` is called on the way; None when it says False, or when the
        file changed meanwhile. Raises OSError.
        """
        if (known := self.known(file)) is not None:
            return known
        before, digest, buffer = _stamp(file), PlainDigest(), memoryview(bytearray(_PIECE))
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                if not going_on(digest.size):
                    return None
        after = _stamp(file)
        if before is None or before != after:
            return None
        self._note(file, before, digest.hexdigest())
        return digest.hexdigest()

    def _note(self, file: str, stamp: str, sha256: str) -> None:
        with self._lock:
            entries = self._read()
            entries.pop(file, None)
            entries[file] = {stamp: sha256}  # last in, last out
            for old in list(entries)[: max(0, len(entries) - _MOST)]:
                del entries[old]
            temporary = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
            # A hash that isn't remembered is worked out again.
            with contextlib.suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(entries))
                os.replace(temporary, self._path)

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            with self._path.open("rb") as stream:
                document = json.loads(stream.read(_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(document, dict):
            return {}
        return {file: entry for file, entry in document.items() if isinstance(entry, dict)}


def _stamp(file: str) -> str | None:
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}"
