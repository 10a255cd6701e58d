"""The cluster token: the one secret that all nodes of a mesh share, as text and as a Noise key.

Who holds it can join. llamesh makes 32 random bytes, written in base64. A person may choose a
passphrase instead. Whoever answers a node's dialling can try passphrases against what it sent,
offline and as fast as it can compute, so a passphrase is stretched and random bytes needn't be.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import secrets

TOKEN_BYTES = 32
SHORTEST, LONGEST = 16, 256

# Part of the wire format: nodes that derive differently can't talk.
_LABEL = b"llamesh cluster token v1"
# 16 MiB and some 50 ms, once in the life of a node.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**14, 8, 1


def new_token() -> str:
    """A fresh token: 44 characters."""
    return base64.b64encode(secrets.token_bytes(TOKEN_BYTES)).decode("ascii")


def checked_token(text: str) -> str:
    """The token without blanks around it. Raises ValueError, which never repeats it."""
    token = text.strip()
    if not token:
        raise ValueError("is empty")
    if not token.isascii() or not token.isprintable():
        raise ValueError("holds characters that aren't printable ASCII")
    if not SHORTEST <= len(token) <= LONGEST:
        raise ValueError(f"has {len(token)} characters, not {SHORTEST} to {LONGEST}")
    return token


def derive(token: str) -> bytes:
    """The 32 bytes that are mixed into the handshake, for a token that `checked_token` returned.

    For random bytes in base64 it is HMAC-SHA256 of the text under a label (the extract step of HKDF,
    RFC 5869), for any other text scrypt (RFC 7914) with that label as salt.
    """
    if _is_random(token):
        return hmac.digest(_LABEL, token.encode("ascii"), "sha256")
    return hashlib.scrypt(
        token.encode("ascii"), salt=_LABEL, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P, dklen=TOKEN_BYTES
    )


def same_token(one: str, other: str) -> bool:
    """Whether two tokens are the same, in constant time."""
    return hmac.compare_digest(one.encode("utf-8"), other.encode("utf-8"))


def _is_random(token: str) -> bool:
    try:
        raw = base64.b64decode(token, validate=True)
    except (binascii.Error, ValueError):
        return False
    return len(raw) == TOKEN_BYTES
