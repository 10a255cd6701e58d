"""`llamesh token` and `llamesh key`: print what another node needs, or make it anew."""

from __future__ import annotations

from collections.abc import Mapping

from llamesh.commands.saying import aside, at_terminal, out
from llamesh.config.settings import Settings
from llamesh.mesh.identity import load_identity, public_key
from llamesh.mesh.key_store import PREVIOUS_TOKEN_SECONDS, KeyStore
from llamesh.mesh.trust import fingerprint, key_text

_DAYS = round(PREVIOUS_TOKEN_SECONDS / 86_400)


def token(settings: Settings, environ: Mapping[str, str], rotate: bool) -> int:
    """Print the cluster token, a new one if it is to be rotated. Raises IdentityError."""
    store = KeyStore(settings, environ)
    if rotate:
        out(store.rotate_token())
        aside(
            f"The former token is accepted for {_DAYS} days more. A node of this key store uses the new one "
            "after its next start. Then run `llamesh invite` here, and `llamesh join --force -` on every "
            "other machine."
        )
    else:
        out(store.token())
        if at_terminal():
            aside(
                "Secret: who has it can join. Other nodes take it from their cluster_token file, from "
                "CLUSTER_TOKEN, or with all the rest by `llamesh invite` here and `llamesh join` there."
            )
    return 0


def key(settings: Settings, environ: Mapping[str, str], rotate: bool) -> int:
    """Print the node's public key as allowed_keys takes it. Raises IdentityError."""
    if rotate:
        store = KeyStore(settings, environ)
        public = public_key(store.rotate_key())
        out(key_text(public))
        aside(
            "The node uses the new key after its next start, and proves to peers with "
            f"{store.previous_key_path} that it is still the same node. Where cluster.noise.allowed_keys "
            "lists the former key, add the new one first."
        )
    else:
        identity = load_identity(settings, environ)
        public = identity.public
        out(identity.public_text)
        if at_terminal():
            aside("Not a secret: the line for cluster.noise.allowed_keys of other nodes.")
    if at_terminal():
        aside(f"Fingerprint, to compare by eye or by telephone: {fingerprint(public)}")
    return 0
