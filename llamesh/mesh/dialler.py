"""Opening connections: all addresses of a node at once, and whoever answers first and is who it should be."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable

import trio

from llamesh.config.values import Address
from llamesh.mesh.hello import Hello, Welcome
from llamesh.mesh.identity import Identity
from llamesh.mesh.noise import HandshakeFailed
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.stream import dial_any_token
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted
from llamesh.net.transport import connect

# Until a TCP connection stands. Beyond this an address is as good as dead.
CONNECT_SECONDS = 3.0

# The first of several addresses gets this much of a start before the next is tried, and so on: a node that
# can be reached directly shouldn't be reached by way of its VPN.
_STAGGER_SECONDS = 0.05

_MOST_ADDRESSES = 16


class CantReach(OSError):
    """No address led to the node. The message has what each one said; `its_me`: one led to this node."""

    def __init__(self, message: str, *, its_me: tuple[Address, ...] = ()) -> None:
        super().__init__(message)
        self.its_me = its_me


class Dialler:
    """Dials as this node. `hello(purpose)` is what it says of itself; `check` believes a claim or raises;
    `accept` looks at what else the other side said, and raises NotTrusted."""

    def __init__(
        self,
        identity: Identity,
        hello: Callable[[str], Hello],
        check: Callable[[Claim], None],
        accept: Callable[[Welcome], None],
    ) -> None:
        self.handshakes = self.failures = 0
        self._identity = identity
        self._hello = hello
        self._check = check
        self._accept = accept

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
        async with trio.open_nursery() as nursery:

            async def attempt(number: int, address: Address) -> None:
                if number:
                    with trio.move_on_after(_STAGGER_SECONDS * number):
                        await failed[number - 1].wait()
                try:
                    stream = await self._dial_one(address, purpose, node)
                except ItsMe as error:
                    itself.append(address)
                    problems.append(str(error))
                except (OSError, HandshakeFailed, NotTrusted, trio.TooSlowError) as error:
                    problems.append(_reason(address, error))
                else:
                    if found:
                        stream.close()
                    found.append(stream)
                    nursery.cancel_scope.cancel()
                finally:
                    failed[number].set()

            for number, address in enumerate(chosen):
                nursery.start_soon(attempt, number, address)
        if found:
            self.handshakes += 1
            return found[0]
        self.failures += 1
        raise CantReach("; ".join(problems), its_me=tuple(itself))

    async def _dial_one(self, address: Address, purpose: str, node: str | None) -> NoiseTransport:
        async def connected() -> socket.socket:
            with trio.fail_after(CONNECT_SECONDS):
                return (await connect(address.host, address.port)).detach()

        stream = await dial_any_token(connected, self._identity, self._hello(purpose), self._check)
        try:
            remote = stream.remote
            if node is not None and remote.node_id != node:
                raise NotTrusted(f"{address} is node {remote.node_id} now, not {node}")
            assert isinstance(remote, Welcome)  # noqa: S101 - we dialled
            self._accept(remote)
        except BaseException:
            stream.close()
            raise
        return stream


def _reason(address: Address, error: Exception) -> str:
    if isinstance(error, trio.TooSlowError):
        return f"{address}: no connection within {CONNECT_SECONDS:g} s"
    text = str(error) or type(error).__name__
    return text if str(address) in text else f"{address}: {text}"
