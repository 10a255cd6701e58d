"""A request's record as a document: `GET /api/v1/requests`, and the live ones in the state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import msgspec
import trio

from llamesh.telemetry.recorder import Record
from llamesh.web.state_schema import Candidate, Request

_PARTS = ("link", "wake", "download", "room", "start", "queue", "prefill", "decode")


def request_document(record: Record, node: str, offset: float, is_loading: Callable[[str], bool]) -> Request:
    """`node`: this one; `offset`: Unix time less trio's; `is_loading`: whether an instance of a profile
    starts.
    """
    phase, waiting = record.phase, None
    if record.way is not None and phase in ("queued", "forwarded"):
        waiting = record.way.waiting_for()[:500]
    loading = phase == "queued" and bool(record.model) and is_loading(record.model)
    served_by = record.node or record.peer or (node if record.instance else "")
    ended = phase == "done"
    return Request(
        id=record.id,
        node=record.via[0] if record.via else node,
        seen_by=node,
        served_by=served_by or None,
        instance=record.instance or None,
        model=record.model or None,
        path=record.path.decode("ascii", "replace")[:200],
        phase="loading" if loading else phase,
        waiting_for=waiting,
        started=round(record.began + offset, 3),
        ms=_rounded(record.ms if ended else (trio.current_time() - record.began) * 1000),
        queue_ms=_rounded(record.queue_ms),
        via=[*record.via, node, *([served_by] if served_by and served_by != node else [])],
        prompt_tokens=record.prompt_tokens if ended else None,
        cached_tokens=record.cached_tokens if ended else None,
        tokens=record.tokens_so_far,
        first_token_ms=_rounded(record.first_token_so_far),
        key=record.key or None,
        streams=record.streams,
        status=record.status,
        error=record.error or None,
        message=record.message or None,
        decision=[_candidate(terms, node) for terms in record.decision],
        tries=list(record.tries or ())[:64],
    )


def unix_offset() -> float:
    """Unix time less trio's."""
    return time.time() - trio.current_time()


def _candidate(terms: Any, here: str) -> Candidate:
    """`terms`: as they were made (see `core.cost`), or unpacked."""
    known = terms if isinstance(terms, dict) else msgspec.structs.asdict(terms)
    total = float(known.get("total", math.inf))
    parts = {part: round(value, 2) for part in _PARTS if (value := known.get(part, 0.0))}
    why_not = str(known.get("why_not", ""))
    return Candidate(
        str(known.get("node", "")) or here,
        round(total, 2) if math.isfinite(total) else None,
        parts,
        why_not[:500] or None,
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
