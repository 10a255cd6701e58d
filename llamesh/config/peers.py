"""An entry of `cluster.peers`: `host:port`, or a mapping that says more about the node there."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from llamesh.config.problems import Finding, nearest, shown
from llamesh.config.values import Address, node_id, peer_address, reject, reject_all

_MAC = re.compile(r"[0-9a-f]{2}(?:(?P<between>[:-]?)[0-9a-f]{2})(?:(?P=between)[0-9a-f]{2}){4}")


@dataclass(frozen=True, slots=True)
class StaticPeer:
    """Where a node may be found from the start.

    `address.host` may be a name. `wake_mac` is the address of its network card, twelve lower-case digits
    as `aa:bb:cc:dd:ee:ff`, when it may be woken by a magic packet; None otherwise. `node_id` is whom to
    expect there, None for anybody. `str()` is the address.
    """

    address: Address
    wake_mac: str | None = None
    node_id: str | None = None

    def __str__(self) -> str:
        return str(self.address)


def _mac(value: Any) -> str:
    if isinstance(value, str):
        digits = value.strip().lower()
        if _MAC.fullmatch(digits):
            octets = bytes.fromhex(digits.replace("-", "").replace(":", ""))
            # The lowest bit of the first octet marks a group of machines; a card has its own address.
            if any(octets) and not octets[0] & 1:
                return octets.hex(":")
            raise reject(f"not the address of one network card: {shown(value)}", "the card's own address")
    raise reject(f"not a MAC address: {shown(value)}", "such as aa:bb:cc:dd:ee:ff, in quotes")


def _node_id(value: Any) -> str:
    if not isinstance(value, str):
        raise reject(f"must be text, not {shown(value)}", "text; put it in quotes")
    return node_id(value)


_READ: dict[str, Callable[[Any], Any]] = {"address": peer_address, "wake_mac": _mac, "node_id": _node_id}


def _static_peer(value: Any) -> StaticPeer:
    if isinstance(value, StaticPeer):
        return value
    if not isinstance(value, dict):
        return StaticPeer(peer_address(value))
    read: dict[str, Any] = {}
    findings: list[Finding] = []
    for key, content in value.items():
        if key not in _READ:
            findings.append(Finding((key,), "unknown key", f"nearest: {nearest(key, _READ)}"))
        elif content is not None:  # a key without a value means its default, as everywhere
            try:
                read[key] = _READ[key](content)
            except PydanticCustomError as error:
                found: list[Finding] = (error.context or {})["findings"]
                findings += [Finding((key, *one.at), one.message, one.hint) for one in found]
    if value.get("address") is None:
        findings.append(Finding(("address",), "is missing", "every entry here needs `address:`"))
    if findings:
        raise reject_all(findings)
    return StaticPeer(**read)


def _written(peer: StaticPeer) -> Any:
    more = {"wake_mac": peer.wake_mac, "node_id": peer.node_id}
    said = {key: value for key, value in more.items() if value is not None}
    return {"address": str(peer.address), **said} if said else str(peer.address)


_ADDRESS = {"type": "string", "pattern": r"^\s*(\[[0-9A-Fa-f:.]+\]|[^\s:\[\]]+):[0-9]{1,5}\s*$"}

StaticPeerEntry = Annotated[
    StaticPeer,
    PlainValidator(_static_peer),
    PlainSerializer(_written),
    WithJsonSchema(
        {
            "anyOf": [
                _ADDRESS,
                {
                    "type": "object",
                    "properties": {
                        "address": _ADDRESS | {"description": "host:port; a name or an address."},
                        "wake_mac": {
                            "type": ["string", "null"],
                            "description": "Address of its network card (aa:bb:cc:dd:ee:ff), to wake it by.",
                        },
                        "node_id": {
                            "type": ["string", "null"],
                            "description": "The node that is expected there; empty: anybody.",
                        },
                    },
                    "required": ["address"],
                    "additionalProperties": False,
                },
            ]
        }
    ),
]
