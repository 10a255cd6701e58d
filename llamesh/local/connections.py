"""Connections to a child that wait for their next request."""

from __future__ import annotations

import trio

from llamesh.net.exchange import UpstreamConnection


class IdleConnections:
    """The unused connections of one instance; the one used last is the first to be used again."""

    def __init__(self) -> None:
        self._kept: list[UpstreamConnection] = []

    def __len__(self) -> int:
        return len(self._kept)

    def take(self) -> UpstreamConnection | None:
        """One that the child should still hold open; None when there is none."""
        now = trio.current_time()
        while self._kept:
            connection = self._kept.pop()
            if now - connection.idle_since < connection.idle_limit:
                return connection
            connection.close()
        return None

    def keep(self, connection: UpstreamConnection) -> None:
        """Take back a connection that is `reusable`."""
        connection.idle_since = trio.current_time()
        self._kept.append(connection)

    def close_stale(self) -> None:
        """Close what the child is about to close; called now and then."""
        now = trio.current_time()
        kept, self._kept = self._kept, []
        for connection in kept:
            if now - connection.idle_since < connection.idle_limit:
                self._kept.append(connection)
            else:
                connection.close()

    def close(self) -> None:
        """Close all."""
        while self._kept:
            self._kept.pop().close()
