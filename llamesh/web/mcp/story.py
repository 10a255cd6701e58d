"""A request's record in words: where it went, why, and what came of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from llamesh.web.state_schema import Candidate, Request

_PARTS = {
    "link": "the way there",
    "wake": "waking the machine",
    "download": "download",
    "room": "making room",
    "start": "starting the model",
    "queue": "queue",
    "prefill": "prompt",
    "decode": "answer",
}


def story(request: Request) -> list[str]:
    """Sentences, in the order in which it happened."""
    return list(_told(request))


def _told(request: Request) -> Iterator[str]:
    model = request.model or "a model that isn't known"
    key = f" with key {request.key}" if request.key else ""
    yield f"A client of node {request.node}{key} asked for {model} at {request.path}."
    for problem in request.tries:
        yield f"Tried without success: {problem}"
    if request.queue_ms:
        yield f"It waited {_time(request.queue_ms)} before it was taken."
    if request.phase != "done" and request.waiting_for:
        yield f"It waits: {request.waiting_for}."
    yield from _choice(request)
    if request.phase == "done":
        yield _end(request)
    elif request.phase in ("prefill", "decode"):
        yield f"It is being answered by node {request.served_by}: {request.tokens} tokens so far."


def _choice(request: Request) -> Iterator[str]:
    if len(request.via) > 1:
        yield f"It went this way: {' -> '.join(request.via)}."
    able = sorted((c for c in request.decision if c.total is not None), key=lambda c: c.total or 0.0)
    chosen = next((c for c in able if c.node == request.served_by), None)
    if chosen is not None:
        yield f"Node {chosen.node} was expected to take {_time(chosen.total or 0.0)}{_parts(chosen)}."
    for other in able[:8]:
        if other is not chosen:
            yield f"Node {other.node} would have taken {_time(other.total or 0.0)}{_parts(other)}."
    for other in request.decision[:16]:
        if other.total is None:
            yield f"Node {other.node} couldn't take it: {other.why_not or 'no reason is known'}."
    if not request.decision and request.served_by:
        yield f"There was no choice between nodes: {request.served_by} served it."


def _parts(candidate: Candidate) -> str:
    parts = [f"{_PARTS.get(name, name)} {_time(ms)}" for name, ms in candidate.parts.items() if ms >= 0.5]
    return f" ({', '.join(parts)})" if parts else ""


def _end(request: Request) -> str:
    whole = f" after {_time(request.ms)}" if request.ms is not None else ""
    if request.error:
        said = f": {request.message[:500]}" if request.message else ""
        return f"It ended with {request.error} (status {request.status or 'none'}){whole}{said}"
    first = f", the first after {_time(request.first_token_ms)}" if request.first_token_ms is not None else ""
    cached = f", {request.cached_tokens} of them cached" if request.cached_tokens else ""
    prompt = f"{request.prompt_tokens or 0} prompt tokens{cached}"
    return f"It was answered with status {request.status}{whole}: {prompt}, {request.tokens} tokens{first}."


def _time(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"
