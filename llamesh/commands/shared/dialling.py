"""Whether a mesh can be reached at some addresses, and for people what stands in the way at each."""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from llamesh import __version__
from llamesh.config.settings import Address
from llamesh.mesh.hello import Hello, Refused
from llamesh.mesh.identity import Identity
from llamesh.mesh.noise import HandshakeFailed
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.stream import dial
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted

# Each step gets as much, so that an address takes no more than three of these.
STEP_SECONDS = 5.0

# A name may have more; who listens on the first few doesn't will hardly on the others.
_MOST_TRIED = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one address. `claim`: who answers there, None if nobody did who could be believed."""

    address: Address
    claim: Claim | None
    words: str


def reach(
    addresses: Sequence[Address], identity: Identity, check: Callable[[Claim], None]
) -> tuple[Outcome, ...]:
    """Dial all addresses at once, say hello, and hang up. Takes 3 STEP_SECONDS at most."""
    return trio.run(_reach, addresses, identity, check)


async def _reach(
    addresses: Sequence[Address], identity: Identity, check: Callable[[Claim], None]
) -> tuple[Outcome, ...]:
    outcomes: dict[Address, Outcome] = {}

    async def look(address: Address) -> None:
        outcomes[address] = await say_hello(address, identity, check)

    async with trio.open_nursery() as nursery:
        for address in addresses:
            nursery.start_soon(look, address)
    return tuple(outcomes[address] for address in addresses)


async def say_hello(address: Address, identity: Identity, check: Callable[[Claim], None]) -> Outcome:
    """Dial one address, say hello, and hang up."""
    believed: list[Claim] = []

    def remember(claim: Claim) -> None:
        check(claim)
        believed.append(claim)

    try:
        sock = await connect(address)
        # Epoch 0 and no port: this is no node that began, only one that looks whether it could.
        hello = Hello(node_id=identity.node_id, purpose="send", version=__version__, epoch=0)
        transport = await dial(sock, identity, hello, remember)
    except (OSError, Refused, NotTrusted, HandshakeFailed) as error:
        return Outcome(address, None, explain(error, address))
    await _hang_up(transport)
    [claim] = believed
    return Outcome(address, claim, f"reached {claim.node_id}, which runs llamesh {transport.remote.version}")


async def _hang_up(transport: NoiseTransport) -> None:
    # Said properly, so that the other side logs no connection that broke.
    try:
        with trio.move_on_after(STEP_SECONDS):
            await transport.send_end()
    except OSError:
        pass  # it was reached; who hangs up first doesn't matter
    finally:
        transport.close()


async def connect(address: Address) -> socket.socket:
    """A connected socket to the first address that takes one. Raises OSError, of the first one that fails."""
    with trio.move_on_after(STEP_SECONDS) as resolving:
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    if resolving.cancelled_caught:
        raise socket.gaierror(socket.EAI_AGAIN, "the name server doesn't answer")
    first: OSError | None = None
    deadline = time.monotonic() + STEP_SECONDS
    for family, kind, protocol, _, place in found[:_MOST_TRIED]:
        trying = trio.socket.socket(family, kind, protocol)
        try:
            with trio.fail_after(max(0.0, deadline - time.monotonic())):
                await trying.connect(place)
        except trio.TooSlowError:
            trying.close()
            first = first or TimeoutError(errno.ETIMEDOUT, "no answer")
        except OSError as error:
            trying.close()
            first = first or error
        except BaseException:
            trying.close()
            raise
        else:
            connected = socket.socket(fileno=trying.detach())
            connected.setblocking(False)
            return connected
    raise first or socket.gaierror(socket.EAI_NONAME, "no address")


def explain(error: Exception, address: Address) -> str:
    """Why an address wasn't reached, and what to look at."""
    port = address.port
    match error:
        case ItsMe():
            return "that is this node itself; run this on the other machine"
        case NotTrusted() | Refused():
            return str(error)
        case HandshakeFailed(reason="token"):
            return "the token is refused: it was changed since; make a new invitation there"
        case HandshakeFailed(reason="garbage"):
            return (
                f"{error}; is port {port} another program's, or that of a node without cluster.enabled: true "
                "or with a cluster.listen_addr of its own?"
            )
        case HandshakeFailed(reason="timeout") | TimeoutError():
            return (
                f"no answer within {STEP_SECONDS:.0f} s; is that machine on and in the same network, "
                f"and does a firewall there let port {port} through?"
            )
        case HandshakeFailed():
            return f"{error}; does the node there have cluster.enabled: true?"
        case socket.gaierror():
            return f"the name {address.host} can't be resolved: {error.strerror}"
        case ConnectionRefusedError():
            return (
                "connection refused; is llamesh running there, does it listen on more than loopback, "
                f"and does a firewall block port {port}?"
            )
        case OSError(errno=errno.EHOSTUNREACH | errno.ENETUNREACH | errno.EADDRNOTAVAIL):
            return "there is no way to that address from this network"
        case ConnectionError():
            return f"the connection was cut ({error}); does the node there have cluster.enabled: true?"
        case _:
            return str(error)
