"""Listening sockets that were opened for us (LISTEN_FDS), such as by a systemd `.socket` unit.

Whoever opened them keeps them open while this process is replaced: connections that come in between wait in
the socket's backlog for the next one. So a restart refuses nobody. We only ever close our own descriptor.

A socket named `peers` (`FileDescriptorName=peers`) is used for `cluster.listen_addr`, all others for
`listen_addr`. The descriptors begin at 3; LISTEN_PID says whose they are.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from llamesh.config.settings import Settings
from llamesh.config.values import Address
from llamesh.service.environment import BadHandover, take_number
from llamesh.telemetry.logs import get_logger

log = get_logger("service")

PEERS = "peers"

_FIRST = 3
_MOST = 64
_LARGEST_PID = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Passed:
    """Listening TCP sockets, non-blocking and closed on exec: for clients, and for other nodes alone."""

    api: list[socket.socket] = field(default_factory=list)
    peers: list[socket.socket] = field(default_factory=list)


def take_sockets(environ: MutableMapping[str, str], settings: Settings, first: int = _FIRST) -> Passed:
    """The sockets that were passed to this process, if any; the variables are removed.

    Raises BadHandover when they can't be what a node listens on: to listen elsewhere instead would leave
    clients waiting in a backlog that nobody empties. `first`: the lowest descriptor, for tests.
    """
    names = environ.pop("LISTEN_FDNAMES", None)
    if take_number(environ, "LISTEN_PID", _LARGEST_PID) != os.getpid():
        environ.pop("LISTEN_FDS", None)  # meant for another process, whose environment we inherited
        return Passed()
    count = take_number(environ, "LISTEN_FDS", _MOST)
    if not count:
        return Passed()
    labels = names.split(":") if names is not None else [""] * count
    if len(labels) != count:
        raise BadHandover(f"LISTEN_FDS says {count}, but LISTEN_FDNAMES has {len(labels)} names")
    passed = Passed()
    with ExitStack() as on_failure:
        for descriptor, label in enumerate(labels, first):
            sock = _adopt(descriptor, f"descriptor {descriptor}" + (f" ({label[:60]!r})" if label else ""))
            on_failure.callback(sock.close)
            (passed.peers if label == PEERS else passed.api).append(sock)
        _reconcile(passed, settings)
        on_failure.pop_all()
    return passed


def _reconcile(passed: Passed, settings: Settings) -> None:
    """What was passed against what is configured. Raises BadHandover."""
    cluster = settings.cluster
    if passed.peers and not cluster.enabled:
        log.warning("a socket for peers was passed, but cluster.enabled is off: nobody answers there")
        for sock in passed.peers:
            sock.close()
        passed.peers.clear()
    if passed.peers and cluster.listen_addr is None:
        raise BadHandover(
            f"a socket named {PEERS} was passed by LISTEN_FDS, but cluster.listen_addr isn't set: set it to "
            "that socket's address, so that peers are answered there and nowhere else, or pass none"
        )
    pairs = ((passed.api, settings.listen_addr), (passed.peers, cluster.listen_addr))
    for key, (sockets, configured) in zip(("listen_addr", "cluster.listen_addr"), pairs, strict=True):
        places = [Address(*sock.getsockname()[:2]) for sock in sockets]
        if places and configured is not None and not any(_same(place, configured) for place in places):
            # The socket counts. But commands on this machine look for the node where the file says.
            log.warning(
                "this address is set, but the service manager's socket is used",
                key=key,
                configured=str(configured),
                used=[str(place) for place in places],
            )


def _same(place: Address, configured: Address) -> bool:
    try:
        ipaddress.ip_address(configured.host)
    except ValueError:  # a name: whatever it means today
        return place.port == configured.port
    return place == configured


def _adopt(descriptor: int, what: str) -> socket.socket:
    """Our object around a descriptor that came with us. Raises BadHandover."""
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
    except OSError as error:
        raise BadHandover(f"{what} was passed by LISTEN_FDS, but is no socket: {error.strerror}") from None
    if problem := _problem(sock):
        sock.close()
        raise BadHandover(f"{what} was passed by LISTEN_FDS, but {problem}")
    sock.setblocking(False)
    return sock


def _problem(sock: socket.socket) -> str:
    """Why a node can't listen on a socket, "" when it can."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return f"is of the family {_family(sock)}; a node listens on TCP: ListenStream=ADDRESS:PORT"
    if sock.type != socket.SOCK_STREAM:
        return "is not a TCP socket; use ListenStream=ADDRESS:PORT"
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "doesn't listen: it is one connection, or was only bound; use Accept=no"
    if sock.family == socket.AF_INET6:
        both = not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        if both and sock.getsockname()[0] == "::":
            # Its IPv4 clients would have addresses of another form (::ffff:127.0.0.1), which nothing that
            # looks at addresses (who may administer, where peers are) should have to know.
            return (
                "takes IPv4 and IPv6 at once; use BindIPv6Only=ipv6-only, with one ListenStream=[::]:PORT "
                "and one ListenStream=0.0.0.0:PORT"
            )
    return ""


def _family(sock: socket.socket) -> str:
    return sock.family.name if isinstance(sock.family, socket.AddressFamily) else str(sock.family)
