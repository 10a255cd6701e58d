"""The slow lane: Hypercorn, for all that the fast lane doesn't do (HTTP/2, HTTP/1.0, other pages).

This is the one module that knows Hypercorn's inner interface (0.18): `TCPServer` serves a stream
that somebody else accepted, and turns to HTTP/2 by itself on the preface.
"""

from __future__ import annotations

import math
import socket
import ssl
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import hypercorn.protocol.h2
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, StreamBuffer
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from priority.priority import PriorityError

from llamesh.config.settings import Settings
from llamesh.net.heads import MAX_REQUEST_HEAD
from llamesh.telemetry.logs import get_logger

log = get_logger("http")

# Hypercorn shields its sends without bound; a client that takes nothing for this long is gone.
_SEND_SECONDS = 60.0
_PIECE = 65_536

_H2_STREAMS = 256

# What is left to do on a closed connection gets this long.
_END_SECONDS = 1.0

# What Hypercorn stumbles over when a client resets or prioritises streams that it has forgotten, or
# asks for a path that isn't ASCII. Each ends the connection that it came from, and nothing else.
_HYPERCORN_BREAKS = (KeyError, UnicodeDecodeError, PriorityError)

# struct linger: on, for 0 seconds.
_RESET_AT_CLOSE = struct.pack("ii", 1, 0)


class _BoundedBuffer(StreamBuffer):
    """What an HTTP/2 stream has yet to send, with back-pressure.

    Hypercorn's own lets the application go on whenever little could be sent, which is the very time
    when it must wait: a client that stops reading would have a whole answer buffered.
    """

    async def push(self, data: bytes) -> None:
        """Append, then wait while there is too much."""
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        while len(self.buffer) >= BUFFER_HIGH_WATER and not self._complete:
            await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        """Take up to `max_length` bytes."""
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


hypercorn.protocol.h2.StreamBuffer = _BoundedBuffer  # type: ignore[misc]


class ReplayStream(trio.abc.Stream):
    """An accepted socket, with the bytes that were read from it before put back in front."""

    def __init__(self, sock: socket.socket, read_before: bytes) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._before = read_before
        self.active = 0  # requests that are being answered on it
        self._idle_since = trio.current_time()
        self._ended = trio.Event()
        self.socket = self._stream.socket  # Hypercorn asks it for both addresses

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What was read before, then what comes."""
        if self._before:
            end = max_bytes or len(self._before)
            data, self._before = self._before[:end], self._before[end:]
            return data
        data = b""
        try:
            data = bytes(await self._stream.receive_some(max_bytes))
        finally:
            if not data:
                self._ended.set()
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, failing when the client takes nothing for a minute."""
        view = memoryview(data)
        for at in range(0, len(view), _PIECE):
            try:
                with trio.fail_after(_SEND_SECONDS):
                    await self._stream.send_all(view[at : at + _PIECE])
            except trio.TooSlowError:
                self.cut()
                raise trio.BrokenResourceError("the client doesn't read") from None
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.cut()  # Hypercorn may not notice while it doesn't read
                raise

    async def send_eof(self) -> None:
        """Close the sending half."""
        await self._stream.send_eof()

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close both halves."""
        self._ended.set()
        await self._stream.aclose()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Around each request: between them the connection is idle."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1
            self._idle_since = trio.current_time()

    async def end_when_idle(self, limit: float) -> None:
        """Close after `limit` seconds without a request; return when it ended, for any reason."""
        while not self._ended.is_set():
            if not self.active and trio.current_time() >= self._idle_since + limit:
                await trio.aclose_forcefully(self)
                return
            with trio.move_on_after(limit / 4):
                await self._ended.wait()

    def cut(self) -> None:
        """Break the connection, so that Hypercorn sees its end and the client an error.

        With a reset: to an HTTP/1.0 client a plain end of the connection is the end of the answer.
        """
        try:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_CLOSE)
        except OSError as error:
            log.debug("connection lost", error=str(error))
        self.socket.close()
        self._ended.set()


class HypercornLane:
    """Serves connections through an ASGI application."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app = ASGIWrapper(app)
        self._context = WorkerContext(None)
        config = Config()
        config.include_server_header = False
        # Hypercorn forgets its own timer when it turns to HTTP/2.
        config.keep_alive_timeout = math.inf
        self._idle_seconds = float(settings.http.idle_timeout_seconds)
        # Heads are as large as in the fast lane: the same request must not depend on its lane.
        config.h11_max_incomplete_size = config.h2_max_header_list_size = MAX_REQUEST_HEAD
        config.ssl_handshake_timeout = settings.http.protocol_detect_timeout_ms / 1000
        config.read_timeout = None  # an idle h2 connection with streams is silent for long
        config.h2_max_concurrent_streams = _H2_STREAMS
        config.websocket_max_message_size = 1 << 20
        config.accesslog = None
        config.errorlog = None
        self._config = config

    async def serve(self, sock: socket.socket, read_before: bytes, tls: ssl.SSLContext | None = None) -> None:
        """One connection to its end, bytes that were read before included. Owns the socket.

        The application finds the stream as `scope["state"]["connection"]`, to cut it when an
        answer breaks off: Hypercorn has no reset for one HTTP/2 stream, and a clean end would lie.
        """
        stream = ReplayStream(sock, read_before)
        state = {"connection": stream}
        served: Any = stream
        if tls is not None:
            served = trio.SSLStream(stream, tls, server_side=True, https_compatible=True)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._end, stream, nursery.cancel_scope)
                await TCPServer(self._app, self._config, self._context, state, served)
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as group:
            log.debug("connection lost", error=str(group.exceptions[0]))
        except* _HYPERCORN_BREAKS as group:
            log.info("bad request", error=f"HTTP/2 frames out of order: {group.exceptions[0]!r}")
        finally:
            await trio.aclose_forcefully(stream)

    async def _end(self, stream: ReplayStream, scope: trio.CancelScope) -> None:
        # Hypercorn may wait for ever on a connection that is closed: for a pipelined request's turn,
        # for frames that its sending task won't send any more, for its own timer.
        await stream.end_when_idle(self._idle_seconds)
        if stream.active:
            await trio.sleep(_END_SECONDS)
        scope.cancel()
