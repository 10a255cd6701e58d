"""The one line that lets another machine in: `llamesh1:` and base64url.

Inside: a JSON object with `id` (the inviter's node id), `key` (its public key as in allowed_keys),
`token` (the cluster token) and `at` (where it may be reached, `host:port`), then the first 6 bytes of
that object's SHA-256, so that a line that was cut short while copying is known as such. Members are
only ever added, and unknown ones are ignored; a change that older nodes can't read gets `llamesh2:`.

The line is a secret: who has it can join.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from llamesh.config.settings import Address
from llamesh.mesh.cluster_token import checked_token
from llamesh.mesh.trust import is_node_id, key_bytes, key_text

MOST_ADDRESSES = 16
# With 16 names of 253 characters it stays below; a terminal in line mode takes 4,095 at a time.
LONGEST_LINE = 8192

_NAME = "llamesh"
_PREFIX = f"{_NAME}1:"
_CHECK_BYTES = 6
_CUT = "it was cut short or changed while it was copied; copy the whole line again"


class BadInvitation(ValueError):
    """Not an invitation that this version takes; the message says why, and never holds any of it."""


@dataclass(frozen=True, slots=True)
class Invitation:
    """What an invitation says. `token` is the cluster token's text, `key` 32 bytes."""

    node_id: str
    key: bytes
    token: str = field(repr=False)
    addresses: tuple[Address, ...]


class _Wire(msgspec.Struct):
    id: str
    key: str
    token: str
    at: list[str]


def encode(node_id: str, key: bytes, token: str, addresses: Sequence[Address]) -> str:
    """The line. Of too many addresses the first MOST_ADDRESSES stand in it."""
    at = [str(address) for address in addresses[:MOST_ADDRESSES]]
    content = msgspec.json.encode(_Wire(node_id, key_text(key), token, at))
    return _PREFIX + _base64(content + _check(content))


def decode(line: str) -> Invitation:
    """Read a line; blanks and quotes that copying added are ignored. Raises BadInvitation."""
    if len(line) > LONGEST_LINE:
        raise BadInvitation(f"it is longer than {LONGEST_LINE} characters; is it the right text?")
    # Mail and terminals break long lines.
    text = re.sub(r"[\s'\"`]+", "", line)
    if not text:
        raise BadInvitation(f"it is empty; it starts with {_PREFIX}")
    if not text.startswith(_PREFIX):
        if re.match(rf"{_NAME}[0-9]+:", text):
            raise BadInvitation(
                "it was made by another version of llamesh; install the same on both machines"
            )
        raise BadInvitation(
            f"it doesn't start with {_PREFIX}; `llamesh invite` on the other machine prints it"
        )
    content = _content(text.removeprefix(_PREFIX))
    try:
        wire = msgspec.json.decode(content, type=_Wire)
        if not is_node_id(wire.id):
            raise BadInvitation("what it says is no node id")
        key = key_bytes(wire.key)
        token = checked_token(wire.token)
        if len(wire.at) > MOST_ADDRESSES:
            raise BadInvitation(f"it holds more than {MOST_ADDRESSES} addresses")
        addresses = tuple(dict.fromkeys(_address(text) for text in wire.at))
    except BadInvitation:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError):
        # Never with the error's own words: they may quote it.
        raise BadInvitation("it doesn't hold what an invitation holds; make a new one") from None
    return Invitation(wire.id, key, token, addresses)


def _content(text: str) -> bytes:
    try:
        raw = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise BadInvitation(_CUT) from None
    content, check = raw[:-_CHECK_BYTES], raw[-_CHECK_BYTES:]
    if not content or not hmac.compare_digest(check, _check(content)) or _base64(raw) != text:
        raise BadInvitation(_CUT)
    return content


def _address(text: str) -> Address:
    address = Address.parse(text)
    if not address.port:
        raise ValueError("port 0")
    return address


def _base64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _check(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:_CHECK_BYTES]
