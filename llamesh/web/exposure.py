"""A node that others can reach and that asks for no key: said loudly, since nobody means it for long."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable

from llamesh.config.current import Current
from llamesh.config.values import Address
from llamesh.telemetry.logs import get_logger
from llamesh.web.attention import Attention

log = get_logger("node")


class Exposure:
    """Looks at where the API listens. Peers aren't meant: they need the mesh's token on any port."""

    def __init__(self, current: Current, attention: Attention) -> None:
        self._current = current
        self._attention = attention
        self._addresses = self._said = ""
        self._what = ""

    def listens(self, sockets: Iterable[socket.socket], *, mesh: bool) -> None:
        """The API is answered there; `mesh`: whether other nodes can be reached through this one."""
        # What the kernel says: 0.0.0.0, [::] and whatever a host name or a passed socket stands for.
        self._addresses = ", ".join(_place(sock) for sock in sockets if not _is_loopback(sock))
        others = ", and through it those of the whole mesh" if mesh else ""
        self._what = f"whoever reaches this address can use the models{others}"
        self._attention.open_address = self._addresses
        self.say()

    def say(self) -> None:
        """At the start, and when a reload has taken the keys away: to the log, and to stderr for whoever
        looks at nothing else.
        """
        current = self._current.settings
        open_now = self._addresses if not current.auth.enabled else ""
        if open_now and open_now != self._said:
            log.warning(f"{self._what}: set auth.enabled and auth.allowed_keys", listen_addr=open_now)
            sys.stderr.write(
                f"llamesh: WARNING: no key is asked for on {open_now}: {self._what}. "
                "Set auth.enabled and auth.allowed_keys, or listen on 127.0.0.1.\n"
            )
        self._said = open_now


def _place(sock: socket.socket) -> str:
    return str(Address(*sock.getsockname()[:2]))


def _is_loopback(sock: socket.socket) -> bool:
    host = str(sock.getsockname()[0])
    return host.startswith("127.") or host == "::1"
