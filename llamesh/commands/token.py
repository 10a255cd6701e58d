"""`llamesh token`: print the cluster token, or make it anew."""

from __future__ import annotations

import os

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, at_terminal, out
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import PREVIOUS_TOKEN_SECONDS, KeyStore

_DAYS = round(PREVIOUS_TOKEN_SECONDS / 86_400)


@make(
    ("llamesh token", "the same on all nodes"), ("llamesh token --rotate", "then `invite` and `join` again")
)
@click.option("--rotate", is_flag=True, help="make a new one; the former one is accepted for a while")
@files_options()
def command(rotate: bool, files: Files) -> int:
    """Print the cluster token, the secret that all nodes of a mesh share; make one where there is none."""
    try:
        _token(KeyStore(files.settings(), os.environ), rotate)
    except IdentityError as error:
        raise Failed(str(error)) from None
    return exit_codes.OK


def _token(store: KeyStore, rotate: bool) -> None:
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
