"""A request's record in words."""

from __future__ import annotations

from typing import Any

from llamesh.web.mcp.story import story
from llamesh.web.state_schema import Candidate, Request


def told(**more: Any) -> list[str]:
    record: dict[str, Any] = {
        "id": "1",
        "node": "a",
        "seen_by": "a",
        "model": "m:default",
        "path": "/v1/chat/completions",
        "phase": "done",
        "started": 1.0,
        "via": ["a"],
        "status": 200,
    }
    return story(Request(**{**record, **more}))


def test_a_request_that_was_answered_elsewhere() -> None:
    decision = [
        Candidate("b", 132.4, {"link": 0.2, "queue": 100.0, "decode": 32.2}),
        Candidate("a", 4321.0, {"start": 4321.0}),
        Candidate("c", None, {}, "its context is too short"),
    ]
    assert told(
        key="team",
        served_by="b",
        via=["a", "b"],
        queue_ms=120.0,
        ms=1500.0,
        prompt_tokens=50,
        cached_tokens=40,
        tokens=7,
        first_token_ms=90.0,
        decision=decision,
        tries=["d: connection refused"],
    ) == [
        "A client of node a with key team asked for m:default at /v1/chat/completions.",
        "Tried without success: d: connection refused",
        "It waited 120 ms before it was taken.",
        "It went this way: a -> b.",
        "Node b was expected to take 132 ms (queue 100 ms, answer 32 ms).",
        "Node a would have taken 4.3 s (starting the model 4.3 s).",
        "Node c couldn't take it: its context is too short.",
        "It was answered with status 200 after 1.5 s: 50 prompt tokens, 40 of them cached, 7 tokens, "
        "the first after 90 ms.",
    ]


def test_a_request_that_waits() -> None:
    assert told(phase="loading", waiting_for="loading m:default on node a", status=0) == [
        "A client of node a asked for m:default at /v1/chat/completions.",
        "It waits: loading m:default on node a.",
    ]


def test_a_request_that_is_being_answered() -> None:
    assert told(phase="decode", served_by="a", tokens=3)[1:] == [
        "There was no choice between nodes: a served it.",
        "It is being answered by node a: 3 tokens so far.",
    ]


def test_a_request_that_failed() -> None:
    assert told(model=None, status=503, error="queue_timeout", message="too long", ms=60_000.0) == [
        "A client of node a asked for a model that isn't known at /v1/chat/completions.",
        "It ended with queue_timeout (status 503) after 60.0 s: too long",
    ]
