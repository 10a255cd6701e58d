"""A transport in memory: scripted pieces in, everything that was sent kept."""

from __future__ import annotations

from collections.abc import Iterable


class ScriptedTransport:
    """Receives `pieces` one by one, then the end of the stream; an OSError among them is raised."""

    def __init__(self, pieces: Iterable[bytes | OSError] = (), *, refuses: OSError | None = None) -> None:
        self.sent = b""
        self.closed = False
        self._pieces = iter(pieces)
        self._refuses = refuses

    async def receive(self) -> bytes:
        piece = next(self._pieces, b"")
        if isinstance(piece, OSError):
            raise piece
        return piece

    async def send(self, data: bytes | memoryview) -> None:
        if self._refuses is not None:
            raise self._refuses
        self.sent += data

    def close(self) -> None:
        self.closed = True
