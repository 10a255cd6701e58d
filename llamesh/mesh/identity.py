"""Who this node is: its id, its X25519 key, and the cluster token that lets it in.

`load_identity` reads what `key_store.KeyStore` keeps, and makes what is missing there. An Identity
never shows a secret: not by `repr`, not by comparison.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from llamesh.config.settings import Settings
from llamesh.mesh.cluster_token import derive, same_token
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import KeyStore
from llamesh.mesh.trust import Claim, ItsMe, NotTrusted, fingerprint, key_text

__all__ = ["Claim", "Identity", "IdentityError", "ItsMe", "NotTrusted", "load_identity", "public_key"]


@dataclass(frozen=True, eq=False, slots=True)
class Identity:
    """A node's own keys. All byte strings are 32 bytes.

    `private` and `previous_private` are X25519 private keys, the latter that of before the last
    rotation. `token` is derived from the cluster token; `previous_token_until` is the Unix time at
    which the former one stops being accepted.
    """

    node_id: str
    private: bytes = field(repr=False)
    token: bytes = field(repr=False)
    previous_private: bytes | None = field(default=None, repr=False)
    former_token: bytes | None = field(default=None, repr=False)
    previous_token_until: float = 0.0
    public: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "public", public_key(self.private))

    def __repr__(self) -> str:
        return f"Identity({self.node_id!r}, {self.public_text!r})"

    @property
    def public_text(self) -> str:
        """The public key as `cluster.noise.allowed_keys` takes it: `noise25519:` and base64."""
        return key_text(self.public)

    @property
    def fingerprint(self) -> str:
        """The public key, short, for people to compare."""
        return fingerprint(self.public)

    @property
    def previous_token(self) -> bytes | None:
        """The token before the last change, while it is accepted."""
        return self.former_token if time.time() < self.previous_token_until else None

    @property
    def tokens(self) -> tuple[bytes, ...]:
        """The tokens to accept from others now, the present one first."""
        previous = self.previous_token
        return (self.token,) if previous is None else (self.token, previous)


def public_key(private: bytes) -> bytes:
    """The X25519 public key of a private one, 32 bytes each (RFC 7748)."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def load_identity(settings: Settings, environ: Mapping[str, str]) -> Identity:
    """Read this node's identity; what is missing is created. Raises IdentityError. Blocks."""
    store = KeyStore(settings, environ)
    token, previous = store.token(), store.previous_token()
    private, previous_private = store.key(), store.previous_key()
    # In the middle of a rotation by somebody else both may be the same.
    if previous is not None and same_token(previous.text, token):
        previous = None
    if previous_private is not None and public_key(previous_private) == public_key(private):
        previous_private = None
    return Identity(
        settings.node_id,
        private,
        derive(token),
        previous_private,
        None if previous is None else derive(previous.text),
        0.0 if previous is None else previous.until,
    )
