"""The parts of all nodes, put together to one document. Pure: values in, values out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

import llamesh
from llamesh.core.offers import Offer
from llamesh.web.state_schema import (
    MOST_CONCERNS,
    MOST_EVENTS,
    SCHEMA,
    Cell,
    CellState,
    Concern,
    Document,
    Event,
    History,
    Link,
    Memory,
    Model,
    Node,
    Part,
    Profile,
    Request,
    Room,
)

# What every node says of every other one: this node's own word is enough.
_SAID_BY_ALL = frozenset({"version_skew"})


@dataclass(frozen=True, slots=True)
class Other:
    """Another node. entry: its entry in `/cluster/nodes`; offers: its gossiped profiles; part: what it said
    last, None where it never did; fresh: a moment ago.
    """

    id: str
    entry: Mapping[str, Any]
    offers: Sequence[Offer]
    part: Part | None
    fresh: bool


def merge(own: Part, others: Iterable[Other], history: History, now: float) -> Document:
    """One document of all."""
    parts = [own, *(_part(other) for other in others)]
    return Document(
        schema=SCHEMA,
        node_id=own.node.id,
        time=round(now, 3),
        version=llamesh.__version__,
        nodes=[part.node for part in parts],
        models=_models(parts),
        instances=[one for part in parts for one in part.instances],
        requests=_requests(part.requests for part in parts),
        attention=_attention(own, parts[1:]),
        events=_events(parts),
        history=history,
    )


def _part(other: Other) -> Part:
    """What is shown of another node. It may not speak in a third one's name."""
    told, node = other.part, _node(other)
    if told is None or node.status == "asleep":
        models = [_offered(offer) for offer in other.offers]
        return Part(node, models, [], [], [], [] if told is None else told.events)
    return Part(
        node,
        told.models,
        [one if one.node == other.id else replace(one, node=other.id) for one in told.instances],
        [one if one.seen_by == other.id else replace(one, seen_by=other.id) for one in told.requests],
        [replace(one, node=other.id) for one in told.attention if one.what not in _SAID_BY_ALL],
        [one if one.node == other.id else replace(one, node=other.id) for one in told.events],
    )


def _node(other: Other) -> Node:
    entry, link = other.entry, other.entry.get("link") or {}
    known = other.part.node if other.part is not None else _stub(other)
    return replace(
        known,
        id=other.id,
        self=False,
        fresh=other.fresh,
        status=entry.get("status", "alive"),
        ready=bool(entry.get("ready")),
        reason=entry.get("reason"),
        version=entry.get("version") or known.version,
        address=entry.get("address") or known.address,
        last_seen=entry.get("last_seen"),
        link=Link(**{name: link[name] for name in Link.__struct_fields__ if name in link}),
    )


def _stub(other: Other) -> Node:
    """A node that said nothing to us, from what came with gossip and probes."""
    entry = other.entry

    def size(name: str) -> int | None:
        value = entry.get(name)
        return value if isinstance(value, int) else None

    vram = Room(
        size("device_vram_total_mb"), size("max_vram_mb"), size("device_vram_used_mb"),
        size("reserved_vram_mb"), size("external_vram_mb"), size("available_vram"),
    )  # fmt: skip
    ram = Room(
        size("sysmem_total_mb"), size("max_sysmem_mb"), None,
        size("reserved_sysmem_mb"), size("external_sysmem_mb"), size("available_sysmem"),
    )  # fmt: skip
    return Node(
        id=other.id,
        engine_version=entry.get("llama_cpp_version"),
        started=entry.get("started_at_unix") or None,
        memory=Memory(vram, ram),
        queue=size("total_queue_length"),
    )


def _offered(offer: Offer) -> Profile:
    state: CellState = "unknown" if offer.runs else "never"
    if offer.status == "loaded":
        state = "loaded"
    elif offer.status == "failed":
        state = "failed"
    cell = Cell(state, None, 0, None, offer.tps or None)
    text = (offer.profile_description or offer.description)[:1000]
    return Profile(offer.key, offer.public_name, offer.kind, text, offer.context_length or None, cell)


def _models(parts: Iterable[Part]) -> list[Model]:
    found: dict[str, Model] = {}
    for part in parts:
        for one in part.models:
            at = one.key.casefold()
            model = found.get(at)
            if model is None:
                known = (one.key, one.name, one.kind, one.description, one.context_length)
                model = found[at] = Model(*known, {})
            elif model.context_length is None and one.context_length:
                model = found[at] = replace(model, context_length=one.context_length)
            model.nodes[part.node.id] = one.cell
    return [found[key] for key in sorted(found)]


def _requests(lists: Iterable[list[Request]]) -> list[Request]:
    """One entry for each request, whichever nodes have a record of it: how far it is, only the last one
    knows.
    """
    found: dict[tuple[str, str], list[Request]] = {}
    for requests in lists:
        for one in requests:
            found.setdefault((one.id, one.node), []).append(one)
    return sorted((joined(records) for records in found.values()), key=lambda one: one.started)


def joined(records: list[Request]) -> Request:
    """The records of one request on several nodes as one."""
    if len(records) == 1:
        return records[0]
    first = next((one for one in records if one.seen_by == one.node), records[0])
    last = max(records, key=_how_far)
    if last is first:
        return first
    return replace(
        first,
        phase=last.phase if first.phase == "forwarded" else first.phase,
        waiting_for=last.waiting_for,
        via=max(first.via, last.via, key=len),
        served_by=first.served_by or last.served_by,
        instance=last.instance or first.instance,
        tokens=max(first.tokens, last.tokens),
        tries=[*first.tries, *last.tries][:64],
    )


def _how_far(one: Request) -> int:
    """How many nodes are before the one whose record this is."""
    return one.via.index(one.seen_by) if one.seen_by in one.via else 0


def _attention(own: Part, others: Iterable[Part]) -> list[Concern]:
    found = {(one.what, one.text): one for part in others for one in part.attention}
    found |= {(one.what, one.text): one for one in own.attention}
    return sorted(found.values(), key=lambda one: (one.level != "error", one.since))[:MOST_CONCERNS]


def _events(parts: Iterable[Part]) -> list[Event]:
    found: list[Event] = [one for part in parts for one in part.events]
    found.sort(key=lambda one: one.time)
    return found[-MOST_EVENTS:]
