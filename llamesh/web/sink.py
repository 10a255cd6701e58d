"""Where an answer goes: the one interface between the relay and the lanes.

    sink.start(200, headers, length=None)     # not sent alone, but with what follows
    await sink.write(b"...")                  # any number of times
    await sink.finish(b"...")                 # the last piece and the end, in one write
    sink.abort()                              # or: cut, so that the client sees an error

`started` says whether a head was given; after that, errors can't be told by a status any more.
"""

from __future__ import annotations

from typing import Protocol

from llamesh.errors import LlameshError
from llamesh.net.exchange import Headers


class Sink(Protocol):
    """One response. OSError from `write`, `flush` and `finish` means that the client is gone."""

    started: bool

    def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """The head. `length`: of the body in bytes, None when it isn't known yet."""

    async def write(self, data: bytes) -> None:
        """A piece of the body (not b""), with the head when that is still waiting."""

    async def flush(self) -> None:
        """Send the head now, if it is still waiting."""

    async def finish(self, data: bytes = b"") -> None:
        """The last piece, which may be b"", and the end of the body."""

    def abort(self) -> None:
        """Close the connection without an end of the body. Idempotent."""

    def cancel(self, error: LlameshError) -> None:
        """End the request from outside: the client gets the error, or sees its answer cut."""
