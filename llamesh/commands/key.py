"""`llamesh key`: print this node's public key, or make it anew."""

from __future__ import annotations

import os

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, at_terminal, out
from llamesh.config.settings import Settings
from llamesh.mesh.identity import load_identity, public_key
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import KeyStore
from llamesh.mesh.trust import fingerprint, key_text


@make(("llamesh key", "as cluster.noise.allowed_keys of other nodes takes it"))
@click.option("--rotate", is_flag=True, help="make a new one; the former one is accepted for a while")
@files_options()
def command(rotate: bool, files: Files) -> int:
    """Print this node's public key as cluster.noise.allowed_keys of other nodes takes it."""
    try:
        _key(files.settings(), rotate)
    except IdentityError as error:
        raise Failed(str(error)) from None
    return exit_codes.OK


def _key(settings: Settings, rotate: bool) -> None:
    if rotate:
        store = KeyStore(settings, os.environ)
        public = public_key(store.rotate_key())
        out(key_text(public))
        aside(
            "The node uses the new key after its next start, and proves to peers with "
            f"{store.previous_key_path} that it is still the same node. Where cluster.noise.allowed_keys "
            "lists the former key, add the new one first."
        )
    else:
        identity = load_identity(settings, os.environ)
        public = identity.public
        out(identity.public_text)
        if at_terminal():
            aside("Not a secret: the line for cluster.noise.allowed_keys of other nodes.")
    if at_terminal():
        aside(f"Fingerprint, to compare by eye or by telephone: {fingerprint(public)}")
