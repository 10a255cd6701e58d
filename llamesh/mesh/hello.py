"""What two nodes tell each other first, inside the encryption: HELLO, WELCOME, REFUSED.

All three are JSON objects of at most 8 KiB. Members that this version doesn't know are ignored, those
that it knows are checked strictly: whoever sends them has proven a key, not good manners.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Annotated, Final, Literal, Protocol, TypeAlias, TypeVar, get_args

import msgspec

from llamesh.mesh.trust import ItsMe

MAX_HELLO: Final = 8_192
MAX_ADDRESSES: Final = 32
MAX_REASON: Final = 1_000

Purpose = Literal["send", "park", "tunnel"]
PURPOSES: Final[tuple[Purpose, ...]] = get_args(Purpose)

# \Z, not $: that would let a line end through.
_NodeId: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9._-]{1,64}\Z")]
_Version: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,64}\Z")]
_AddressText: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"\A[!-~]{1,262}\Z")]
_Epoch: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Port: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=65_535)]
_Bytes32: TypeAlias = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
_Addresses: TypeAlias = Annotated[list[_AddressText], msgspec.Meta(max_length=MAX_ADDRESSES)]

_ADDRESS = re.compile(r"[!-~]{1,262}")


class Identity(Protocol):
    """The part of `identity.Identity` that a handshake needs. Keys are X25519, 32 bytes; so are tokens."""

    @property
    def node_id(self) -> str: ...
    @property
    def private(self) -> bytes: ...
    @property
    def public(self) -> bytes: ...
    @property
    def previous_private(self) -> bytes | None: ...
    @property
    def token(self) -> bytes: ...
    @property
    def previous_token(self) -> bytes | None: ...


class Refused(ConnectionError):
    """The other node said no. The message is for people: what it said, and who it is."""


class BadHello(Exception):
    """A HELLO or a WELCOME that breaks the rules above. The message is for people."""


@dataclass(frozen=True, slots=True)
class Hello:
    """The dialler's first record.

    `purpose`: "send" (the dialler will send requests), "park" (the acceptor may), "tunnel" (raw
    bytes). `epoch`: grows with each start of the node. `port`: where it listens, 0 = nowhere that it
    knows of. `addresses`: where it believes to be reachable, "host:port". `previous_key` and `proof`:
    see `noise.rotation_proof`; `dial` fills them in.
    """

    node_id: str
    purpose: str
    version: str
    epoch: int
    port: int = 0
    addresses: tuple[str, ...] = ()
    previous_key: bytes | None = None
    proof: bytes | None = None


@dataclass(frozen=True, slots=True)
class Welcome:
    """The acceptor's answer. `seen_from`: the dialler's address as the acceptor sees it."""

    node_id: str
    version: str
    epoch: int
    seen_from: str
    port: int = 0
    addresses: tuple[str, ...] = ()
    previous_key: bytes | None = None
    proof: bytes | None = None


class _HelloRecord(msgspec.Struct, omit_defaults=True):
    node_id: _NodeId
    purpose: Purpose
    version: _Version
    epoch: _Epoch
    port: _Port = 0
    addresses: _Addresses = []
    previous_key: _Bytes32 | None = None
    proof: _Bytes32 | None = None


class _WelcomeRecord(msgspec.Struct, omit_defaults=True):
    node_id: _NodeId
    version: _Version
    epoch: _Epoch
    seen_from: _AddressText
    port: _Port = 0
    addresses: _Addresses = []
    previous_key: _Bytes32 | None = None
    proof: _Bytes32 | None = None


class _RefusedRecord(msgspec.Struct, omit_defaults=True):
    message: Annotated[str, msgspec.Meta(max_length=MAX_REASON)]
    itself: bool = False


_hello = msgspec.json.Decoder(_HelloRecord)
_welcome = msgspec.json.Decoder(_WelcomeRecord)
_refused = msgspec.json.Decoder(_RefusedRecord)
_encode = msgspec.json.Encoder().encode

_Either = TypeVar("_Either", Hello, Welcome)


def encode_hello(hello: Hello) -> bytes:
    """The JSON of a HELLO. Raises BadHello for one that the other side would refuse."""
    return _encode_either(hello)


def encode_welcome(welcome: Welcome) -> bytes:
    """The JSON of a WELCOME. Raises BadHello for one that the other side would refuse."""
    return _encode_either(welcome)


def _encode_either(greeting: Hello | Welcome) -> bytes:
    # Addresses are hints for the other side: those that don't fit are left out, the rest must be right.
    addresses = [text for text in greeting.addresses if _ADDRESS.fullmatch(text)][:MAX_ADDRESSES]
    while True:
        data = _encode(replace(greeting, addresses=tuple(addresses)))
        if len(data) <= MAX_HELLO or not addresses:
            break
        addresses.pop()
    if isinstance(greeting, Hello):
        decode_hello(data)
    else:
        decode_welcome(data)
    return data


def decode_hello(data: bytes) -> Hello:
    """Raises BadHello."""
    record = _decode(_hello, data, "HELLO")
    return Hello(
        node_id=record.node_id,
        purpose=record.purpose,
        version=record.version,
        epoch=record.epoch,
        port=record.port,
        addresses=tuple(record.addresses),
        previous_key=record.previous_key,
        proof=record.proof,
    )


def decode_welcome(data: bytes) -> Welcome:
    """Raises BadHello."""
    record = _decode(_welcome, data, "WELCOME")
    return Welcome(
        node_id=record.node_id,
        version=record.version,
        epoch=record.epoch,
        seen_from=record.seen_from,
        port=record.port,
        addresses=tuple(record.addresses),
        previous_key=record.previous_key,
        proof=record.proof,
    )


_Record = TypeVar("_Record", _HelloRecord, _WelcomeRecord)


def _decode(decoder: msgspec.json.Decoder[_Record], data: bytes, what: str) -> _Record:
    if len(data) > MAX_HELLO:
        raise BadHello(f"a {what} of more than {MAX_HELLO} bytes")
    try:
        record = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadHello(f"a {what} that isn't understood: {readable(str(error))}") from None
    if (record.previous_key is None) != (record.proof is None):
        raise BadHello(f"a {what} with half a proof of a previous key")
    return record


def encode_refusal(error: Exception) -> bytes:
    """The JSON of a REFUSED record: why, for the people over there."""
    message = readable(str(error))[:MAX_REASON]
    return _encode(_RefusedRecord(message, itself=isinstance(error, ItsMe)))


def decode_refusal(data: bytes, who: str, *, own_key: bool) -> Exception:
    """What to raise for a REFUSED record: Refused, or ItsMe if the other end has our key and says so."""
    try:
        if len(data) > MAX_HELLO:
            raise msgspec.DecodeError
        record = _refused.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Refused(f"{who} refuses this node and gives no readable reason")
    message = readable(record.message)
    if record.itself and own_key:
        return ItsMe(message)
    return Refused(f"{who} refuses this node: {message}")


def readable(text: str) -> str:
    """Text of another node as it may be shown: on one line, with nothing that steers a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)
