"""Where every connection begins: TLS goes to the slow lane at once, all else starts in the fast one."""

from __future__ import annotations

import socket
import ssl

import trio

from llamesh.errors import InvalidRequest
from llamesh.net.transport import SocketTransport
from llamesh.telemetry.logs import get_logger
from llamesh.web.connection import NOISE, Connection
from llamesh.web.gateway import Gateway
from llamesh.web.lane import Lane, Pages, SlowLane
from llamesh.web.tls import Certificate

log = get_logger("http")

_TLS_HANDSHAKE = b"\x16"


class FastLane(Lane):
    """Serves accepted sockets."""

    def __init__(self, gateway: Gateway, pages: Pages, slow_lane: SlowLane) -> None:
        """Raises OSError or ssl.SSLError when TLS is on and its files can't be used."""
        super().__init__(gateway, pages, slow_lane)
        tls = gateway.settings.server_tls
        self.certificate = Certificate(tls) if tls.enabled else None

    async def serve(self, sock: socket.socket) -> None:
        """Serve one accepted connection to its end."""
        if self.certificate is None:
            await Connection(SocketTransport(sock), sock, self).run()
        else:
            await self._serve_tls(sock, self.certificate.context())

    async def _serve_tls(self, sock: socket.socket, context: ssl.SSLContext) -> None:
        """TLS goes to the slow lane; anything else on this port is refused in plain words."""
        data = b""
        try:
            with trio.move_on_after(self.first_byte_seconds):
                data = await SocketTransport(sock).receive()
            if data.startswith(_TLS_HANDSHAKE):
                await self.slow_lane.serve(sock, data, context)
            elif data[:1] == NOISE:
                await self.serve_peer(sock, data)
            elif data:
                await Connection(SocketTransport(sock), sock, self).refuse(
                    InvalidRequest("this port speaks HTTPS; use https://")
                )
        except OSError as lost:
            log.debug("connection lost", error=str(lost))
        finally:
            trio.lowlevel.notify_closing(sock)
            sock.close()
