"""Which node a command talks to, and the key that it shows there."""

from __future__ import annotations

import os
import ssl
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from llamesh.commands.shared.client import PATIENCE_SECONDS, Client, Place
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import Files, files_options
from llamesh.config.environment import KEY_VARIABLE, URL_VARIABLE

if TYPE_CHECKING:
    from llamesh.config.settings import Settings


_MOST_KEY_BYTES = 4096

# What a command likes to know besides, and can do without.
_STATE_SECONDS = 2.0
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Reach:
    """What the options and the environment say of the node."""

    files: Files
    url: str | None = None
    key_file: str | None = None
    cacert: Path | None = None

    def client(self, seconds: float = PATIENCE_SECONDS) -> Client:
        """A client of it. `seconds`: how long an answer may take. Raises Failed, click.UsageError."""
        key = _key_in(self.key_file) if self.key_file else os.environ.get(KEY_VARIABLE)
        if key and not (key.isascii() and key.isprintable()):
            where = f"the file {self.key_file}" if self.key_file else KEY_VARIABLE
            raise Failed(f"{where} holds what can't be sent as a key")
        url = self.url or os.environ.get(URL_VARIABLE)
        if url:
            # A key of the configuration is for its own node, and isn't shown to another.
            return Client(_place_of(url, self.cacert), key, seconds)
        settings = self.files.settings()
        return Client(_own_place(settings), key or _own_key(settings), seconds)


def read_state(settings: Settings, environ: Mapping[str, str]) -> dict[str, Any]:
    """`GET /api/v1/state` of the node of these settings; empty where none answers within two seconds."""
    try:
        key = environ.get(KEY_VARIABLE) or _own_key(settings)
        return Client(_own_place(settings), key, _STATE_SECONDS).get("/api/v1/state")
    except (Failed, ValueError):  # the latter: a key that can't be sent
        return {}


def node_options(function: Callable[..., int]) -> Callable[..., int]:
    """`--url`, `--key-file`, `--cacert`, `--config` and `--secrets`; the function gets `reach`."""

    @wraps(function)
    def called(**given: Any) -> int:
        files, url = given.pop("files"), given.pop("url")
        reach = Reach(files, url, given.pop("key_file"), given.pop("cacert"))
        return function(**given, reach=reach)

    # From the last to the first, as click wants it.
    decorated: Any = files_options()(called)
    decorated = click.option(
        "--cacert",
        type=click.Path(path_type=Path),
        metavar="PATH",
        help="certificate that the node's must come from, or be (with --url https://...)",
    )(decorated)
    decorated = click.option(
        "--key-file",
        metavar="PATH",
        help=f"file with the key, `-`: read it from stdin (default: {KEY_VARIABLE}, then the configuration). "
        "Never on the command line: others can read that",
    )(decorated)
    decorated = click.option(
        "--url",
        metavar="URL",
        help=f"where the node answers (default: {URL_VARIABLE}, then listen_addr of the configuration)",
    )(decorated)
    result: Callable[..., int] = decorated
    return result


def _key_in(path: str) -> str:
    try:
        if path == "-":
            raw = sys.stdin.buffer.read(_MOST_KEY_BYTES)
        else:
            with Path(path).open("rb") as source:
                raw = source.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise Failed(f"--key-file {path} can't be read: {error.strerror}") from None
    key = raw.decode("utf-8", "replace").strip()
    if not key:
        raise Failed(f"--key-file {path} is empty: it must hold the key, and nothing else")
    return key


def _place_of(url: str, cacert: Path | None) -> Place:
    text = url if "://" in url else f"http://{url}"
    try:
        parts = urlsplit(text)
        port, host = parts.port, parts.hostname
    except ValueError:
        port = host = None
    if parts.scheme not in _DEFAULT_PORTS or not host or parts.query or parts.fragment:
        raise click.UsageError(f"not the address of a node: {url[:80]!r}; such as http://192.0.2.7:8080")
    if parts.username or parts.password:
        raise click.UsageError(f"a key doesn't belong into the address: use {KEY_VARIABLE} or --key-file")
    context = _trusting(cacert) if parts.scheme == "https" else None
    return Place(host, port or _DEFAULT_PORTS[parts.scheme], parts.path.rstrip("/"), context)


def _trusting(cacert: Path | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=cacert)
    except (OSError, ssl.SSLError) as error:
        reason = error.strerror or "no certificate in it"
        raise Failed(f"--cacert {cacert} can't be used: {reason}") from None
    if cacert is not None:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _own_place(settings: Settings) -> Place:
    address = settings.listen_addr
    if not address.port:
        raise Failed(
            "listen_addr has port 0, so the node's port isn't known here; "
            "set LLAMESH_LISTEN_ADDR to the address that its log names"
        )
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address.host, address.host)
    tls = settings.server_tls
    context = None
    if tls.enabled:
        # It is the node's own certificate or nobody's; the name in it is for others.
        context = ssl.create_default_context(cafile=str(tls.cert_path))
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return Place(host, address.port, "", context, settings.node_id)


def _own_key(settings: Settings) -> str | None:
    """The first key that may administer and isn't only known by its digest."""
    if not settings.auth.enabled:
        return None
    for key in settings.auth.administrators():
        text = key.get_secret_value()
        if not text.startswith("sha256:"):
            return text
    return None
