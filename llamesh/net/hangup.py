"""Notice that a client left, without a task or a system call per request.

While a request is relayed nobody reads the client's socket, so its leaving would show only at
the next write. All client sockets are registered, once per connection, with a second epoll
instance, edge triggered on hang-up; that instance is itself a file descriptor that one trio
task waits for. A request pays nothing.

A client that closes only its sending side counts as gone, as in most proxies: it can't be told
from one that closed both. Where there is no epoll (macOS), the sockets are peeked at a few times
a second: a peek that returns b"" is the end of the stream.
"""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Callable

import trio

# How late a departure may be noticed where the kernel doesn't tell.
PEEK_INTERVAL = 0.25


class HangupWatch:
    """Calls back, in trio's thread, when the other side of a watched socket hung up.

    Callbacks take nothing, must not block or raise, and come at most once per `add`.
    """

    def __init__(self, *, use_epoll: bool = hasattr(select, "epoll")) -> None:
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._sockets: dict[int, socket.socket] = {}
        self._epoll = select.epoll() if use_epoll else None

    def add(self, sock: socket.socket, left: Callable[[], None]) -> None:
        """Watch `sock` until `remove`; it must be removed before it is closed."""
        number = sock.fileno()
        self._callbacks[number] = left
        if self._epoll is None:
            self._sockets[number] = sock
        else:
            self._epoll.register(number, select.EPOLLRDHUP | select.EPOLLET)

    def remove(self, sock: socket.socket) -> None:
        """Stop watching; harmless when it isn't watched."""
        number = sock.fileno()
        if self._callbacks.pop(number, None) is None:
            return
        if self._epoll is None:
            self._sockets.pop(number, None)
        else:
            with contextlib.suppress(OSError):
                self._epoll.unregister(number)

    async def run(self) -> None:
        """Watch for ever."""
        if self._epoll is None:
            await self._run_peeking()
        else:
            await self._run_epoll(self._epoll)

    async def _run_epoll(self, epoll: select.epoll) -> None:
        while True:
            await trio.lowlevel.wait_readable(epoll.fileno())
            for number, _events in epoll.poll(0):
                # Removed in the meantime, by an earlier callback of this round: nothing to tell.
                callback = self._callbacks.get(number)
                if callback is not None:
                    # A half close may be followed by the other half: that is the same departure.
                    self._callbacks[number] = _told
                    callback()

    async def _run_peeking(self) -> None:
        while True:
            await trio.sleep(PEEK_INTERVAL)
            for number, sock in list(self._sockets.items()):
                if number in self._sockets and _has_left(sock):
                    del self._sockets[number]
                    self._callbacks[number]()

    def close(self) -> None:
        """Release the descriptor, after `run` ended and the last socket was removed."""
        if self._epoll is not None:
            self._epoll.close()


def _told() -> None:
    """Stands for a callback that was made."""


def _has_left(sock: socket.socket) -> bool:
    """Whether the stream ended; data that waits to be read hides an end behind it."""
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
