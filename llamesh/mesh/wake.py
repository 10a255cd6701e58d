"""Wake-on-LAN: the packet that makes a sleeping machine's network card switch it on.

The format is AMD's "Magic Packet Technology" (publication 20213): six bytes 0xFF, then the card's
address sixteen times, anywhere in a frame that reaches the card. A sleeping machine answers
no ARP, so it goes out as a UDP broadcast; the port means nothing, 9 (discard) is the custom.
Nothing comes back: whether it worked shows when the node appears.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import trio

from llamesh.mesh.interfaces import ALL, broadcast_addresses, read_interfaces

LIMITED_BROADCAST = "255.255.255.255"
DISCARD_PORT = 9


def magic_packet(mac: str) -> bytes:
    """The 102 bytes for a card's address, six octets in hexadecimal (`aa:bb:cc:dd:ee:ff`, or with `-`).

    Raises ValueError when it isn't one.
    """
    octets = bytes.fromhex(mac.replace("-", ":").replace(":", ""))
    if len(octets) != 6:
        raise ValueError(f"a MAC address has 6 octets, not {len(octets)}")
    return b"\xff" * 6 + octets * 16


async def send_wake(mac: str, broadcast: str = LIMITED_BROADCAST, port: int = DISCARD_PORT) -> None:
    """Send the magic packet for `mac` once, to one IPv4 address. Raises OSError and ValueError."""
    packet = magic_packet(mac)
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        await sock.sendto(packet, (broadcast, port))


async def wake(mac: str, interfaces: Sequence[str] = (ALL,), port: int = DISCARD_PORT) -> tuple[str, ...]:
    """Send the magic packet into every network that `interfaces` (names, addresses or `all`) leads to.

    Returns the broadcast addresses that took it. Raises OSError when there is none, and ValueError when
    `mac` isn't a MAC address.
    """
    # The limited broadcast leaves by one interface only, whichever the routes prefer: it is for machines
    # whose interfaces know no broadcast address.
    targets = broadcast_addresses(read_interfaces(), interfaces) or (LIMITED_BROADCAST,)
    taken: list[str] = []
    failure: OSError | None = None
    for target in targets:
        try:
            await send_wake(mac, target, port)
        except OSError as error:  # one network is down; the machine may be in another
            failure = error
        else:
            taken.append(target)
    if failure is not None and not taken:
        raise failure
    return tuple(taken)
