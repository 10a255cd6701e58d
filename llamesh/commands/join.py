"""`llamesh join LINE`: make this machine's node a part of the mesh that an invitation comes from.

Everything is looked at before anything is written: the line, the configuration as it will be, the
token and the pins that are here already. Then the token, the inviter's key and config.yaml are
written, and every address of the invitation is dialled.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import sys
from dataclasses import replace
from pathlib import Path

import click

from llamesh.commands import config_edit
from llamesh.commands.add import EMPTY_COOKBOOK, write_new
from llamesh.commands.config_edit import CannotEdit
from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.dialling import reach
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import Files, files_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, fail, out
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings, load_settings
from llamesh.mesh.cluster_token import same_token
from llamesh.mesh.identity import Identity, load_identity
from llamesh.mesh.invitation import LONGEST_LINE, BadInvitation, Invitation, decode
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import TOKEN_VARIABLE, KeyStore
from llamesh.mesh.known_peers import KnownPeers, known_peers
from llamesh.mesh.trust import Claim, NotTrusted, fingerprint, key_text


class CannotJoin(Exception):
    """Why not, for people."""


@make(
    ("llamesh join -", "asks for the line, which then isn't in the shell's history"),
    epilog="Exit code 3: all is set up, but nobody was reached.",
)
@click.argument("line", metavar="LINE")
@click.option("--force", is_flag=True, help="replace another token or key that is here")
@files_options()
def command(line: str, force: bool, files: Files) -> int:
    """Make this machine's node a part of the mesh that an invitation comes from.

    LINE is what `llamesh invite` printed; `-` asks for it or reads it. Takes over the token and the key, sets
    cluster.enabled and cluster.peers in the configuration, writes an empty cookbook where there is none, and
    looks whether the mesh can be reached.
    """
    try:
        return _join(line, files, force)
    except IdentityError as error:
        raise Failed(str(error)) from None


def _join(line: str, files: Files, force: bool) -> int:
    """0 when the mesh was reached; 3 when all is set up but nobody was; 1 when nothing was done."""
    try:
        invitation = decode(_typed() if line == "-" else line)
    except BadInvitation as error:
        return fail(f"this isn't an invitation: {error}")
    try:
        settings, identity, known = _set_up(invitation, files, force)
    except (ConfigError, CannotEdit) as error:
        aside(str(error))
        return 1
    except (CannotJoin, IdentityError, NotTrusted) as error:
        return fail(error)
    if line != "-":
        aside("That line is a secret, and may now be in your shell's history; `llamesh join -` asks for it.")
    return _look(invitation, settings, identity, known)


def _typed() -> str:
    """The line from standard input: not shown where a person pastes it."""
    if sys.stdin.isatty():
        try:
            return getpass.getpass("Paste the line that `llamesh invite` printed: ")
        except EOFError:
            return ""
    return sys.stdin.buffer.read(LONGEST_LINE + 1).decode("utf-8", "replace")


def _set_up(invitation: Invitation, files: Files, force: bool) -> tuple[Settings, Identity, KnownPeers]:
    # As it is now, so that mistakes are told in the file's own lines.
    settings = _load(files.config, files)
    text = config_edit.read(files.config)
    changed = config_edit.joined(text, str(files.config), invitation.addresses)
    store = KeyStore(settings, os.environ)
    _check_name(invitation, settings)
    known, allowed = known_peers(settings), settings.cluster.noise.allowed_keys
    same_mesh = invitation.key in known.pins().values()
    writes_token = _check_token(invitation, store, force, same_mesh)
    if allowed and key_text(invitation.key) not in allowed:
        raise CannotJoin(
            "cluster.noise.allowed_keys lists the only keys that may come in, and the inviter's isn't among "
            f"them; add {key_text(invitation.key)} to it first"
        )
    try:
        known.trust(invitation.node_id, invitation.key, replace=force)
    except NotTrusted as error:
        raise CannotJoin(f"{error}; `llamesh join --force` replaces it") from None

    unchanged = contextlib.nullcontext(files.config)
    with unchanged if changed == text else config_edit.staged(files.config, changed) as draft:
        settings = _load(draft, files)
        _check_effect(invitation, settings)
        if writes_token:
            # A former token of the same mesh opens doors for some days yet; that of another mesh
            # would let its nodes in here.
            store.adopt_token(invitation.token, keep_previous=same_mesh)
        identity = load_identity(settings, os.environ)
        known.save()
    out(
        f"{settings.node_id} is set up for the mesh of {invitation.node_id} "
        f"(key {fingerprint(invitation.key)}): token in {store.directory}, "
        f"{'changed' if changed != text else 'nothing to change in'} {files.config}."
    )
    _give_cookbook(files.config.with_name("cookbook.yaml"))
    return settings, identity, known


def _give_cookbook(path: Path) -> None:
    """A node needs one to start, and may have nothing of its own to offer: what the mesh has is enough."""
    if not path.exists():
        write_new(path, EMPTY_COOKBOOK)
        out(f"wrote {path}, without models: `llamesh add` brings some, and the mesh has its own.")


def _load(path: Path, files: Files) -> Settings:
    try:
        return load_settings(
            path, files.secrets, os.environ, required=False, secrets_required=files.secrets_required
        )
    except ConfigError as error:
        # The draft has a name and lines of its own, that nobody else knows.
        draft, real = str(path), str(files.config)
        if draft == real:
            raise
        raise ConfigError(
            replace(problem, file=real, line=None) if problem.file == draft else problem
            for problem in error.problems
        ) from None


def _check_name(invitation: Invitation, settings: Settings) -> None:
    if invitation.node_id == settings.node_id:
        raise CannotJoin(
            f"the invitation comes from a node called {invitation.node_id}, and so is this one; "
            "run it on the other machine, or give each node its own node_id"
        )


def _check_token(invitation: Invitation, store: KeyStore, force: bool, same_mesh: bool) -> bool:
    """Whether the token is to be written."""
    present = store.existing_token()
    if present is not None and same_token(present, invitation.token):
        return False
    if store.token_from_environment:
        raise CannotJoin(
            f"{TOKEN_VARIABLE} is set to another token than the invitation's; unset it, or set it to that one"
        )
    if present is not None and not force:
        why = "its token was changed since" if same_mesh else "this node already belongs to a mesh of its own"
        raise CannotJoin(f"{store.token_path} holds another token: {why}. `llamesh join --force` replaces it")
    return True


def _check_effect(invitation: Invitation, settings: Settings) -> None:
    cluster = settings.cluster
    if not cluster.enabled:
        place = settings.origin("cluster", "enabled")
        raise CannotJoin(f"{place.file} sets cluster.enabled to false, over config.yaml; change it there")
    if not cluster.noise.enabled:
        raise CannotJoin("cluster.noise.enabled is false: the mesh speaks Noise only; remove that line")
    present = [peer.address for peer in cluster.peers]
    missing = [str(address) for address in invitation.addresses if address not in present]
    if missing:
        place = settings.origin("cluster", "peers")
        raise CannotJoin(f"{place.file} sets cluster.peers, over config.yaml; add {', '.join(missing)} there")


def _look(invitation: Invitation, settings: Settings, identity: Identity, known: KnownPeers) -> int:
    def check(claim: Claim) -> None:
        if invitation.key not in (claim.key, claim.previous_key):
            raise NotTrusted(
                f"another node than the inviter answers there: {claim.node_id} with key "
                f"{fingerprint(claim.key)}, not {invitation.node_id} with {fingerprint(invitation.key)}"
            )
        known.check(claim, identity)

    outcomes = reach(invitation.addresses, identity, check)
    for outcome in outcomes:
        out(f"{outcome.address}: {outcome.words}")
    claims = [outcome.claim for outcome in outcomes if outcome.claim is not None]
    try:
        for claim in claims:
            known.note(claim)
        known.save()
    except (IdentityError, NotTrusted) as error:
        fail(error)
        return exit_codes.UNREACHABLE
    if claims:
        aside(f"Start {settings.node_id} now; if it runs already, start it again: it takes the token then.")
        return 0
    if outcomes:
        aside(
            f"Nobody was reached yet, but all is set up: {settings.node_id} keeps trying once it is started. "
            f"If the other node takes known keys only, it needs {identity.public_text}"
        )
    else:
        aside(
            f"The invitation has no address: {settings.node_id} finds the mesh on the local network, "
            "or not at all."
        )
    return exit_codes.UNREACHABLE
