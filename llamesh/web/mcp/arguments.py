"""What the tools take. Names and bounds are checked here; what they mean, by who acts on them."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec

# Assistants give up on a call after a minute, unless they are told otherwise.
_WAIT_SECONDS = 45.0
LONGEST_WAIT = 600.0

Model: TypeAlias = Annotated[
    str,
    msgspec.Meta(
        description="Name of a model as list_models tells it, such as `llama` or `llama:fast`",
        min_length=1,
        max_length=300,
    ),
]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=300)]
Node: TypeAlias = Name | None
Limit: TypeAlias = Annotated[int, msgspec.Meta(description="How many entries at most", ge=1, le=200)]


class Arguments(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a tool takes; this one: nothing."""


class Some(Arguments, frozen=True, kw_only=True):
    limit: Limit = 50


class OfModels(Arguments, frozen=True, kw_only=True):
    query: Annotated[
        str, msgspec.Meta(description="Only models with this in name or description", max_length=300)
    ] = ""
    node: Annotated[Node, msgspec.Meta(description="Only models that this node lists")] = None
    only_loaded: bool = False
    limit: Limit = 50


class OfState(Arguments, frozen=True, kw_only=True):
    sections: Annotated[
        list[Literal["nodes", "models", "instances", "requests", "attention", "events", "history"]],
        msgspec.Meta(description="Which sections; `history` is long", min_length=1, max_length=7),
    ]
    node: Annotated[Node, msgspec.Meta(description="Only what belongs to this node")] = None
    model: Annotated[Name | None, msgspec.Meta(description="Only what belongs to this model")] = None
    limit: Annotated[Limit, msgspec.Meta(description="Entries of each section at most")] = 50


class OfRequests(Arguments, frozen=True, kw_only=True):
    model: Annotated[Name | None, msgspec.Meta(description="Only requests for this model")] = None
    only_failed: bool = False
    limit: Limit = 20


class OneRequest(Arguments, frozen=True, kw_only=True):
    request_id: Annotated[
        str,
        msgspec.Meta(
            description="The id: X-Request-Id of the answer, in the log, or from list_requests",
            min_length=1,
            max_length=300,
        ),
    ]


class OfLogs(Arguments, frozen=True, kw_only=True):
    model: Annotated[Name | None, msgspec.Meta(description="A model; without: all instances of the node")] = (
        None
    )
    node: Annotated[
        Node, msgspec.Meta(description="A node; without: the answering one, or where the model runs")
    ] = None
    lines: Annotated[int, msgspec.Meta(description="How many of the newest lines", ge=1, le=500)] = 50
    contains: Annotated[
        str, msgspec.Meta(description="Only lines with this text, in any case", max_length=300)
    ] = ""


class Load(Arguments, frozen=True, kw_only=True):
    model: Model
    node: Annotated[
        Node, msgspec.Meta(description="Where; without: the answering node, or one that has the model")
    ] = None
    wait_seconds: Annotated[
        float,
        msgspec.Meta(
            description="How long to wait until it is ready; the load goes on after that",
            ge=0,
            le=LONGEST_WAIT,
        ),
    ] = _WAIT_SECONDS


class Prewarm(Arguments, frozen=True, kw_only=True):
    model: Model
    node: Annotated[
        Node, msgspec.Meta(description="Where; without: the answering node, or one that has the model")
    ] = None


class Unload(Arguments, frozen=True, kw_only=True):
    model: Model
    node: Annotated[Node, msgspec.Meta(description="Where; without: the answering node")] = None


class OneNode(Arguments, frozen=True, kw_only=True):
    node: Annotated[Node, msgspec.Meta(description="Which; without: the answering node")] = None
