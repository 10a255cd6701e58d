"""A non-blocking socket with the two verbs of the hot path, and nothing per call that isn't needed.

trio's own SocketStream adds a checkpoint, a conflict guard and a cancel scope to each call;
relayed tokens pay for that each time. Here a call waits only when the kernel says it would
block. Deadlines are not set per call either: whoever owns the connection looks at it from a
sweep (see `net.sweep`) and cancels.

Anything else that moves bytes (an encrypted peer link) offers the same four names, see `Transport`.
"""

from __future__ import annotations

import socket
from typing import Protocol

import trio

# Large enough for a burst of coalesced events, small enough to stay cheap to allocate for each read.
READ_SIZE = 65_536

_wait_readable = trio.lowlevel.wait_readable
_wait_writable = trio.lowlevel.wait_writable


class Transport(Protocol):
    """Ordered bytes both ways. One task may send while another receives."""

    async def receive(self) -> bytes:
        """At least one byte, or b"" at the end of the stream. Raises OSError."""

    async def send(self, data: bytes | memoryview) -> None:
        """All of `data`, waiting while the other side doesn't read. Raises OSError."""

    def close(self) -> None:
        """Close now; idempotent. Tasks that wait on it get `trio.ClosedResourceError`."""

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""


class SocketTransport:
    """`Transport` over a connected stream socket, which it owns.

    Cancellation: `receive` loses no bytes. A cancelled `send` may have sent a part; close then.
    """

    __slots__ = ("closed", "sock")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # Tokens are small writes: Nagle would hold each back for the last one's acknowledgement.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.closed = False

    async def receive(self) -> bytes:
        """See `Transport.receive`.

        Waits first, reads then: between two tokens there is nothing to read, and for a fast
        sender the wait is both the fairness towards other tasks and what lets events coalesce.
        """
        while True:
            await _wait_readable(self.sock)
            try:
                return self.sock.recv(READ_SIZE)
            except BlockingIOError:
                continue

    async def send(self, data: bytes | memoryview) -> None:
        """See `Transport.send`. Doesn't yield while the kernel's buffer has room."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        if sent == len(data):
            return
        rest = memoryview(data)[sent:]
        while rest:
            await _wait_writable(self.sock)
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                continue

    def close(self) -> None:
        """See `Transport.close`."""
        if not self.closed:
            self.closed = True
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()

    def detach(self) -> socket.socket:
        """Give the socket away (to another lane); this object is closed afterwards."""
        self.closed = True
        return self.sock


async def connect(host: str, port: int) -> SocketTransport:
    """A TCP connection to a literal address. Raises OSError; the caller bounds the time."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        # A link-local IPv6 address has a scope behind a %, which only the resolver makes a number of.
        address = (
            socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST)[0][4] if "%" in host else (host, port)
        )
        try:
            sock.connect(address)
        except BlockingIOError:
            await _wait_writable(sock)
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, f"can't connect to {host}:{port}") from None
        return SocketTransport(sock)
    except BaseException:
        trio.lowlevel.notify_closing(sock)
        sock.close()
        raise
