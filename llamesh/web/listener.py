"""One port for everything: accept, and start each connection in the fast lane."""

from __future__ import annotations

import errno
import socket
from collections.abc import Awaitable, Callable, Sequence

import trio

from llamesh.telemetry.logs import get_logger
from llamesh.web.fast_lane import FastLane

log = get_logger("listener")

_BACKLOG = 1024

# Out of descriptors or memory: let some connections end before accepting more.
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_EXHAUSTED_PAUSE = 0.1

# Connections taken per wake-up, so that a burst of connects doesn't hold up those that work.
_BURST = 32


def bind(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for a host name or address; port 0 means any, the same on all. Raises OSError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if port == 0 and len(sockets) > 1:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            sock.bind(address)
            sock.listen(_BACKLOG)
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


class Listener:
    """Owns the listening sockets and the tasks of all client connections.

    `peers`: sockets on which only peers are answered, each connection by `serve_peer`.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        lane: FastLane,
        peers: Sequence[socket.socket] = (),
        serve_peer: Callable[[socket.socket], Awaitable[None]] | None = None,
    ) -> None:
        self._serving: dict[socket.socket, Callable[[socket.socket], Awaitable[None]]] = {
            **dict.fromkeys(sockets, lane.serve),
            **(dict.fromkeys(peers, serve_peer) if serve_peer is not None else {}),
        }
        self._lane = lane
        self._accepting = trio.CancelScope()

    async def run(self) -> None:
        """Accept and serve, until cancelled. After `stop_accepting`, only serve."""
        lane = self._lane
        try:
            async with trio.open_nursery() as background:
                background.start_soon(lane.sweep.run)
                background.start_soon(lane.hangups.run)
                async with trio.open_nursery() as connections:
                    with self._accepting:
                        async with trio.open_nursery() as acceptors:
                            for sock, serve in self._serving.items():
                                acceptors.start_soon(self._accept, sock, serve, connections)
                    self._close_sockets()
                background.cancel_scope.cancel()
        finally:
            self._close_sockets()
            lane.hangups.close()

    def stop_accepting(self) -> None:
        """Close the listening sockets; connections that are open go on."""
        self._accepting.cancel()

    def _close_sockets(self) -> None:
        for sock in self._serving:
            if sock.fileno() >= 0:
                trio.lowlevel.notify_closing(sock)
                sock.close()

    async def _accept(
        self,
        listening: socket.socket,
        serve: Callable[[socket.socket], Awaitable[None]],
        connections: trio.Nursery,
    ) -> None:
        while True:
            await trio.lowlevel.wait_readable(listening)
            for _ in range(_BURST):
                try:
                    sock, _address = listening.accept()
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno in _EXHAUSTED:
                        log.error("can't accept connections", error=str(error))
                        await trio.sleep(_EXHAUSTED_PAUSE)
                    else:
                        log.debug("connection lost before it was accepted", error=str(error))
                    break
                connections.start_soon(self._serve, sock, serve)

    @staticmethod
    async def _serve(sock: socket.socket, serve: Callable[[socket.socket], Awaitable[None]]) -> None:
        # The one broad `except` of the connection border: a defect ends this connection, not the node.
        try:
            await serve(sock)
        except Exception:
            log.exception("connection ended by a defect")
            sock.close()
