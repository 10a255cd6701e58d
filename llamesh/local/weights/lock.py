"""One download of a file at a time, over all programs on this machine and all that share its disk.

The lock is `flock` on the very file that huggingface-hub locks for the same blob, so its own tools are kept
out as well. It ends with whoever holds it, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

from llamesh.local.weights.part import trouble


class FileLock:
    """A lock that isn't held yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def try_lock(self) -> bool:
        """Take it, if nobody else has it. Blocks for as long as the disk does. Raises WeightsError."""
        if self._fd >= 0:
            return True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise trouble(error, self._path) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise trouble(error, self._path) from None
        self._fd = fd
        return True

    def release(self) -> None:
        """Idempotent. The file stays: whoever waits has it open."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
