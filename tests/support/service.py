"""A service manager in this process: it holds the listening sockets, starts a node with them, and is told how
the node is.

    with Manager(tmp_path) as manager:
        port = manager.listen("api")
        async with manager.running(tmp_path / "node", recipes) as node:
            await manager.wait_told("READY")
        async with manager.running(tmp_path / "node", recipes) as node:      # the next life, same sockets
            ...
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self

import httpx

from tests.support.node import Node, prepare, wait_until

# LISTEN_PID must be the node's own process id, which is only known between fork and exec: this puts the
# descriptors (first argument) at 3, 4, ..., and becomes the rest of its arguments.
_BECOME = """
import os, sys
for number, source in enumerate(map(int, sys.argv[1].split()), 3):
    os.dup2(source, number)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""

# Out of the way of 3, 4, ...
_LOWEST = 100


class Manager:
    """Holds sockets over the lives of a node; `told` is what nodes have said since, as documents."""

    def __init__(self, directory: Path) -> None:
        self.told: list[dict[str, str]] = []
        self._path = directory / "notify"
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(str(self._path))
        self._notify.setblocking(False)
        self._sockets: dict[str, socket.socket] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self._notify, *self._sockets.values()):
            sock.close()

    def listen(self, name: str, host: str = "127.0.0.1", backlog: int = 1024) -> int:
        """Open a socket, as a `.socket` unit does; its port."""
        sock = self._sockets[name] = socket.create_server((host, 0), backlog=backlog)
        port: int = sock.getsockname()[1]
        return port

    def hear(self) -> list[dict[str, str]]:
        """`told`, with what came in the meantime."""
        with contextlib.suppress(BlockingIOError):
            while True:
                text = self._notify.recv(65536).decode()
                self.told.append(dict(line.split("=", 1) for line in text.split("\n")))
        return self.told

    def kinds(self) -> list[str]:
        """The first name of each message so far; a status or food for the watchdog alone doesn't count."""
        names = [next(iter(message)) for message in self.hear()]
        return [name for name in names if name not in ("STATUS", "WATCHDOG")]

    async def wait_told(self, name: str, count: int = 1) -> None:
        """Wait until so many messages had a line of this name."""
        await wait_until(
            lambda: sum(name in message for message in self.hear()) >= count,
            lambda: f"not told {name} {count} times: {self.told}",
        )

    def start(
        self,
        directory: Path,
        recipes: str | Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        *,
        binary_path: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Node:
        """A node that was just started, with these sockets. It is the caller's to close."""
        passing = {"LISTEN_FDS": str(len(self._sockets)), "LISTEN_FDNAMES": ":".join(self._sockets)}
        told = {"NOTIFY_SOCKET": str(self._path), **(passing if self._sockets else {}), **(env or {})}
        command, directory, environment = prepare(
            directory, recipes, config, binary_path=binary_path, env=told
        )
        with contextlib.ExitStack() as stack:
            numbers = []
            for sock in self._sockets.values():
                copy = stack.enter_context(_above(sock, _LOWEST))
                numbers.append(copy.fileno())
            words = [sys.executable, "-I", "-c", _BECOME, " ".join(map(str, numbers)), *command]
            return Node(words, directory, environment, pass_fds=numbers)

    @contextlib.asynccontextmanager
    async def running(
        self, directory: Path, recipes: str | Mapping[str, Any], *arguments: Any, **more: Any
    ) -> AsyncIterator[Node]:
        """A node that listens. Its log says where; with passed sockets that is where they are."""
        node = self.start(directory, recipes, *arguments, **more)
        try:
            node.url = str((await node.wait_event("listening"))["url"])
            node.client.base_url = httpx.URL(node.url)
            yield node
        finally:
            await node.close()


def _above(sock: socket.socket, lowest: int) -> socket.socket:
    """Another descriptor of the same socket, at `lowest` or above."""
    return socket.socket(fileno=fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, lowest))
