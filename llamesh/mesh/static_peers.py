"""The nodes of `cluster.peers`: their names looked up again and again, each address a target of its own.

A name may stand for several nodes, or for several addresses of one: nobody knows before a
handshake says which node answers there. So every address is one `Target`, and who dials them
merges what turns out to be one node.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from llamesh.config.peers import StaticPeer
from llamesh.config.values import Address
from llamesh.telemetry.logs import get_logger

log = get_logger("peers")

LOOKUP_SECONDS = 5.0
REFRESH_SECONDS = 30.0
FIRST_RETRY_SECONDS = 1.0

# One name shouldn't make a node dial half the internet.
MOST_PER_NAME = 64
# A lookup that is given up goes on in its thread until the system's resolver does: 30 seconds and more.
_MOST_LOOKUPS = 32


@dataclass(frozen=True, slots=True)
class Target:
    """An address to dial, `address.host` an IP text, and the entry that it comes from."""

    entry: StaticPeer
    address: Address


class Resolve(Protocol):
    """What `socket.getaddrinfo` does, as far as it is used here: raises OSError (`socket.gaierror` too)."""

    def __call__(self, host: str, port: int, family: int, kind: int, /) -> Awaitable[Sequence[Any]]:
        """Entries of (family, kind, protocol, canonical name, socket address)."""


class StaticPeers:
    """Keeps `targets` true. `on_change` is called with all of them whenever they have changed.

    A name that can't be looked up keeps the addresses it had. That is one warning, and one line more
    when it works again.
    """

    def __init__(
        self,
        peers: Sequence[StaticPeer],
        on_change: Callable[[tuple[Target, ...]], None],
        resolve: Resolve | None = None,
    ) -> None:
        self._peers = tuple(dict.fromkeys(peers))
        self._on_change = on_change
        self._resolve = resolve or self._look_up
        # Not trio's own: hanging lookups would hold up everything else that needs a thread.
        self._limiter = trio.CapacityLimiter(_MOST_LOOKUPS)
        self._known: dict[StaticPeer, tuple[Address, ...]] = {}
        self._told: tuple[Target, ...] = ()

    @property
    def targets(self) -> tuple[Target, ...]:
        """In the order of the entries; several addresses of one in the order of their text."""
        return tuple(
            Target(entry, address) for entry in self._peers for address in self._known.get(entry, ())
        )

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look up for ever. `started` comes once entries that need no lookup are told."""
        named = []
        for entry in self._peers:
            if _is_ip(entry.address.host):
                self._known[entry] = (entry.address,)
            else:
                named.append(entry)
        self._tell()
        async with trio.open_nursery() as nursery:
            for entry in named:
                nursery.start_soon(self._keep, entry)
            task_status.started()

    async def _keep(self, entry: StaticPeer) -> None:
        """One name, for ever."""
        retry = FIRST_RETRY_SECONDS
        failing = False
        while True:
            try:
                found = await self._addresses(entry.address)
            except (OSError, UnicodeError) as error:  # UnicodeError: a name that IDNA can't encode
                if not failing:
                    failing = True
                    log.warning(
                        "the name of a peer can't be looked up; check cluster.peers and this machine's DNS",
                        peer=str(entry),
                        error=_reason(error),
                        instead="the addresses that it had" if entry in self._known else "nothing",
                    )
                await trio.sleep(retry)
                retry = min(retry * 2, REFRESH_SECONDS)
                continue
            if failing:
                log.info("the name of a peer can be looked up again", peer=str(entry))
            failing, retry = False, FIRST_RETRY_SECONDS
            self._known[entry] = found
            self._tell()
            await trio.sleep(REFRESH_SECONDS)

    async def _addresses(self, address: Address) -> tuple[Address, ...]:
        """All addresses of a name; OSError when there is none, or no answer in LOOKUP_SECONDS."""
        with trio.move_on_after(LOOKUP_SECONDS) as scope:
            found = await self._resolve(address.host, address.port, socket.AF_UNSPEC, socket.SOCK_STREAM)
        if scope.cancelled_caught:
            raise TimeoutError(f"no answer within {LOOKUP_SECONDS:g} s")
        # Resolvers shuffle their answers; in one order, the same answer is no change.
        hosts = sorted({host for entry in found if (host := _host(entry[4])) is not None})
        if not hosts:
            raise OSError("the name has no address")
        return tuple(Address(host, address.port) for host in hosts[:MOST_PER_NAME])

    async def _look_up(self, host: str, port: int, family: int, kind: int, /) -> Sequence[Any]:
        return await trio.to_thread.run_sync(
            socket.getaddrinfo, host, port, family, kind, abandon_on_cancel=True, limiter=self._limiter
        )

    def _tell(self) -> None:
        targets = self.targets
        if targets != self._told:
            self._told = targets
            self._on_change(targets)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _host(address: Sequence[Any]) -> str | None:
    """The IP text of a socket address, link-local IPv6 with its scope; None when it can't be dialled."""
    host = str(address[0])
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return None
    if parsed.is_unspecified or parsed.is_multicast:
        return None
    if len(address) == 4 and address[3] and "%" not in host:
        return f"{host}%{address[3]}"
    return str(parsed)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
