"""The client side of HTTP/1.1: one kept-alive connection to a llama-server (or to a peer).

    connection = UpstreamConnection(await connect(host, port))
    await connection.send(head, body)          # one request
    while not connection.response.complete:
        await connection.read()                # one read from the socket, at least one
        response.status, response.headers, response.take()   # what came with it

Rules
- One request at a time; nothing is pipelined.
- Body bytes are handed on decoded (the chunk framing is this hop's own), in the order they came
  and never held back: a read's worth of events becomes one write on the other side.
- A connection may be used again only after `complete` and `reusable`.
- Everything that isn't a well-formed response is `UpstreamBroken`; there is no best effort.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import httptools
import trio

from llamesh.net.transport import Transport

# A head larger than this isn't one (llama-server's are 300 bytes; peers add a few headers).
MAX_HEAD = 65_536

Headers = list[tuple[bytes, bytes]]

# The connection broke, or its owner closed it because the whole upstream is gone.
_LOST = (OSError, trio.ClosedResourceError)


class UpstreamBroken(Exception):
    """The connection failed or carried something that is no HTTP response.

    `started` tells whether any byte of a response had come: before that, and on a connection
    that had been used before, the request may be sent again on a fresh one.
    """

    def __init__(self, message: str, *, started: bool) -> None:
        super().__init__(message)
        self.started = started


class _Response:
    """What came of the response so far. Filled by httptools, read by the relay."""

    __slots__ = (
        "_chunked",
        "_parser",
        "_parts",
        "complete",
        "has_head",
        "headers",
        "keep_alive",
        "length",
        "on_body",
        "on_interim",
        "overrun",
        "received",
        "status",
    )

    def __init__(self, on_interim: Callable[[int, Headers], None] | None) -> None:
        self.status = 0
        self.headers: Headers = []
        self.has_head = False
        self.length: int | None = None
        self.complete = False
        self.keep_alive = False
        self.overrun = False
        self.received = 0  # bytes of the present head, until it is complete; 0 = nothing came at all
        self.on_interim = on_interim
        self._chunked = False
        self._parts: list[bytes] = []
        # A bound C method: each chunk costs one call into list.append and no Python frame.
        self.on_body = self._parts.append
        self._parser = httptools.HttpResponseParser(self)

    # httptools' callbacks, in the order in which it makes them.

    def on_message_begin(self) -> None:
        if self.complete:
            self.overrun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status < 200:
            return
        self.status = status
        self.has_head = True
        for name, value in self.headers:
            if name == b"content-length":
                self.length = int(value)
            elif name == b"transfer-encoding":
                self._chunked = True

    def on_message_complete(self) -> None:
        if not self.has_head:  # 1xx: more to come
            if self.on_interim is not None:
                self.on_interim(self._parser.get_status_code(), self.headers)
            self.headers = []
            self.received = 1  # something came, but the limit is for one head, not for many interim ones
            return
        self.keep_alive = self._parser.should_keep_alive()  # valid only here
        self.complete = True

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def take(self) -> bytes:
        """The body bytes that came since the last call, b"" when none did."""
        parts = self._parts
        if not parts:
            return b""
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        return data

    @property
    def ends_with_connection(self) -> bool:
        """Whether only the end of the connection ends this body."""
        return self.has_head and self.length is None and not self._chunked


# llama-server: `Keep-Alive: timeout=5, max=100`, where max is the number of requests it still takes.
_KEEP_ALIVE = re.compile(rb"(timeout|max)\s*=\s*(\d+)")

# Used where the server names no limit of its own: long enough to help, short enough to be right.
_DEFAULT_IDLE_SECONDS = 4.0


class UpstreamConnection:
    """One connection to an upstream, used for one request after the other.

    Attributes: `served`: responses completed on it; `response`: the present one (after `send`);
    `idle_limit`: seconds that it may stay unused before the other side closes it, less a margin.
    """

    __slots__ = ("_transport", "idle_limit", "idle_since", "on_interim", "response", "served")

    def __init__(self, transport: Transport, *, parked: bool = False) -> None:
        """`parked`: it was open for a while, so its first request may find it closed, as a later one may."""
        self._transport = transport
        self.served = int(parked)
        self.idle_since = 0.0
        self.idle_limit = _DEFAULT_IDLE_SECONDS
        self.on_interim: Callable[[int, Headers], None] | None = None
        self.response = _Response(None)

    async def send(self, head: bytes, body: Sequence[bytes | memoryview] = ()) -> None:
        """Send one request. A failure here may mean that an answer came early: call `read` then.

        Raises UpstreamBroken when the connection is gone and no answer is there.
        """
        self.response = _Response(self.on_interim)
        try:
            if len(body) == 1 and len(body[0]) < 65_536:
                await self._transport.send(head + body[0])  # one segment, one wake-up over there
                return
            await self._transport.send(head)
            for part in body:
                await self._transport.send(part)
        except _LOST as error:
            raise UpstreamBroken(f"connection lost while sending: {error}", started=False) from error

    async def read(self) -> None:
        """Wait for the next bytes of the response and take them in. Raises UpstreamBroken."""
        response = self.response
        started = response.received > 0
        try:
            data = await self._transport.receive()
        except _LOST as error:
            raise UpstreamBroken(f"connection lost: {error}", started=started) from error
        if not data:
            if response.ends_with_connection:
                response.complete = True
                return
            what = "in the middle of a response" if started else "before any response"
            raise UpstreamBroken(f"connection closed {what}", started=started)
        if not response.has_head:
            response.received += len(data)
        try:
            response.feed(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            raise UpstreamBroken(f"not an HTTP response: {error}", started=True) from error
        if response.overrun:
            raise UpstreamBroken("bytes after the end of the response", started=True)
        if not response.has_head and response.received > MAX_HEAD:
            raise UpstreamBroken("response head too large", started=True)
        if response.complete:
            self.served += 1

    @property
    def reusable(self) -> bool:
        """Whether another request may follow, as far as this side can know.

        Also learns `idle_limit` from the response's `Keep-Alive` header.
        """
        response = self.response
        if not (response.complete and response.keep_alive) or self._transport.closed:
            return False
        for name, value in response.headers:
            if name == b"keep-alive":
                for what, number in _KEEP_ALIVE.findall(value):
                    if what == b"timeout":
                        self.idle_limit = max(0.0, int(number) - 1.0)
                    elif int(number) <= 1:  # its last one: the next request would find it closed
                        return False
        return True

    def close(self) -> None:
        """Close at once; the upstream takes that as a cancellation."""
        self._transport.close()
