"""From the state document to what a model can read: shorter, and never longer than a budget. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from llamesh.web.mcp.answers import (
    ConcernRow,
    InstanceRow,
    LogLines,
    ModelRow,
    Models,
    NodeRow,
    Nodes,
    RequestRow,
    Requests,
    State,
    Summary,
)
from llamesh.web.state_schema import Document, Instance, Model, Node, Request, Room

# An answer is at most this much JSON: some 15,000 tokens.
BUDGET = 48 << 10

# How good a state is, best first.
_RANK = ("loaded", "loading", "fits", "needs_eviction", "missing", "failed", "unknown", "never")

_MOST_SUMMED_UP = 40

# Texts of other programs and people are cut.
_TEXT = 300

T = TypeVar("T")


def kept(entries: Iterable[T], limit: int, budget: int = BUDGET) -> tuple[list[T], int]:
    """As many of them as may be and fit, from the front, and how many are left out."""
    entries = list(entries)
    found: list[T] = []
    for entry in entries[:limit]:
        budget -= len(msgspec.json.encode(entry)) + 1
        if budget < 0:
            break
        found.append(entry)
    return found, len(entries) - len(found)


def nodes(document: Document, limit: int) -> Nodes:
    """All nodes."""
    loaded: dict[str, list[str]] = {}
    for one in document.instances:
        if one.state == "ready" and one.model not in loaded.setdefault(one.node, []):
            loaded[one.node].append(one.model)
    return Nodes(*kept((_node(node, loaded.get(node.id, [])) for node in document.nodes), limit))


def models(
    document: Document, limit: int, *, query: str = "", node: str = "", loaded: bool = False
) -> Models:
    """Models whose name or description holds `query`, that `node` has, that are loaded anywhere; the best
    state first.
    """
    wanted = query.casefold()
    found = [
        model
        for model in document.models
        if wanted in f"{model.key} {model.name} {model.description}".casefold()
        and (not node or node in model.nodes)
        and (not loaded or _best(model) == "loaded")
    ]
    found.sort(key=lambda model: (_RANK.index(_best(model)), model.name))
    return Models(*kept((_model(model, node) for model in found), limit))


def requests(found: Sequence[Request], limit: int) -> Requests:
    """Requests, in the order in which they come."""
    return Requests(*kept((request(one) for one in found), limit))


def request(one: Request) -> RequestRow:
    """One request in a row."""
    return RequestRow(
        id=one.id,
        model=one.model or "",
        path=one.path,
        phase=one.phase,
        node=one.node,
        served_by=one.served_by or "",
        waiting_for=_cut(one.waiting_for),
        started=one.started,
        ms=one.ms,
        queue_ms=one.queue_ms,
        first_token_ms=one.first_token_ms,
        prompt_tokens=one.prompt_tokens,
        cached_tokens=one.cached_tokens,
        tokens=one.tokens,
        status=one.status,
        error=one.error or "",
        message=_cut(one.message),
        key=_cut(one.key),
    )


def instance(one: Instance) -> InstanceRow:
    """One instance in a row."""
    return InstanceRow(
        node=one.node,
        id=one.id,
        model=one.model,
        state=one.state,
        slots=one.slots,
        busy=one.busy,
        age_seconds=one.age,
        tokens_per_second=one.tps,
        vram=one.vram if one.vram is not None else one.reserved_vram,
        ram=one.ram if one.ram is not None else one.reserved_ram,
        reason=_cut(one.reason),
    )


def summary(document: Document) -> Summary:
    """The mesh at a glance; what needs attention comes first."""
    ranked = sorted(document.attention, key=lambda one: one.level != "error")
    concerns = [ConcernRow(one.level, one.node, _cut(one.text), _cut(one.fix)) for one in ranked]
    lines = [_line(instance(one)) for one in document.instances]
    left = {}
    attention, left["attention"] = kept(concerns, _MOST_SUMMED_UP, BUDGET // 3)
    shown, left["instances"] = kept(lines, _MOST_SUMMED_UP, BUDGET // 3)
    told, left["nodes"] = kept(document.nodes, _MOST_SUMMED_UP, 1 << 20)
    conditions = {node.id: _condition(node)[:_TEXT] for node in told}
    return Summary(
        time=document.time,
        answered_by=document.node_id,
        version=document.version,
        well=not concerns and all(node.ready for node in document.nodes),
        attention=attention,
        nodes=conditions,
        instances=shown,
        models=dict(Counter(_best(model) for model in document.models)),
        requests=dict(Counter(one.phase for one in document.requests)),
        left_out={section: count for section, count in left.items() if count},
    )


def state(
    document: Document, sections: Sequence[str], limit: int, *, node: str = "", model: str = ""
) -> State:
    """Sections as they are. `node`, `model`: only what belongs to them, in sections where that says
    anything.
    """
    budget, found, left = BUDGET, dict[str, Any](), dict[str, int]()
    for section in sections:
        entries = [document.history] if section == "history" else list(getattr(document, section))
        entries = [one for one in entries if _belongs(one, node, model)]
        if section == "events":
            entries.reverse()  # the newest are worth most
        shown, missing = kept(entries, limit, budget)
        plain = msgspec.to_builtins(shown)
        budget -= len(msgspec.json.encode(plain))
        if section == "history":
            found[section] = plain[0] if plain else None
        else:
            found[section] = plain[::-1] if section == "events" else plain
        if missing:
            left[section] = missing
    return State(node_id=document.node_id, time=document.time, left_out=left, **found)


def log_lines(node: str, lines: Sequence[tuple[str, str]], limit: int, contains: str = "") -> LogLines:
    """The newest of (instance, line) that hold `contains`."""
    wanted = contains.casefold()
    texts = [f"[{name}] {line[:2000]}" for name, line in lines if wanted in line.casefold()]
    shown, left = kept(reversed(texts), limit)
    return LogLines(node=node, lines=shown[::-1], left_out=left)


# Parts.


def _node(node: Node, loaded: list[str]) -> NodeRow:
    engine = " ".join(part for part in (node.engine, node.engine_version) if part)
    return NodeRow(
        id=node.id,
        answered=node.self,
        status=node.status,
        ready=node.ready,
        reason=_cut(node.reason),
        version=node.version or "",
        engine=_cut(engine),
        address=node.address or "",
        queue=node.queue,
        running=node.running,
        vram=_known(node.memory.vram),
        ram=_known(node.memory.ram),
        gpus=[device.name for device in node.devices],
        loaded=loaded[:50],
        link="" if node.self else _link(node),
        problems=[_cut(problem) for problem in node.problems[:5]],
    )


def _link(node: Node) -> str:
    link = node.link
    if link is None:
        return "none"
    way = "direct" if link.direct else "not directly"
    time = f", {link.round_trip_ms} ms" if link.round_trip_ms is not None else ""
    breaker = f", breaker {link.breaker}" if link.breaker not in ("", "closed") else ""
    return f"{way}{time}{breaker}" + (f": {_cut(link.problem)}" if link.problem else "")


def _known(room: Room) -> Room | None:
    return None if room == Room() or not room.total else room


def _model(model: Model, only: str) -> ModelRow:
    cells = [(node, cell) for node, cell in model.nodes.items() if not only or node == only]
    shown, more = cells[:_MOST_SUMMED_UP], len(cells) - _MOST_SUMMED_UP
    why = {node: _cut(cell.why) for node, cell in shown[:4] if cell.why}
    if more > 0:
        why["others"] = f"{more} more nodes have it"
    return ModelRow(
        name=model.name,
        kind=model.kind,
        description=_cut(model.description),
        context_length=model.context_length,
        nodes={node: str(cell.state) for node, cell in shown},
        why=why,
        tokens_per_second=max((cell.tps for _, cell in cells if cell.tps), default=None),
    )


def _best(model: Model) -> str:
    return min((cell.state for cell in model.nodes.values()), key=_RANK.index, default="unknown")


def _condition(node: Node) -> str:
    parts = ["ready" if node.ready else f"not ready: {node.reason or node.status}"]
    if node.status != "alive":
        parts.append(node.status)
    if node.running is not None:
        parts.append(f"{node.running} running, {node.queue or 0} waiting")
    for name, room in (("VRAM", node.memory.vram), ("memory", node.memory.ram)):
        if room.free is not None and room.total:
            parts.append(f"{room.free} of {room.total} MiB {name} free for models")
    return "; ".join(parts)


def _line(one: InstanceRow) -> str:
    speed = f", {one.tokens_per_second} tokens/s" if one.tokens_per_second else ""
    why = f" ({one.reason})" if one.reason else ""
    return f"{one.id} on {one.node}: {one.state}{why}, {one.busy} of {one.slots} slots busy{speed}"


def _belongs(one: Any, node: str, model: str) -> bool:
    if isinstance(one, Node):
        return not node or one.id == node
    if isinstance(one, Model):
        wanted = model.casefold()
        return (not node or node in one.nodes) and (
            not model or wanted in (one.key.casefold(), one.name.casefold())
        )
    if node and node not in (getattr(one, "node", node), getattr(one, "served_by", None)):
        return False
    named = getattr(one, "model", None)
    return not model or named is None or named.casefold() in (model.casefold(), f"{model}:default".casefold())


def _cut(text: str | None) -> str:
    if not text:
        return ""
    return text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
