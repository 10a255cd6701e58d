"""Names of models on the hub and on the web, as people write them: what is one, and what is a trap.

They become paths on this machine and addresses that are called, so each is checked before it is used,
wherever it comes from: the cookbook, the command line, or what a hub answers. A `BadName` says what is
wrong and what would be right; `message` never repeats more than the start of the name.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import unquote, urlsplit

# The hub's own rules: 96 characters at most, no `--`, no `..`, nothing odd at either end.
_REPO = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?/[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_QUANT = re.compile(r"[A-Za-z0-9_](?:[\w.-]*[A-Za-z0-9_])?", re.ASCII)
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_MOST_REPO = 96
_MOST_QUANT = 64
_MOST_FILE = 512
_MOST_PART = 240  # bytes of one name; file systems take 255, and we add endings of our own
_MOST_URL = 2048


class BadName(ValueError):
    """The name can't be used. `message`: what is wrong; `hint`: what would be right."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message} ({hint})")
        self.message = message
        self.hint = hint


def split_repo(text: str) -> tuple[str, str | None]:
    """`owner/name` or `owner/name:quantisation`: the repository, and the quantisation if there is one.

    Raises BadName.
    """
    repo, colon, quant = text.partition(":")
    hint = "owner/name, or owner/name:quantisation"
    usable = _REPO.fullmatch(repo) and len(repo) <= _MOST_REPO and "--" not in repo and ".." not in repo
    if not usable or repo.endswith(".git"):
        raise BadName(f"not a repository: {_shown(text)}", hint)
    if colon and (not _QUANT.fullmatch(quant) or len(quant) > _MOST_QUANT):
        raise BadName(f"not a quantisation: {_shown(quant)}", "such as owner/name:Q4_K_M")
    return repo, quant or None


def check_file(name: str) -> str:
    """The name of a file below a repository's root, as it is. Raises BadName for what leads elsewhere."""
    hint = "its path below the repository's root"
    parts = name.split("/")
    bad = (
        not name
        or len(name) > _MOST_FILE
        or any(part in ("", ".", "..") for part in parts)
        or any(len(part.encode("utf-8", "replace")) > _MOST_PART for part in parts)
        or "\\" in name
        or any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name)
        or any(0xD800 <= ord(letter) < 0xE000 for letter in name)
    )
    if bad:
        raise BadName(f"not a file of a repository: {_shown(name)}", hint)
    return name


def check_url(text: str) -> str:
    """The address of a model file, as it is. Raises BadName.

    `https://`, without user and password; `http://` for this machine itself only.
    """
    hint = "such as https://example.org/models/name.gguf"
    if len(text) > _MOST_URL or not text.isascii() or not text.isprintable() or " " in text:
        raise BadName(f"not an address: {_shown(text)}", hint)
    try:
        parts = urlsplit(text)
        _ = parts.port  # raises when it isn't a port
    except ValueError:
        raise BadName(f"not an address: {_shown(text)}", hint) from None
    host = parts.hostname or ""
    if parts.username is not None or parts.password is not None:
        # Not repeated: it may hold a password.
        raise BadName("the address holds a user or a password", hint)
    if parts.fragment:
        raise BadName(f"the address holds a `#`: {_shown(text)}", hint)
    if not host or parts.scheme not in ("http", "https"):
        raise BadName(f"not an address: {_shown(text)}", hint)
    if parts.scheme == "http" and not is_loopback(host):
        raise BadName(f"the address isn't https: {_shown(text)}", hint)
    return text


def check_sha256(text: str) -> str:
    """A SHA-256 in lower case. Raises BadName."""
    if not _SHA256.fullmatch(text):
        raise BadName(f"not a SHA-256: {_shown(text)}", "64 hexadecimal digits, as `sha256sum` prints them")
    return text.lower()


def file_of_url(url: str) -> str:
    """The name of the file that a checked address ends in; `model.gguf` where that is no name."""
    name = unquote(urlsplit(url).path).rpartition("/")[2]
    try:
        return check_file(name)
    except BadName:
        return "model.gguf"


def is_loopback(host: str) -> bool:
    """Whether only this machine answers at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
