"""The document of `GET /api/v1/state`: names and meanings are fixed, members may be added.

Every member is always there; null is "not known". Times are Unix seconds, durations milliseconds, sizes MiB,
speeds tokens a second. A `Part` is what one node says of itself; the document puts those of all nodes
together. Parts travel between nodes, so what comes in is bounded.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

SCHEMA = 1

# What one node tells at most; the rest is left out, the newest requests and events last.
MOST_REQUESTS = 200
MOST_INSTANCES = 500
MOST_MODELS = 512
MOST_CONCERNS = 100
MOST_EVENTS = 100
MOST_DEVICES = 64

# One hour in steps of ten seconds.
STEP = 10
STEPS = 360

Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=2048)]


class Room(msgspec.Struct, frozen=True):
    """Memory of one kind. total: what the machine has; max: what instances may have together; used: by
    anybody; reserved: by our instances, or promised to them; external: by other programs; free: what one more
    instance may take now.
    """

    total: int | None = None
    max: int | None = None
    used: int | None = None
    reserved: int | None = None
    external: int | None = None
    free: int | None = None


class Memory(msgspec.Struct, frozen=True):
    """Of the devices together, and of the machine."""

    vram: Room = Room()
    ram: Room = Room()


class Device(msgspec.Struct, frozen=True):
    """One GPU. utilization: 0 to 1; error: why something isn't known."""

    name: Text
    total: int | None = None
    used: int | None = None
    utilization: float | None = None
    error: Text | None = None


class Link(msgspec.Struct, frozen=True):
    """How the node that was asked reaches another. direct: without a third node; problem: of the last try."""

    direct: bool = False
    round_trip_ms: float | None = None
    connections: int = 0
    forwards_in_flight: int = 0
    forwards_total: int = 0
    lost_total: int = 0
    breaker: Text = ""
    problem: Text | None = None


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """One node. self: it is the one that was asked; ready: it takes requests, reason: why not; started: when;
    last_seen: its last sign of life; fresh: what it says of itself was asked for a moment ago (else it is
    older, and comes from gossip where nothing else is known); queue: requests that wait there, running: those
    that are being answered by its instances; link: null for the node itself. accepts_administration: whether
    operators of other nodes may do something there; drained: by an operator; both null = it never said.
    """

    id: Text
    self: bool = False
    fresh: bool = False
    status: Literal["alive", "suspect", "asleep"] = "alive"
    ready: bool = False
    reason: Text | None = None
    version: Text | None = None
    engine: Text | None = None
    engine_version: Text | None = None
    address: Text | None = None
    started: float | None = None
    last_seen: float | None = None
    memory: Memory = Memory()
    devices: Annotated[list[Device], msgspec.Meta(max_length=MOST_DEVICES)] = []
    queue: int | None = None
    running: int | None = None
    link: Link | None = None
    problems: Annotated[list[Text], msgspec.Meta(max_length=64)] = []
    accepts_administration: bool | None = None
    drained: bool | None = None


Level = Literal["error", "warning"]
CellState = Literal["loaded", "loading", "fits", "needs_eviction", "missing", "never", "failed", "unknown"]


class Cell(msgspec.Struct, frozen=True):
    """A model on a node. state: `fits`: it could be started now; `needs_eviction`: others would have to leave
    first, or there is no room at the moment (`why`); `missing`: its file isn't there, or has to be
    downloaded first; `never`: it can't or may not run there; `failed`: its last starts failed. instances:
    how many aren't gone; tps: of one answer, a mean. download: of `missing`, whether its weights have to be
    fetched, or are on their way (`why` says how far); null where there is nothing to fetch.
    """

    state: CellState
    why: Text | None = None
    instances: int = 0
    queue: int | None = None
    tps: float | None = None
    estimate_vram: int | None = None
    estimate_ram: int | None = None
    download: Literal["needed", "coming"] | None = None


class Profile(msgspec.Struct, frozen=True):
    """What a node says of one of its profiles."""

    key: Text
    name: Text
    kind: Text
    description: Text
    context_length: int | None
    cell: Cell


class Model(msgspec.Struct, frozen=True):
    """A profile of the mesh. key: "model:profile"; name: what clients call it; nodes: those that list it."""

    key: Text
    name: Text
    kind: Text
    description: Text
    context_length: int | None
    nodes: dict[str, Cell]


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One llama-server process. state: starting, ready, draining or stopping; age: seconds since `started`,
    when this was said; reason: why it leaves; vram, ram: what it was seen to hold, `reserved_*` what counts.
    """

    node: Text
    id: Text
    model: Text
    state: Text
    slots: int
    busy: int
    started: float
    age: float
    load_ms: float | None = None
    tps: float | None = None
    pid: int | None = None
    vram: int | None = None
    ram: int | None = None
    reserved_vram: int | None = None
    reserved_ram: int | None = None
    on_cpu: bool = False
    reason: Text | None = None
    last_used: float | None = None


class Candidate(msgspec.Struct, frozen=True):
    """A node that could have served, and what that would have cost in ms. total: null where it can't, see
    `why_not`; parts: link, wake, download, room, start, queue, prefill and decode, as far as they aren't 0.
    """

    node: Text
    total: float | None
    parts: dict[str, float]
    why_not: Text | None = None


RequestPhase = Literal["queued", "loading", "forwarded", "prefill", "decode", "done"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One request. node: where its client is; seen_by: whose record this is; served_by: the node that
    answers, null as long as it waits; instance: there; via: the nodes that it passes, from `node` to
    `served_by`; ms: since `started`, when this was said, or in all; waiting_for: in words; tokens: so far
    (events of the stream until it ends); first_token_ms: until the first content of a stream, else null;
    status: of the answer, 0 = none yet; error: its type; message: of that error; decision: the last one;
    tries: what didn't work.
    """

    id: Text
    node: Text
    seen_by: Text
    served_by: Text | None = None
    instance: Text | None = None
    model: Text | None = None
    path: Text
    phase: RequestPhase
    waiting_for: Text | None = None
    started: float
    ms: float | None = None
    queue_ms: float | None = None
    via: Annotated[list[Text], msgspec.Meta(max_length=66)] = []
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    tokens: int = 0
    first_token_ms: float | None = None
    key: Text | None = None
    streams: bool = False
    status: int = 0
    error: Text | None = None
    message: Text | None = None
    decision: Annotated[list[Candidate], msgspec.Meta(max_length=64)] = []
    tries: Annotated[list[Text], msgspec.Meta(max_length=64)] = []


class Concern(msgspec.Struct, frozen=True):
    """Something that needs attention. what: a fixed word; node: who says so; since: when it was first seen;
    fix: what to do about it.
    """

    level: Level
    what: Text
    node: Text
    text: Text
    since: float
    fix: Text


class Event(msgspec.Struct, frozen=True):
    """Something that happened. id: grows, within one life of its node."""

    id: int
    time: float
    level: Literal["info", "warning", "error"]
    node: Text
    event: Text
    text: Text


class Series(msgspec.Struct, frozen=True):
    """One value for each step, oldest first, null where nobody was there to look."""

    tokens_per_second: list[float | None]
    queue: list[float | None]
    vram: list[float | None]
    ram: list[float | None]
    requests: list[float | None]


class History(msgspec.Struct, frozen=True):
    """The last hour. step: seconds; end: when the last step ended; series: sums over all nodes."""

    step: int
    end: float
    series: Series


class Part(msgspec.Struct, frozen=True):
    """What one node says of itself."""

    node: Node
    models: Annotated[list[Profile], msgspec.Meta(max_length=MOST_MODELS)]
    instances: Annotated[list[Instance], msgspec.Meta(max_length=MOST_INSTANCES)]
    requests: Annotated[list[Request], msgspec.Meta(max_length=MOST_REQUESTS)]
    attention: Annotated[list[Concern], msgspec.Meta(max_length=MOST_CONCERNS)]
    events: Annotated[list[Event], msgspec.Meta(max_length=MOST_EVENTS)]


class Document(msgspec.Struct, frozen=True):
    """`GET /api/v1/state`. Its sections are all members from `nodes` on."""

    schema: int
    node_id: str
    time: float
    version: str
    nodes: list[Node]
    models: list[Model]
    instances: list[Instance]
    requests: list[Request]
    attention: list[Concern]
    events: list[Event]
    history: History


SECTIONS = ("nodes", "models", "instances", "requests", "attention", "events", "history")
