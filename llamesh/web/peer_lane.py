"""Peers' connections: the handshake, then requests as from anybody else."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable

import trio

from llamesh.mesh.mesh import Mesh
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.telemetry.logs import get_logger
from llamesh.web.connection import NOISE
from llamesh.web.lane import Lane
from llamesh.web.peer_connection import PeerConnection
from llamesh.web.peer_files import PeerFiles

log = get_logger("mesh")

# Handshakes that may be under way at once. Each costs a millisecond and some kilobytes, for five seconds at
# the most; who comes beyond that waits, which is what an attacker may do, too.
_MOST_HANDSHAKES = 64

# A connection without a request is closed this much later than its dialler would stop using it.
_LONGER = 60.0

# (who asks, path, JSON) -> status and JSON
Administer = Callable[[str, str, bytes], Awaitable[tuple[int, bytes] | None]]


class PeerLane:
    """Serves connections of peers, whoever dialled."""

    def __init__(
        self, lane: Lane, mesh: Mesh, administer: Administer, files: PeerFiles | None = None
    ) -> None:
        self.files = files
        self._lane = lane
        self._mesh = mesh
        self._administer = administer
        self._handshakes = trio.CapacityLimiter(_MOST_HANDSHAKES)
        ttl = lane.gateway.settings.cluster.noise.session_ttl_seconds
        self._idle_seconds = float(ttl) + _LONGER

    async def serve(self, sock: socket.socket, read_before: bytes = b"") -> None:
        """An accepted connection that begins as Noise, to its end."""
        try:
            async with self._handshakes:
                stream = await self._mesh.accept(sock, read_before)  # closes it when that fails
        except BaseException:
            _close(sock)
            raise
        if stream is not None:
            await self._requests(stream)

    async def serve_alone(self, sock: socket.socket) -> None:
        """An accepted connection on a port that is for peers only."""
        first = b""
        try:
            sock.setblocking(False)
            with trio.fail_after(self._lane.first_byte_seconds):
                await trio.lowlevel.wait_readable(sock)
            first = sock.recv(1, socket.MSG_PEEK)
        except (OSError, trio.TooSlowError) as error:
            log.debug("connection lost", error=str(error))
        finally:
            if first != NOISE:
                _close(sock)
        if first == NOISE:
            await self.serve(sock)

    async def serve_parked(self, stream: NoiseTransport, on_request: Callable[[], None]) -> None:
        """A connection that we dialled for the peer to send requests on."""
        try:
            await self._requests(stream, on_request)
        except Exception:
            log.exception("connection ended by a defect")
            stream.close()

    async def _requests(self, stream: NoiseTransport, on_request: Callable[[], None] | None = None) -> None:
        connection = PeerConnection(
            stream,
            self._lane,
            stream.remote.node_id,
            self._answer,
            idle_seconds=self._idle_seconds,
            on_request=on_request,
            files=self.files,
        )
        await connection.run()

    async def _answer(self, peer: str, method: bytes, path: bytes, body: bytes) -> tuple[int, bytes] | None:
        answer = await self._mesh.answer(peer, method, path, body)
        if answer is None and method == b"POST":
            return await self._administer(peer, path.decode("latin-1"), body)
        return answer


def _close(sock: socket.socket) -> None:
    if sock.fileno() >= 0:
        trio.lowlevel.notify_closing(sock)
        sock.close()
