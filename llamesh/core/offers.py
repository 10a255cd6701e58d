"""What nodes tell each other about profiles: offers, which seldom change, and situations, which often do.

An *offer* is part of a node's gossiped state, one a profile, under the key `p:model:profile`. A
*situation* isn't gossiped: it rides on probes and on replies, so it costs nothing for nodes that
have nothing to do with each other.

Both are JSON. Members may be added; nothing is ever renamed or used for something else. Members that
a version doesn't know are ignored, members that are missing have the defaults below.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

import msgspec

# An offer's key in the state of its node begins with this.
OFFER_PREFIX = "p:"

_Name: TypeAlias = Annotated[
    str, msgspec.Meta(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f:]*\Z")
]
_Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=4096)]
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
_Amount: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e15)]

Status = Literal["unloaded", "queued", "downloading", "loading", "loaded", "failed"]


class Offer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A profile that a node has. Times are milliseconds; 0 where nothing was learned yet.

    model, profile: as written in its cookbook; aliases: other names of the model; kind: what it is for.
    fingerprint: of weights and arguments: equal ones give equal answers. runs: it may be run there.
    n_ctx: context of an instance in tokens; context_length: what one request may use; n_slots: requests
    at once of one instance; max_instances: how many there may be. load_ms: from a start to ready;
    service_ms: how long a request holds a slot; prefill_ms, decode_ms: per token; output_tokens: of a
    usual answer; sharing: how much a neighbour on the instance slows it, as a share; requests: how many
    these values rest on, of late, told as a power of two; tps: tokens per second of one answer.
    """

    model: _Name
    profile: _Name = "default"
    kind: Literal["text", "embedding", "rerank"] = "text"
    aliases: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=64)] = ()
    description: _Text = ""
    profile_description: _Text = ""
    idle_timeout_seconds: _Amount = 0.0
    fingerprint: Annotated[str, msgspec.Meta(max_length=128)] = ""
    runs: bool = True
    status: str = "unloaded"
    n_ctx: _Count = 0
    n_ctx_train: _Count = 0
    context_length: _Count = 0
    n_slots: _Count = 0
    max_instances: _Count = 1
    load_ms: _Amount = 0.0
    service_ms: _Amount = 0.0
    prefill_ms: _Amount = 0.0
    decode_ms: _Amount = 0.0
    output_tokens: _Amount = 0.0
    sharing: float = -1.0
    requests: _Count = 0
    tps: _Amount = 0.0

    @property
    def key(self) -> str:
        """`model:profile` as written."""
        return f"{self.model}:{self.profile}"

    @property
    def public_name(self) -> str:
        """What lists show: the bare model for its default profile."""
        return self.model if self.profile.casefold() == "default" else self.key


class Situation(msgspec.Struct, frozen=True, omit_defaults=True):
    """How busy one profile is on one node at one moment, told to one peer.

    slots: of its ready instances; others: requests there, running or waiting, that the peer who is
    told did not send itself (it knows its own better); loading_left_ms: until an instance that loads
    is ready, None when none loads; loading_slots: what that will bring; room_ms: what making
    room for one more instance takes, None when there can't be one more now; download_ms: until its
    weights are on that disk; failing: starts of it fail.
    """

    slots: _Count = 0
    others: _Count = 0
    loading_left_ms: _Amount | None = None
    loading_slots: _Count = 0
    room_ms: _Amount | None = 0.0
    download_ms: _Amount = 0.0
    failing: bool = False


# A profile that isn't mentioned: nothing of it runs, and one could be started.
IDLE = Situation()

# More than the profiles of any cookbook that is used; the rest count as idle.
_MOST_PROFILES = 512


class News(msgspec.Struct, omit_defaults=True):
    """The answer to a probe: how the whole node is.

    closed: why it takes no requests of others ("" = it does); profiles: those that aren't `IDLE`, by
    key; dial_back: whether the asker can be dialled from there, None = not tried yet; summary: members of
    the node's entry in `/cluster/nodes`.
    """

    node_id: str = ""
    closed: Annotated[str, msgspec.Meta(max_length=512)] = ""
    profiles: Annotated[dict[str, Situation], msgspec.Meta(max_length=_MOST_PROFILES)] = {}
    dial_back: bool | None = None
    summary: dict[str, Any] = {}


class NodeEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A node's own entry in its gossiped state, under the key `node`.

    addresses: "host:port" under which it may be dialled; serves: "" or why it does nothing for others
    at all; cut: ids of nodes that it can't reach directly; url: of its API, for people.
    """

    version: Annotated[str, msgspec.Meta(max_length=64)] = ""
    engine: Annotated[str, msgspec.Meta(max_length=64)] = ""
    engine_version: Annotated[str, msgspec.Meta(max_length=128)] = ""
    addresses: Annotated[tuple[str, ...], msgspec.Meta(max_length=32)] = ()
    url: Annotated[str, msgspec.Meta(max_length=512)] = ""
    started: _Amount = 0.0
    cut: Annotated[tuple[str, ...], msgspec.Meta(max_length=256)] = ()


NODE_KEY = "node"

_T = TypeVar("_T")

_encode = msgspec.json.encode
_offers = msgspec.json.Decoder(Offer)
_situations = msgspec.json.Decoder(Situation)
_news = msgspec.json.Decoder(News)
_entries = msgspec.json.Decoder(NodeEntry)


def encode(value: Offer | Situation | News | NodeEntry) -> bytes:
    """The JSON of a value of this module."""
    return _encode(value)


def decode_offer(data: bytes) -> Offer | None:
    """An offer of a peer, None where it can't be understood: such a profile isn't used."""
    return _decode(_offers, data)


def decode_situation(data: bytes) -> Situation | None:
    """A situation from a reply's header, None where it can't be understood."""
    return _decode(_situations, data)


def decode_news(data: bytes) -> News | None:
    """The answer to a probe, None where it can't be understood."""
    return _decode(_news, data)


def decode_entry(data: bytes) -> NodeEntry | None:
    """A node's own entry, None where it can't be understood."""
    return _decode(_entries, data)


def _decode(decoder: msgspec.json.Decoder[_T], data: bytes) -> _T | None:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
