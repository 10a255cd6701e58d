"""The slow lane: Hypercorn, for all that the fast lane doesn't do (HTTP/2, HTTP/1.0, other pages).

This is the one module that knows Hypercorn's inner interface (0.18): `TCPServer` serves a stream
that somebody else accepted, and turns to HTTP/2 by itself on the preface.
"""

from __future__ import annotations

import socket
import ssl
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext

from llamesh.config.settings import Settings
from llamesh.telemetry.logs import get_logger

log = get_logger("http")

# Hypercorn shields its sends without bound; a client that takes nothing for this long is gone.
_SEND_SECONDS = 60.0
_PIECE = 65_536

_H2_STREAMS = 256


class ReplayStream(trio.abc.Stream):
    """An accepted socket, with the bytes that were read from it before put back in front."""

    def __init__(self, sock: socket.socket, read_before: bytes) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._before = read_before
        self.socket = self._stream.socket  # Hypercorn asks it for both addresses

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What was read before, then what comes."""
        if self._before:
            end = max_bytes or len(self._before)
            data, self._before = self._before[:end], self._before[end:]
            return data
        return bytes(await self._stream.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send, failing when the client takes nothing for a minute."""
        view = memoryview(data)
        for at in range(0, len(view), _PIECE):
            try:
                with trio.fail_after(_SEND_SECONDS):
                    await self._stream.send_all(view[at : at + _PIECE])
            except trio.TooSlowError:
                await trio.aclose_forcefully(self._stream)
                raise trio.BrokenResourceError("the client doesn't read") from None

    async def send_eof(self) -> None:
        """Close the sending half."""
        await self._stream.send_eof()

    async def wait_send_all_might_not_block(self) -> None:
        """See trio."""
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        """Close both halves."""
        await self._stream.aclose()

    def cut(self) -> None:
        """Break the connection, both ways, so that Hypercorn sees its end and the client an error."""
        try:
            self._stream.socket.shutdown(socket.SHUT_RDWR)
        except OSError as error:
            log.debug("connection lost", error=str(error))


class HypercornLane:
    """Serves connections through an ASGI application."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app = ASGIWrapper(app)
        self._context = WorkerContext(None)
        config = Config()
        config.include_server_header = False
        config.keep_alive_timeout = float(settings.http.idle_timeout_seconds)
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
            await TCPServer(self._app, self._config, self._context, state, served)
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as group:
            log.debug("connection lost", error=str(group.exceptions[0]))
        finally:
            await trio.aclose_forcefully(stream)
