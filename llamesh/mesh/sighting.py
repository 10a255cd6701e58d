"""What a node says of itself on the local network, and what is believed of what others say.

Anybody on the network can announce anything. So what arrives is bounded and checked piece by
piece, and is a hint where to dial, nothing more: who answers there is for the handshake to say.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from llamesh.config.values import Address, is_node_id
from llamesh.mesh.interfaces import MOST_ADDRESSES

#: The TXT key that holds the node id; the others are the caller's.
ID_KEY = "id"

MOST_TXT = 16
_KEY = re.compile(r"[!-<>-~]{1,32}")  # RFC 6763, 6.4: printable ASCII but `=`
_LONGEST_PAIR = 255  # RFC 6763, 6.1: a length byte stands before each `key=value`


@dataclass(frozen=True, slots=True)
class Record:
    """A service as it came from the network: `server` is the host name that it is on, `addresses` are
    IP texts, `properties` the TXT pairs. Nothing in it is checked."""

    server: str
    port: int
    addresses: tuple[str, ...]
    properties: Mapping[bytes, bytes | None]


@dataclass(frozen=True, slots=True)
class Sighting:
    """A node that was seen on the local network, by its own words.

    `addresses` are 1 to MOST_ADDRESSES to dial, each host an IP text; link-local IPv6 has the scope of
    this machine. `txt` holds what the node adds, at most MOST_TXT pairs of a line of text each.
    """

    node_id: str
    addresses: tuple[Address, ...]
    txt: Mapping[str, str]


def read_record(record: Record, *, loopback: bool) -> Sighting:
    """Check a record. Raises ValueError saying what is wrong; the words hold nothing from the network.

    Loopback addresses count only with `loopback`: elsewhere they would be this machine's own services.
    """
    if not 1 <= record.port <= 65535:
        raise ValueError("the port isn't one")
    if len(record.properties) > MOST_TXT + 1:
        raise ValueError(f"more than {MOST_TXT + 1} TXT pairs")
    txt = dict(_pair(key, value) for key, value in record.properties.items())
    node_id = txt.pop(ID_KEY, "")
    if not is_node_id(node_id):
        raise ValueError("no node id, or one that can't be")
    hosts = list(dict.fromkeys(_hosts(record.addresses, loopback)))
    if not hosts:
        raise ValueError("no address that can be dialled")
    addresses = tuple(Address(host, record.port) for host in hosts[:MOST_ADDRESSES])
    return Sighting(node_id, addresses, txt)


def written_txt(node_id: str, txt: Mapping[str, str]) -> dict[str, str]:
    """The TXT pairs to announce. Raises ValueError for what `read_record` of another node would refuse."""
    pairs = {ID_KEY: node_id, **txt}
    if ID_KEY in txt or len(pairs) > MOST_TXT + 1:
        raise ValueError(f"at most {MOST_TXT} TXT pairs, none called {ID_KEY!r}")
    for key, value in pairs.items():
        _pair(key.encode(), value.encode())
    return pairs


def _pair(key: bytes, value: bytes | None) -> tuple[str, str]:
    if value is None or len(key) + 1 + len(value) > _LONGEST_PAIR:
        raise ValueError("a TXT pair has no value, or a long one")
    try:
        name, text = key.decode("ascii"), value.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("a TXT pair isn't text") from None
    if not _KEY.fullmatch(name) or not (text.isprintable()):
        raise ValueError("a TXT pair isn't a line of text")
    return name, text


def _hosts(texts: Iterable[str], loopback: bool) -> Iterable[str]:
    for text in texts:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        mapped = getattr(address, "ipv4_mapped", None)
        if mapped is not None or address.is_unspecified or address.is_multicast or text == "255.255.255.255":
            continue
        if address.is_loopback and not loopback:
            continue
        yield str(address)
