"""What the tools answer: small, since a model reads it. Times are Unix seconds, durations milliseconds unless
the name says seconds, sizes MiB. Members that aren't known, or say nothing, are left out.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

import msgspec

from llamesh.web.state_schema import Candidate, Room

LeftOut: TypeAlias = Annotated[
    int, msgspec.Meta(description="How many more there are: narrow the question, or raise `limit`")
]


class NodeRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One node: a machine."""

    id: str
    answered: Annotated[bool, msgspec.Meta(description="It is the node that answers this call")] = False
    status: str
    ready: Annotated[bool, msgspec.Meta(description="It takes requests")]
    reason: Annotated[str, msgspec.Meta(description="Why it isn't ready")] = ""
    version: str = ""
    engine: str = ""
    address: str = ""
    queue: Annotated[int | None, msgspec.Meta(description="Requests that wait there")] = None
    running: Annotated[int | None, msgspec.Meta(description="Requests that are being answered there")] = None
    vram: Annotated[Room | None, msgspec.Meta(description="Of all its GPUs, MiB")] = None
    ram: Annotated[Room | None, msgspec.Meta(description="MiB")] = None
    gpus: list[str] = []
    loaded: Annotated[list[str], msgspec.Meta(description="Models that are loaded there")] = []
    link: Annotated[str, msgspec.Meta(description="How the answering node reaches it")] = ""
    problems: list[str] = []


class ModelRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model of the mesh."""

    name: Annotated[str, msgspec.Meta(description="What clients and the other tools call it")]
    kind: str
    description: str = ""
    context_length: int | None = None
    nodes: Annotated[
        dict[str, str],
        msgspec.Meta(
            description="Node id -> loaded, loading, fits (could start now), needs_eviction (no room at the "
            "moment), missing (its file has to come first), never, failed or unknown"
        ),
    ]
    why: Annotated[dict[str, str], msgspec.Meta(description="Node id -> why it isn't better there")] = {}
    tokens_per_second: Annotated[float | None, msgspec.Meta(description="Of one answer, at best")] = None


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One llama-server process."""

    node: str
    id: str
    model: str
    state: str
    slots: int
    busy: int
    age_seconds: float
    tokens_per_second: float | None = None
    vram: int | None = None
    ram: int | None = None
    reason: Annotated[str, msgspec.Meta(description="Why it leaves")] = ""


class RequestRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request."""

    id: str
    model: str = ""
    path: str = ""
    phase: Annotated[
        str,
        msgspec.Meta(description="queued, loading, forwarded, prefill, decode, or done when it has ended"),
    ]
    node: Annotated[str, msgspec.Meta(description="Where its client is")]
    served_by: Annotated[str, msgspec.Meta(description="The node that answers")] = ""
    waiting_for: str = ""
    started: float
    ms: float | None = None
    queue_ms: float | None = None
    first_token_ms: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    tokens: int = 0
    status: Annotated[int, msgspec.Meta(description="Of the answer; 0: none yet")] = 0
    error: str = ""
    message: str = ""
    key: Annotated[str, msgspec.Meta(description="Name of the client's key")] = ""


class ConcernRow(msgspec.Struct, frozen=True):
    """Something that needs attention."""

    level: str
    node: str
    text: str
    fix: Annotated[str, msgspec.Meta(description="What to do about it")]


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The mesh at a glance."""

    time: float
    answered_by: Annotated[str, msgspec.Meta(description="The node that answers this call")]
    version: str
    well: Annotated[bool, msgspec.Meta(description="All nodes are ready, and nothing needs attention")]
    attention: list[ConcernRow]
    nodes: Annotated[dict[str, str], msgspec.Meta(description="Node id -> its condition in words")]
    instances: Annotated[
        list[str], msgspec.Meta(description="What is loaded: model, node, state, busy slots, speed")
    ]
    models: Annotated[dict[str, int], msgspec.Meta(description="Best state anywhere -> how many models")]
    requests: Annotated[dict[str, int], msgspec.Meta(description="Phase -> how many are under way")]
    left_out: Annotated[
        dict[str, int], msgspec.Meta(description="Section -> how many entries more there are")
    ]


class Nodes(msgspec.Struct, frozen=True):
    """Nodes of the mesh."""

    nodes: list[NodeRow]
    left_out: LeftOut = 0


class Models(msgspec.Struct, frozen=True):
    """Models of the mesh."""

    models: list[ModelRow]
    left_out: LeftOut = 0


class Requests(msgspec.Struct, frozen=True):
    """Requests that the answering node saw: those under way, then those that ended, the newest first."""

    requests: list[RequestRow]
    left_out: LeftOut = 0


class State(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sections of `GET /api/v1/state`, with its members; that schema is long, so it isn't told here again."""

    node_id: str
    time: float
    nodes: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    instances: list[dict[str, Any]] = []
    requests: list[dict[str, Any]] = []
    attention: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    history: dict[str, Any] | None = None
    left_out: Annotated[
        dict[str, int], msgspec.Meta(description="Section -> how many entries more there are")
    ] = {}


class Explained(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request went where it went, and what came of it."""

    story: Annotated[list[str], msgspec.Meta(description="In words, in the order in which it happened")]
    request: RequestRow
    via: Annotated[list[str], msgspec.Meta(description="Nodes that it passed")]
    candidates: Annotated[
        list[Candidate],
        msgspec.Meta(description="What each node would have cost, in expected ms, at the last choice"),
    ]
    tries: Annotated[list[str], msgspec.Meta(description="What didn't work")]
    seen_by: Annotated[list[str], msgspec.Meta(description="Nodes that have a record of it")]


class LogLines(msgspec.Struct, frozen=True, kw_only=True):
    """The newest lines, oldest first."""

    node: str
    lines: Annotated[list[str], msgspec.Meta(description="[instance] text, as llama-server wrote it")]
    left_out: LeftOut = 0


class Loading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What came of a load."""

    model: str
    node: str
    status: Annotated[str, msgspec.Meta(description="loaded, or loading: it goes on by itself")]
    waited_seconds: float = 0.0
    note: str = ""


class Unloading(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What leaves."""

    node: str
    unloading: Annotated[
        list[str], msgspec.Meta(description="Instances that end when their requests have ended")
    ]
    note: str = ""


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """A node after an act."""

    node: str
    status: Annotated[str, msgspec.Meta(description="ready or draining")]
