"""A request body that was read whole: in memory while small, in an unlinked file when large.

It is read whole because it may have to be sent twice (an instance dies before it answers) and
because the model's name stands in it. `Budget` bounds what all bodies together hold in memory;
past it even small ones go to disk.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from llamesh.errors import InternalError
from llamesh.telemetry.logs import get_logger

log = get_logger("body")

# Larger bodies spool: those are images, and a copy through the page cache is cheap beside reading them.
SPOOL_ABOVE = 1 << 20

# What all bodies together may hold in memory.
MEMORY_LIMIT = 256 << 20


class Budget:
    """Bytes of bodies that are in memory now."""

    def __init__(self, limit: int = MEMORY_LIMIT) -> None:
        self.limit = limit
        self.used = 0


class Body:
    """Add bytes, then read them as often as needed; `close` when the request ended.

    with Body(budget) as body:
        body.add(data)
        body.view()     # all of it, for decoders
        body.parts()    # all of it, for sending
    """

    __slots__ = ("_budget", "_chunks", "_file", "_map", "length")

    def __init__(self, budget: Budget) -> None:
        self.length = 0
        self._budget = budget
        self._chunks: list[bytes] = []
        self._file: IO[bytes] | None = None
        self._map: mmap.mmap | None = None

    def __enter__(self) -> Body:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, data: bytes) -> None:
        """Append. Raises InternalError when there is no room for it on the disk."""
        if not data:
            return
        self.length += len(data)
        fits = self.length <= SPOOL_ABOVE and self._budget.used + len(data) <= self._budget.limit
        if self._file is None and fits:
            self._chunks.append(data)
            self._budget.used += len(data)
            return
        try:
            if self._file is None:
                self._spool()
            assert self._file is not None  # noqa: S101
            self._file.write(data)
        except OSError as error:
            # Not the client's connection, which OSError means to those who read from it.
            log.error("can't spool a request body", error=str(error))
            raise InternalError("the node has no room for the request body") from error

    def view(self) -> bytes | memoryview:
        """All bytes in one piece. Closed with the body: keep no reference to it."""
        if self._file is None:
            if len(self._chunks) > 1:
                self._chunks = [b"".join(self._chunks)]
            return self._chunks[0] if self._chunks else b""
        if self._map is None:
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        return memoryview(self._map)

    def parts(self) -> Sequence[bytes | memoryview]:
        """All bytes as pieces to send in this order."""
        return (self.view(),) if self.length else ()

    def close(self) -> None:
        """Free memory and file; idempotent."""
        self._free_chunks()
        if self._map is not None:
            # A cancelled send may still hold a view; then the last reference closes the map.
            with contextlib.suppress(BufferError):
                self._map.close()
            self._map = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _spool(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="llamesh-body-")  # noqa: SIM115 - closed in close()
        for chunk in self._chunks:
            self._file.write(chunk)
        self._free_chunks()

    def _free_chunks(self) -> None:
        self._budget.used -= sum(map(len, self._chunks))
        self._chunks = []
