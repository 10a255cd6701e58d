"""Where a node's private key and the cluster token are kept, and how they are changed.

`CLUSTER_TOKEN` and `NODE_PRIVATE_KEY` of the environment come before the files. Of each secret
there may be a previous one beside it: the token's is accepted for PREVIOUS_TOKEN_SECONDS after the
change, and the key's proves to peers, for as long as its file is there, that the new key is ours.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import secrets
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llamesh.config.settings import Settings
from llamesh.mesh.cluster_token import checked_token, new_token, same_token
from llamesh.mesh.key_files import (
    IdentityError,
    check_directory,
    create_private,
    locked,
    make_directory,
    read_private,
    replace_private,
)
from llamesh.mesh.trust import KEY_BYTES

TOKEN_VARIABLE = "CLUSTER_TOKEN"  # noqa: S105 - the name of a variable
KEY_VARIABLE = "NODE_PRIVATE_KEY"

# Long enough for a machine that is only on at weekdays to be told the new one.
PREVIOUS_TOKEN_SECONDS = 7 * 86_400.0

_KEY_SYNTAX = f"{KEY_BYTES} bytes in base64, which are 44 characters"


@dataclass(frozen=True, slots=True)
class PreviousToken:
    """The token before the last change. `until`: Unix time at which it stops being accepted."""

    text: str = field(repr=False)
    until: float


class KeyStore:
    """The secrets of one configuration. Every method may raise IdentityError, and blocks on files."""

    def __init__(self, settings: Settings, environ: Mapping[str, str]) -> None:
        noise = settings.cluster.noise
        self.directory = noise.config_dir
        self.token_path = self.directory / "cluster_token"
        self.previous_token_path = self.directory / "cluster_token.previous"
        self.key_path = noise.private_key_path or self.directory / "node.key"
        self.previous_key_path = noise.previous_key_path or self.directory / "node.key.previous"
        self.known_peers_path = noise.known_peers_path or self.directory / "known_peers"
        self._token_given = environ.get(TOKEN_VARIABLE, "").strip()
        self._key_given = environ.get(KEY_VARIABLE, "").strip()

    def __repr__(self) -> str:
        return f"KeyStore({str(self.directory)!r})"

    @property
    def token_from_environment(self) -> bool:
        """Whether CLUSTER_TOKEN is set, so that the file doesn't count."""
        return bool(self._token_given)

    @property
    def key_from_environment(self) -> bool:
        """Whether NODE_PRIVATE_KEY is set, so that the file doesn't count."""
        return bool(self._key_given)

    def token(self) -> str:
        """The cluster token as text; created where there is none."""
        return self.existing_token() or self._create_token()

    def existing_token(self) -> str | None:
        """The cluster token as text, None where there is none yet."""
        if self._token_given:
            return _token(self._token_given, f"environment variable {TOKEN_VARIABLE}")
        return self._token_in(self.token_path)

    def previous_token(self) -> PreviousToken | None:
        """What else is still accepted, if anything."""
        text = self._token_in(self.previous_token_path)
        if text is None:
            return None
        try:
            changed = self.previous_token_path.stat().st_mtime
        except OSError:  # removed meanwhile
            return None
        now = time.time()
        # A time in the future is a clock that was wrong; it mustn't keep the token alive for years.
        until = min(changed, now) + PREVIOUS_TOKEN_SECONDS
        return PreviousToken(text, until) if now < until else None

    def key(self) -> bytes:
        """The X25519 private key, 32 bytes; created where there is none."""
        if self._key_given:
            return _key(self._key_given, f"environment variable {KEY_VARIABLE}")
        found = self._key_in(self.key_path)
        if found is None:
            self._make_room(self.key_path)
            content = create_private(self.key_path, _encoded(secrets.token_bytes(KEY_BYTES)))
            found = _key(_text(content, self.key_path), self.key_path)
        return found

    def previous_key(self) -> bytes | None:
        """The private key before the last change, if its file is there."""
        return self._key_in(self.previous_key_path)

    def rotate_token(self) -> str:
        """Make a new token and keep the present one as the previous; the new one."""
        fresh = new_token()
        self.adopt_token(fresh, keep_previous=True)
        return fresh

    def adopt_token(self, text: str, *, keep_previous: bool) -> None:
        """Make `text` the token. Without `keep_previous`, the present one is worth nothing any more."""
        if self._token_given:
            raise IdentityError(
                f"environment variable {TOKEN_VARIABLE}",
                f"is set, so the token in {self.token_path} doesn't count",
                f"change it there, or unset it; a former token may stay in {self.previous_token_path}",
            )
        token = checked_token(text)
        make_directory(self.directory)
        with locked(self.token_path):
            present = self._token_in(self.token_path)
            if present is not None and same_token(present, token):
                return
            if present is not None and keep_previous:
                replace_private(self.previous_token_path, _line(present))
            elif not keep_previous:
                self._forget(self.previous_token_path)
            replace_private(self.token_path, _line(token))

    def rotate_key(self) -> bytes:
        """Make a new private key and keep the present one as the previous; the new one."""
        if self._key_given:
            raise IdentityError(
                f"environment variable {KEY_VARIABLE}",
                f"is set, so the key in {self.key_path} doesn't count",
                f"change it there, and put the former one into {self.previous_key_path}",
            )
        fresh = secrets.token_bytes(KEY_BYTES)
        for path in (self.key_path, self.previous_key_path):
            self._make_room(path)
        with locked(self.key_path):
            present = self._key_in(self.key_path)
            if present is not None:
                replace_private(self.previous_key_path, _encoded(present))
            replace_private(self.key_path, _encoded(fresh))
        return fresh

    def _create_token(self) -> str:
        make_directory(self.directory)
        content = create_private(self.token_path, _line(new_token()))
        return _token(_text(content, self.token_path), self.token_path)

    def _token_in(self, path: Path) -> str | None:
        content = self._read(path)
        return None if content is None else _token(content, path)

    def _key_in(self, path: Path) -> bytes | None:
        content = self._read(path)
        return None if content is None else _key(content, path)

    def _read(self, path: Path) -> str | None:
        # A file elsewhere was put there by somebody who chose that directory's mode, too.
        if path.parent == self.directory and os.path.lexists(path.parent):
            check_directory(path.parent)
        content = read_private(path)
        return None if content is None else _text(content, path)

    def _make_room(self, path: Path) -> None:
        if path.parent == self.directory or not os.path.lexists(path.parent):
            make_directory(path.parent)

    def _forget(self, path: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                path.unlink()
            except PermissionError as error:
                remedy = f"rm {shlex.quote(str(path))}"
                raise IdentityError(path, f"can't be removed: {error.strerror}", remedy) from None


def _text(content: bytes, path: Path) -> str:
    try:
        text = content.decode("ascii").strip()
    except UnicodeDecodeError:
        raise IdentityError(path, "isn't plain text", _start_again(path)) from None
    if not text:
        raise IdentityError(path, "is empty", _start_again(path))
    return text


def _token(text: str, where: Path | str) -> str:
    try:
        return checked_token(text)
    except ValueError as error:
        raise IdentityError(where, str(error), _start_again(where)) from None


def _key(text: str, where: Path | str) -> bytes:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise IdentityError(where, "isn't base64", f"{_KEY_SYNTAX}; {_start_again(where)}") from None
    if len(key) != KEY_BYTES:
        problem = f"holds {len(key)} bytes"
        raise IdentityError(where, problem, f"{_KEY_SYNTAX}; {_start_again(where)}")
    if not any(key):
        raise IdentityError(where, "holds zeros, which is nobody's key", _start_again(where))
    return key


def _start_again(where: Path | str) -> str:
    if isinstance(where, str):
        return "set it to what `llamesh token` or the node.key of this node says, or unset it"
    return f"restore it, or remove it: rm {shlex.quote(str(where))}"


def _encoded(key: bytes) -> bytes:
    return base64.b64encode(key) + b"\n"


def _line(text: str) -> bytes:
    return text.encode("ascii") + b"\n"
