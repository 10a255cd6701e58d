"""Opening connections: all addresses of a node at once, and whoever answers first and is who it should be."""

from __future__ import annotations

import ipaddress
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import trio

from llamesh.config.values import Address
from llamesh.mesh.hello import Hello, Refused, Welcome
from llamesh.mesh.identity import Identity
from llamesh.mesh.noise import HandshakeFailed
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.stream import dial_any_token
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted
from llamesh.net.transport import connect

# Until a TCP connection stands, the look-up of a name included. Beyond this an address is as good as dead.
CONNECT_SECONDS = 3.0

# The first of several addresses gets this much of a start before the next is tried, and so on: a node that
# can be reached directly shouldn't be reached by way of its VPN.
_STAGGER_SECONDS = 0.05

_MOST_ADDRESSES = 16

# Of a name, tried one after the other.
_MOST_OF_NAME = 4

# Hanging look-ups mustn't take the threads of others.
_MOST_LOOKUPS = 4


class CantReach(OSError):
    """No address led to the node. The message has what each one said; `its_me`: those that led back here."""

    def __init__(self, message: str, *, its_me: tuple[Address, ...] = ()) -> None:
        super().__init__(message)
        self.its_me = its_me


class Dialler:
    """Dials as this node. `hello(purpose)` is what it says of itself; `check` believes a claim or raises;
    `accept` looks at what else the other side said, and raises NotTrusted.

    `handshakes` counts connections that were opened, `failures` dials that led to none.
    """

    def __init__(
        self,
        identity: Identity,
        hello: Callable[[str], Hello],
        check: Callable[[Claim], None],
        accept: Callable[[Welcome], None],
    ) -> None:
        self.handshakes = self.failures = 0
        self._outcomes: Counter[str] = Counter()
        self._identity = identity
        self._hello = hello
        self._check = check
        self._accept = accept
        self._lookups = trio.CapacityLimiter(_MOST_LOOKUPS)

    @property
    def outcomes(self) -> Mapping[str, int]:
        """How handshakes went that we began: see `outcome_of`, and "ok"."""
        return MappingProxyType(self._outcomes)

    async def dial(
        self, addresses: Iterable[Address], purpose: str = "send", *, node: str | None = None
    ) -> NoiseTransport:
        """A connection to the first that answers. `node`: who it has to be. Raises CantReach."""
        chosen = list(dict.fromkeys(addresses))[:_MOST_ADDRESSES]
        if not chosen:
            raise CantReach("no address of it is known")
        found: list[NoiseTransport] = []
        problems: list[str] = []
        itself: list[Address] = []
        failed = [trio.Event() for _ in chosen]
        try:
            async with trio.open_nursery() as nursery:

                async def attempt(number: int, address: Address) -> None:
                    if number:
                        with trio.move_on_after(_STAGGER_SECONDS * number):
                            await failed[number - 1].wait()
                    try:
                        found.append(await self._dial_one(address, purpose, node))
                    except ItsMe as error:
                        itself.append(address)
                        problems.append(str(error))
                    except (OSError, HandshakeFailed, NotTrusted, trio.TooSlowError) as error:
                        problems.append(_reason(address, error))
                    else:
                        nursery.cancel_scope.cancel()
                    finally:
                        failed[number].set()

                for number, address in enumerate(chosen):
                    nursery.start_soon(attempt, number, address)
        except BaseException:
            for stream in found:
                stream.close()
            raise
        for stream in found[1:]:
            stream.close()
        if found:
            self.handshakes += 1
            return found[0]
        self.failures += 1
        raise CantReach("; ".join(problems), its_me=tuple(itself))

    async def _dial_one(self, address: Address, purpose: str, node: str | None) -> NoiseTransport:
        stood = False

        async def connected() -> socket.socket:
            nonlocal stood
            with trio.fail_after(CONNECT_SECONDS):
                sock = await self._connect(address)
            stood = True
            return sock

        try:
            stream = await dial_any_token(connected, self._identity, self._hello(purpose), self._check)
        except (OSError, HandshakeFailed, NotTrusted) as error:
            if stood:
                self._outcomes[outcome_of(error)] += 1
            raise
        try:
            remote = stream.remote
            if node is not None and remote.node_id != node:
                raise NotTrusted(f"{address} is node {remote.node_id} now, not {node}")
            assert isinstance(remote, Welcome)  # noqa: S101 - we dialled
            self._accept(remote)
        except BaseException:
            self._outcomes["untrusted"] += 1
            stream.close()
            raise
        self._outcomes["ok"] += 1
        return stream

    async def _connect(self, address: Address) -> socket.socket:
        if _is_ip(address.host):
            return (await connect(address.host, address.port)).detach()
        failure: OSError = OSError("the name has no address that could be dialled")
        for host in await self._look_up(address):
            try:
                return (await connect(host, address.port)).detach()
            except OSError as error:
                failure = error
        raise failure

    async def _look_up(self, address: Address) -> list[str]:
        """The addresses of a name: nodes may announce themselves by one. In a thread, since it may hang."""
        try:
            entries = await trio.to_thread.run_sync(
                socket.getaddrinfo,
                address.host,
                address.port,
                socket.AF_UNSPEC,
                socket.SOCK_STREAM,
                abandon_on_cancel=True,
                limiter=self._lookups,
            )
        except UnicodeError as error:  # a name that IDNA can't encode
            raise OSError(f"the name {address.host} can't be looked up: {error}") from None
        hosts = dict.fromkeys(str(entry[4][0]) for entry in entries)
        # Whoever chose the name chose where it leads, too: not into this machine's own services.
        fit = [host for host in hosts if address.is_loopback or not Address(host, 0).is_loopback]
        return fit[:_MOST_OF_NAME]


def outcome_of(error: Exception) -> str:
    """How a handshake ended that wasn't good, as a word of few: `token`, `version`, `timeout`, `protocol`,
    `closed`, `garbage` (of HandshakeFailed), `refused` by the other side, `untrusted` by this one, `itself`,
    `lost`.
    """
    if isinstance(error, HandshakeFailed):
        return error.reason
    if isinstance(error, ItsMe):
        return "itself"
    if isinstance(error, NotTrusted):
        return "untrusted"
    return "refused" if isinstance(error, Refused) else "lost"


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _reason(address: Address, error: Exception) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"{address}: no connection within {CONNECT_SECONDS:g} s"
    text = str(error) or type(error).__name__
    return text if str(address) in text else f"{address}: {text}"
