"""A log file that starts anew each day (UTC) and at some size, and keeps old ones by number or by age.

`proxy.log` is always the one being written. An old one is called
`proxy.log.20261121T235959.000`, with `.gz` behind it once it is compressed: the names sort by
age. Compression runs in a thread of its own, and one that was interrupted is made up for when
the file is next opened.

One process writes one file. An operator may move or delete it at any time: it is opened again.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROTATE_AT_BYTES = 64 * 1024 * 1024
_DAY = 86_400


class RotatingFile:
    """Appends to `directory/filename`; used by one thread at a time.

    `keep` old files stay, the current one not counted (None: all), and none that was put away more than
    `keep_days` ago (0: however old). `mode`: who may read it. `clock` gives seconds since the epoch.
    Opening, writing and rotating raise OSError when the disk says no; of a write that failed nothing stays.
    """

    def __init__(
        self,
        directory: Path,
        filename: str,
        *,
        keep: int | None,
        compress: bool,
        rotate_at: int = ROTATE_AT_BYTES,
        keep_days: int = 0,
        mode: int = 0o640,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = directory / filename
        self._keep = keep
        self._keep_days = keep_days
        self._mode = mode
        self._compress = compress
        self._rotate_at = rotate_at
        self._clock = clock
        self._tidier: threading.Thread | None = None
        self._fd = -1
        self._size = 0
        self._shape = re.compile(re.escape(filename) + r"\.(\d{8}T\d{6})\.(\d{3,})(\.gz)?")
        self._newest_old: Path | None = None
        directory.mkdir(parents=True, exist_ok=True)
        self._open()
        self._start_tidying()

    def write(self, data: bytes) -> None:
        """Appends whole lines, into a new file when they would make this one too old or too large."""
        self._follow_the_path()
        too_large = self._size > 0 and self._size + len(data) > self._rotate_at
        if too_large or self._is_of_another_day():
            self._rotate()
        view, before = memoryview(data), self._size
        try:
            while view:
                written = os.write(self._fd, view)
                self._size += written
                view = view[written:]
        except OSError:
            self._take_back(before)
            raise

    def sync(self) -> None:
        """Has what was written reach the disk itself."""
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)

    def turn(self) -> None:
        """What a new day brings, when nothing is written: the file is put away, too old ones are deleted."""
        self._follow_the_path()
        if self._is_of_another_day():
            self._rotate()
        else:
            self._start_tidying()

    def close(self, timeout: float = 1.0) -> None:
        """Closes the file and gives a running compression `timeout` seconds to end."""
        self._shut()
        if self._tidier is not None:
            self._tidier.join(timeout)

    def _is_of_another_day(self) -> bool:
        return self._size > 0 and int(self._clock()) // _DAY != self._day

    def _take_back(self, size: int) -> None:
        """Half a line would spoil the next one. Not, where somebody else writes this file, too."""
        with contextlib.suppress(OSError):
            if self._size > size and os.fstat(self._fd).st_size == self._size:
                os.ftruncate(self._fd, size)
        self._size = size

    def _shut(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _open(self) -> None:
        # Not for others to read: a log tells who asked which model, and when.
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, self._mode)
        found = os.fstat(self._fd)
        if not self._mode & 0o077 and found.st_mode & 0o077:
            with contextlib.suppress(OSError):  # somebody else's file
                os.fchmod(self._fd, self._mode)
        self._identity = (found.st_dev, found.st_ino)
        self._size = found.st_size
        # A file that an earlier run left belongs to the day on which it was last written.
        self._day = int(found.st_mtime if found.st_size else self._clock()) // _DAY
        if (
            stat.S_ISREG(found.st_mode)
            and found.st_size
            and os.pread(self._fd, 1, found.st_size - 1) != b"\n"
        ):
            # A power cut in the middle of a line, or of a full disk's.
            with contextlib.suppress(OSError):
                self._size += os.write(self._fd, b"\n")

    def _follow_the_path(self) -> None:
        try:
            found = os.stat(self.path)
            if self._fd >= 0 and (found.st_dev, found.st_ino) == self._identity:
                return
        except FileNotFoundError:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._shut()
        self._open()

    def _rotate(self) -> None:
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._clock()))
        # Above all numbers of this second, not the first free one: that of a deleted file would sort too low.
        taken = [*self.old_files(), self._newest_old] if self._newest_old else self.old_files()
        names = [found for path in taken if (found := self._shape.fullmatch(path.name))]
        numbers = [int(found[2]) for found in names if found[1] == stamp]
        old = self.path.with_name(f"{self.path.name}.{stamp}.{max(numbers, default=-1) + 1:03d}")
        self._newest_old = old
        self._shut()
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, old)
        self._open()
        self._day = int(self._clock()) // _DAY
        self._start_tidying()

    def _start_tidying(self) -> None:
        if self._tidier is not None and self._tidier.is_alive():
            return  # it looks again before it ends, or the next rotation does
        self._tidier = threading.Thread(target=self._tidy, name="log-compressor", daemon=True)
        self._tidier.start()

    def _tidy(self) -> None:
        """Compresses and deletes until all is done. A full disk ends it until the next rotation."""
        with contextlib.suppress(OSError):
            for leftover in self.path.parent.glob(f"{self.path.name}.*.gz.part"):
                leftover.unlink(missing_ok=True)
            while True:
                for surplus in self._surplus():
                    surplus.unlink(missing_ok=True)
                plain = [path for path in self.old_files() if path.suffix != ".gz"]
                if not plain or not self._compress:
                    return
                self._pack(plain[0])

    def _surplus(self) -> list[Path]:
        old = self.old_files()
        few = old[: max(0, len(old) - self._keep)] if self._keep is not None else []
        if not self._keep_days:
            return few
        oldest = time.strftime("%Y%m%dT%H%M%S", time.gmtime(self._clock() - self._keep_days * _DAY))
        at = len(self.path.name) + 1
        return [*few, *(path for path in old[len(few) :] if path.name[at : at + len(oldest)] < oldest)]

    def _pack(self, path: Path) -> None:
        packed = Path(f"{path}.gz")
        part = Path(f"{packed}.part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, self._mode)
        with path.open("rb") as source, os.fdopen(fd, "wb") as out, gzip.open(out, "wb", 6) as target:
            shutil.copyfileobj(source, target, 256 * 1024)
        os.replace(part, packed)
        path.unlink(missing_ok=True)

    def old_files(self) -> list[Path]:
        """The files kept from before, oldest first."""
        return sorted(path for path in self.path.parent.iterdir() if self._shape.fullmatch(path.name))
