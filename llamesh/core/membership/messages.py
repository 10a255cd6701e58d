"""What members write to each other: JSON, versioned, append-only.

A message is a head and sections, each of which may be missing:

    v        major version of this format; another one can't be read
    s        how many messages of this exchange went before
    me       [epoch, incarnation, version, rank]: the sender's own life and its own last version
    you      [epoch, incarnation, rank]: what the sender thinks of the receiver, where that isn't what it said
    lives    [[id, epoch, incarnation, rank], ...]: rumours, and corrections
    root, n  hash over all that the sender tells, 16 hex digits, and of how many nodes
    bits, hashes     hashes of 2 ** bits buckets, 12 hex digits each, one after the other
    bits, buckets    the buckets that digests, want and more speak of
    digests  [[id, epoch, incarnation, version, rank], ...]: all that the sender knows in those buckets
    want     [[id, epoch, version], ...]: send me what comes after that
    deltas   [[id, epoch, incarnation, rank, after, upto, writes, deletions], ...]: what a node wrote after
             version `after`, complete up to `upto`; writes [[key, version, value], ...], deletions
             [[key, version], ...]
    more     the deltas were cut; ask again
    rest     there are buckets that differ and that this exchange hasn't spoken of

Members may be added to the message and at the end of the lists; who doesn't know them ignores them. Nothing
of a message counts before all of it was checked.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec

from llamesh.core.membership.digest import BUCKET_HEX, MAX_BITS
from llamesh.core.membership.options import MAX_STEPS
from llamesh.core.membership.records import Entry, Life, Rank

FORMAT = 1
MAX_MESSAGE = 1 << 20  # bytes; the largest budget, one entry above it, and room for what later versions add
MAX_EPOCH = 1 << 52  # exact in every JSON reader, and far beyond any clock
MAX_INCARNATION = 1 << 40
MAX_VERSION = 1 << 52
MAX_NESTING = 64  # of a value
MAX_VALUE = 65_536  # bytes of JSON text
MAX_KEY = 128  # characters

Id = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
Key = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f]{1,128}\Z")]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=MAX_EPOCH)]
Incarnation = Annotated[int, msgspec.Meta(ge=0, le=MAX_INCARNATION)]
Version = Annotated[int, msgspec.Meta(ge=0, le=MAX_VERSION)]
Number = Annotated[int, msgspec.Meta(ge=0, le=255)]


class BadMessage(Exception):
    """A message that can't be used; nothing of it was. The text is for people."""


class Me(msgspec.Struct, array_like=True, frozen=True):
    """The sender's own life."""

    epoch: Epoch
    incarnation: Incarnation
    version: Version
    rank: Number = 0


class You(msgspec.Struct, array_like=True, frozen=True):
    """What the sender thinks of the receiver."""

    epoch: Epoch
    incarnation: Incarnation
    rank: Number


class LifeOf(msgspec.Struct, array_like=True, frozen=True):
    """A claim about somebody's life."""

    id: Id
    epoch: Epoch
    incarnation: Incarnation
    rank: Number


class Digest(msgspec.Struct, array_like=True, frozen=True):
    """What the sender knows of a node, in short."""

    id: Id
    epoch: Epoch
    incarnation: Incarnation
    version: Version
    rank: Number = 0


class Want(msgspec.Struct, array_like=True, frozen=True):
    """A request for what comes after a version."""

    id: Id
    epoch: Epoch
    version: Version


class Write(msgspec.Struct, array_like=True, frozen=True):
    """One entry; the value is JSON as it stands."""

    key: Key
    version: Version
    value: msgspec.Raw


class Deletion(msgspec.Struct, array_like=True, frozen=True):
    """One entry that was deleted."""

    key: Key
    version: Version


class Delta(msgspec.Struct, array_like=True, frozen=True):
    """Part of a node's state."""

    id: Id
    epoch: Epoch
    incarnation: Incarnation
    rank: Number
    after: Version
    upto: Version
    writes: list[Write]
    deletions: list[Deletion] = []

    def entries(self) -> dict[str, Entry]:
        """The entries as records hold them; the bytes are copied out of the message."""
        entries = {one.key: Entry(one.version, bytes(one.value)) for one in self.writes}
        entries.update({one.key: Entry(one.version, None) for one in self.deletions})
        return entries


class Message(msgspec.Struct, omit_defaults=True, kw_only=True):
    """See the module. What is None or empty isn't sent."""

    v: int
    s: Annotated[int, msgspec.Meta(ge=0, le=MAX_STEPS)] = 0
    me: Me
    you: You | None = None
    lives: list[LifeOf] = []
    root: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}\Z")] | None = None
    n: Annotated[int, msgspec.Meta(ge=0, le=1 << 32)] = 0
    bits: Annotated[int, msgspec.Meta(ge=0, le=MAX_BITS)] = 0
    hashes: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]*\Z")] | None = None
    buckets: list[Number] = []
    digests: list[Digest] | None = None
    want: list[Want] = []
    deltas: list[Delta] = []
    more: bool = False
    rest: bool = False

    @property
    def life(self) -> Life:
        """The sender's own; of itself it can only say that it lives or left."""
        return Life(
            self.me.epoch, self.me.incarnation, Rank.LEFT if self.me.rank >= Rank.LEFT else Rank.ALIVE
        )

    @property
    def kind(self) -> str:
        """What it mostly carries, for counting."""
        if self.me.rank >= Rank.LEFT:
            return "leave"
        if self.deltas or self.want:
            return "deltas"
        if self.digests is not None:
            return "digests"
        if self.hashes is not None:
            return "hashes"
        return "root" if self.root is not None else "end"


class _Versioned(msgspec.Struct):
    v: Any = None


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Message)
_any = msgspec.json.Decoder()
_versioned = msgspec.json.Decoder(_Versioned)
_strings = re.compile(rb'"(?:[^"\\]|\\.)*"')


def encode(message: Message) -> bytes:
    """JSON in UTF-8."""
    return _encoder.encode(message)


def decode(data: bytes) -> Message:
    """A message that is whole and within all limits. Raises BadMessage."""
    if len(data) > MAX_MESSAGE:
        raise BadMessage(f"a gossip message of {len(data)} bytes; at most {MAX_MESSAGE} are read")
    try:
        data.decode()
        message = _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        _check_format(data)
        raise BadMessage(f"a malformed gossip message: {error}") from None
    if message.v != FORMAT:
        raise BadMessage(_other_format(message.v))
    _check(message)
    return message


def _other_format(said: object) -> str:
    return (
        f"a gossip message of format {said!r:.40}; this node speaks {FORMAT}."
        " Run the same major version of llamesh on both nodes"
    )


def _check_format(data: bytes) -> None:
    """Another major version may look different everywhere else, and that is then what is wrong."""
    try:
        said = _versioned.decode(data).v
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return
    if isinstance(said, int) and said != FORMAT:
        raise BadMessage(_other_format(said)) from None


def _check(message: Message) -> None:
    if message.hashes is not None and len(message.hashes) != BUCKET_HEX << message.bits:
        raise BadMessage(
            f"a gossip message with {message.bits} bits and {len(message.hashes)} digits of hashes"
        )
    if any(bucket >> message.bits for bucket in message.buckets):
        raise BadMessage(f"a gossip message about a bucket beyond its {message.bits} bits")
    for delta in message.deltas:
        _check_delta(delta)


def _check_delta(delta: Delta) -> None:
    seen: set[str] = set()
    taken: set[int] = set()
    entries = [(one.key, one.version) for one in delta.writes]
    for key, version in entries + [(one.key, one.version) for one in delta.deletions]:
        if not delta.after < version <= delta.upto:
            raise BadMessage(
                f"a delta of {delta.id} with {key!r} at {version}, outside {delta.after} to {delta.upto}"
            )
        if key in seen or version in taken:
            raise BadMessage(f"a delta of {delta.id} with {key!r} or version {version} twice")
        seen.add(key)
        taken.add(version)
    for write in delta.writes:
        try:
            check_value(bytes(write.value))
        except ValueError as error:
            raise BadMessage(f"a delta of {delta.id} with a bad value of {write.key!r}: {error}") from None


def check_id(node_id: str) -> None:
    """Raises ValueError for a node id that nobody would accept."""
    try:
        msgspec.convert(node_id, Id)
    except msgspec.ValidationError:
        raise ValueError(f"a node id has 1 to 64 letters, digits or ._-: {node_id!r:.100}") from None


def check_key(key: str) -> None:
    """Raises ValueError for a key that nobody would accept."""
    try:
        msgspec.convert(key, Key)
    except msgspec.ValidationError:
        raise ValueError(
            f"a key has 1 to {MAX_KEY} characters, none a control character: {key!r:.200}"
        ) from None


def check_value(value: bytes) -> None:
    """Raises ValueError for what isn't JSON text, is too long or too deep."""
    if len(value) > MAX_VALUE:
        raise ValueError(f"{len(value)} bytes; at most {MAX_VALUE} are allowed")
    # A lower number of brackets is proof enough; only then is it worth looking where they stand.
    if value.count(b"[") + value.count(b"{") > MAX_NESTING:
        depth = 0
        for sign in _strings.sub(b"", value):
            if sign in b"[{":
                depth += 1
                if depth > MAX_NESTING:
                    raise ValueError(f"nested deeper than {MAX_NESTING}")
            elif sign in b"]}":
                depth -= 1
    try:
        value.decode()
        _any.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON: {error}") from None


def me_of(life: Life, version: int) -> Me:
    """A life as the head of a message has it."""
    return Me(life.epoch, life.incarnation, version, life.rank)
