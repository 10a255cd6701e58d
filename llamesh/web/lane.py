"""What all connections of the fast lane share, and the lane that they are handed over to."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from llamesh.net.exchange import Headers
from llamesh.net.hangup import HangupWatch
from llamesh.net.sweep import Sweep
from llamesh.telemetry.logs import get_logger
from llamesh.web.cors import Cors
from llamesh.web.gateway import Gateway

log = get_logger("http")


class SlowLane(Protocol):
    """Takes a connection over, bytes already read included, and closes it in the end."""

    async def serve(
        self, sock: socket.socket, read_before: bytes, tls: ssl.SSLContext | None = None
    ) -> None: ...


async def refuse_peer(sock: socket.socket, read_before: bytes) -> None:
    """A peer's connection where there is no mesh, or where peers are answered on another port."""
    log.debug("a peer's connection was refused: this port serves no peers")
    trio.lowlevel.notify_closing(sock)
    sock.close()


# A GET of this lane: (path, headers) -> status, headers, body; None when it isn't one.
Pages = Callable[[bytes, Headers], tuple[int, Headers, bytes] | None]


class Lane:
    """What all connections share. `serve_peer` takes over a connection that begins as a peer's, with the
    bytes already read, and closes it in the end; the mesh sets it.
    """

    def __init__(self, gateway: Gateway, pages: Pages, slow_lane: SlowLane) -> None:
        self.gateway = gateway
        self.pages = pages
        self.slow_lane = slow_lane
        self.sweep = Sweep()
        self.hangups = HangupWatch()
        http = gateway.settings.http
        self.first_byte_seconds = http.protocol_detect_timeout_ms / 1000
        self.idle_seconds = float(http.idle_timeout_seconds)
        self.read_seconds = http.body_read_timeout_ms / 1000
        self.body_limit = http.request_body_limit_bytes
        self.cors = Cors.of(http.cors_allowed_origins)
        self.serve_peer: Callable[[socket.socket, bytes], Awaitable[None]] = refuse_peer
        self.closing = False  # answer what is there, keep no connection alive
