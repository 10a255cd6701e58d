"""Which addresses are worth a dial, of those that nodes say of themselves.

What a node says of itself is hearsay as soon as a third one passes it on, and anyway nobody has to be
right about where others can reach it. A wrong address costs a dial that the handshake ends. Still, some are
left out: those that would lead from here to this very machine, or nowhere.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable

from llamesh.config.values import Address

# As many as one node may name.
MOST = 32


def worth_dialling(texts: Iterable[str], *, near: bool, own: Collection[str] = ()) -> tuple[Address, ...]:
    """The addresses among `texts`, each "host:port", that may lead to the node that they are said of.

    `near`: it may be on this machine, so that loopback addresses, and scopes of link-local ones, mean there
    what they mean here. `own`: those of this node, as it writes them. Names stay names.
    """
    found: dict[Address, None] = {}
    for text in texts:
        if text in own:
            continue
        try:
            address = Address.parse(text)
        except ValueError:
            continue
        if address.port and _leads_somewhere(address, near=near):
            found[address] = None
        if len(found) >= MOST:
            break
    return tuple(found)


def is_near(text: str) -> bool:
    """Whether "host:port", the other end of a connection, is on this machine by way of loopback."""
    try:
        return Address.parse(text).is_loopback
    except ValueError:
        return False


def _leads_somewhere(address: Address, *, near: bool) -> bool:
    if address.is_loopback:
        return near
    host, _, scope = address.host.partition("%")
    if scope and not near:
        return False  # the number of an interface over there
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return True
    mapped = getattr(ip, "ipv4_mapped", None)
    if mapped is not None:
        return not mapped.is_loopback or near
    return not (ip.is_unspecified or ip.is_multicast or (ip.version == 4 and ip.is_reserved))
