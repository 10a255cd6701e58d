"""A response as HTTP/1.1 on a connection: the `Sink` of the fast lane."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import trio

from llamesh.net.exchange import Headers
from llamesh.net.transport import Transport
from llamesh.web.headers import response_head
from llamesh.web.lane import Lane

_BODILESS = (204, 304)


class HttpSink(ABC):
    """The response to the present request of a connection. `deadline`: see `net.sweep`."""

    __slots__ = (
        "_chunked", "_cors", "_keep_alive", "_lane", "_pending", "_transport", "deadline", "started",
    )  # fmt: skip

    def __init__(self, transport: Transport, lane: Lane) -> None:
        self._transport = transport
        self._lane = lane
        self._keep_alive = True
        self._pending = b""
        self._chunked = False
        self._cors: Headers = []  # what answers say about the request's origin
        self.started = False
        self.deadline = math.inf

    def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """See `Sink.start`."""
        self.started = True
        if self._cors:
            headers = [*headers, *self._cors]
        has_body = status not in _BODILESS
        self._chunked = length is None and has_body
        self._pending = response_head(
            status, headers, length=length, keep_alive=self._keep_alive, has_body=has_body
        )

    async def write(self, data: bytes) -> None:
        """See `Sink.write`."""
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        await self._send(data)

    async def flush(self) -> None:
        """See `Sink.flush`."""
        if self._pending:
            await self._send(b"")

    async def finish(self, data: bytes = b"") -> None:
        """See `Sink.finish`."""
        if self._chunked:
            data = b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n"
        await self._send(data)

    def abort(self) -> None:
        """See `Sink.abort`. No final chunk was sent, so the client can't take this for an end."""
        self._keep_alive = False
        if not self._transport.closed:
            self._unwatch()
            self._transport.close()

    async def _send(self, data: bytes) -> None:
        if self._pending:
            data, self._pending = self._pending + data, b""
        # A client that reads nothing for this long is gone.
        self.deadline = trio.current_time() + self._lane.idle_seconds
        await self._transport.send(data)
        self.deadline = math.inf

    @abstractmethod
    def _unwatch(self) -> None:
        """Before the transport is closed; the connection knows who watches it."""
