"""What a node on the other end of a connection says that it is, and the answer when it isn't believed.

Both sides of a connection build a `Claim` once the Noise handshake has proven that the other
side holds the private half of `key`; `known_peers.KnownPeers.check` then believes it or raises.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

KEY_PREFIX = "noise25519:"
KEY_BYTES = 32

_NODE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True, slots=True)
class Claim:
    """A node id that somebody speaks for, with what was proven about it.

    `key` is the X25519 public key that the handshake proved. `previous_key` is another one that
    the same node has proven to hold as well (it is changing its key), else None. `address` says
    for people where it connects from or was dialled at.
    """

    node_id: str
    key: bytes
    previous_key: bytes | None
    address: str


class NotTrusted(Exception):
    """A claim that isn't believed. The message is for people, on this node and on the other one.

    It names nodes, public keys and what to do, never a secret.
    """


class ItsMe(NotTrusted):
    """The other end is this very node: one of its own addresses was dialled. Nothing is wrong."""


def is_node_id(text: str) -> bool:
    """Whether this can name a node: 1 to 64 letters, digits, `.`, `_` or `-`."""
    return _NODE_ID.fullmatch(text) is not None


def key_text(key: bytes) -> str:
    """A public key as `cluster.noise.allowed_keys` and the known_peers file write it."""
    return KEY_PREFIX + base64.b64encode(key).decode("ascii")


def key_bytes(text: str) -> bytes:
    """The 32 bytes of what `key_text` wrote. Raises ValueError with what is wrong."""
    if not text.startswith(KEY_PREFIX):
        raise ValueError(f"a key starts with {KEY_PREFIX}")
    try:
        key = base64.b64decode(text.removeprefix(KEY_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"what follows {KEY_PREFIX} isn't base64") from None
    if len(key) != KEY_BYTES or key_text(key) != text:
        raise ValueError(f"a key is {KEY_BYTES} bytes, which are 44 characters of base64")
    return key


def fingerprint(key: bytes) -> str:
    """A public key for people to compare: 64 bits of its SHA-256, as in `3f2a-91bc-77d0-12ee`."""
    digits = hashlib.sha256(key).hexdigest()[:16]
    return "-".join(digits[start : start + 4] for start in range(0, 16, 4))
