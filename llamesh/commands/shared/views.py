"""What the state of the mesh says, as tables. The document is described in docs/api.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llamesh.commands.shared.sheets import Cell, Column, Sheet, cell
from llamesh.commands.shared.words import count, lasting, millis, of_size, size

State = dict[str, Any]

_CELL_STYLES = {
    "loaded": "good",
    "loading": "busy",
    "failed": "bad",
    "missing": "dim",
    "to download": "dim",
    "downloading": "busy",
    "never": "dim",
    "unknown": "dim",
}
# In this order: what can be used first.
_CELL_STATES = (
    "loaded",
    "loading",
    "fits",
    "needs eviction",
    "downloading",
    "to download",
    "failed",
    "missing",
    "never",
    "unknown",
)
# A file that isn't here isn't amiss where a request fetches it.
_DOWNLOADS = {"needed": "to download", "coming": "downloading"}
_INSTANCE_STYLES = {"ready": "good", "starting": "busy", "draining": "warn", "stopping": "warn"}
_PHASE_STYLES = {"decode": "good", "prefill": "busy", "queued": "warn", "loading": "warn"}


def summary(state: State) -> str:
    """One line about all of it."""
    nodes, requests = state["nodes"], state["requests"]
    waiting = sum(node["queue"] or 0 for node in nodes)
    running = sum(node["running"] or 0 for node in nodes)
    speed = tokens_per_second(state)
    words = [
        f"llamesh {state['version']} at {state['node_id']}",
        count(len(nodes), "node"),
        count(len(state["instances"]), "instance"),
        f"{running} running",
        f"{waiting} waiting",
    ]
    if requests and speed:
        words.append(f"{speed:.0f} tokens/s")
    return ", ".join(words)


def tokens_per_second(state: State) -> float | None:
    """Of the whole mesh, as of the last seconds that are known."""
    for value in reversed(state["history"]["series"]["tokens_per_second"][-3:]):
        if value is not None:
            return float(value)
    return None


def attention(state: State) -> Sheet:
    """What is wrong, and what to do about it."""
    rows = [
        (
            cell(one["level"], "bad" if one["level"] == "error" else "warn"),
            cell(one["node"]),
            cell(f"{one['text']}; {one['fix']}" if one["fix"] else one["text"]),
        )
        for one in state["attention"]
    ]
    return Sheet("Needs attention", (Column(""), Column(""), Column("")), rows)


def nodes(state: State) -> Sheet:
    """A row for each node."""
    columns = (
        Column("node"),
        Column("state"),
        Column("vram", right=True, keep=8),
        Column("ram", right=True, keep=7),
        Column("gpu", right=True, keep=4),
        Column("running", right=True, keep=6),
        Column("queue", right=True, keep=6),
        Column("link", keep=5),
        Column("up", right=True, keep=2),
        Column("version", keep=3),
        Column("address", keep=1),
    )
    rows = [tuple(_node(node, state["time"])) for node in state["nodes"]]
    return Sheet("Nodes", columns, rows)


def _node(node: State, now: float) -> Iterable[Cell]:
    vram, ram = node["memory"]["vram"], node["memory"]["ram"]
    yield cell(node["id"], "bold" if node["self"] else "")
    yield _node_state(node, now)
    yield cell(of_size(vram["used"], vram["total"]), _full(vram))
    yield cell(of_size(ram["used"], ram["total"]), _full(ram))
    loads = [device["utilization"] for device in node["devices"] if device["utilization"] is not None]
    yield cell(f"{max(loads):.0%}" if loads else "-", "" if loads else "dim")
    yield cell("?" if node["running"] is None else node["running"], "" if node["running"] else "dim")
    yield cell("?" if node["queue"] is None else node["queue"], "warn" if node["queue"] else "dim")
    yield _link(node)
    yield cell(lasting(now - node["started"]) if node["started"] else "?")
    yield cell(node["version"] or "?")
    yield cell(node["address"] or "-", "dim")


def _node_state(node: State, now: float) -> Cell:
    if node["status"] == "asleep":
        return cell("asleep", "dim")
    if node["status"] == "suspect":
        silent = f" for {lasting(now - node['last_seen'])}" if node["last_seen"] else ""
        return cell(f"silent{silent}", "bad")
    if not node["ready"]:
        return cell(node["reason"] or "not ready", "warn")
    return cell("ready", "good") if node["fresh"] or node["self"] else cell("ready?", "warn")


def _full(room: State) -> str:
    if not room["total"] or room["used"] is None:
        return "dim"
    return "warn" if room["used"] > 0.95 * room["total"] else ""


def _link(node: State) -> Cell:
    link = node["link"]
    if link is None:
        return cell("self" if node["self"] else "none", "dim" if node["self"] else "bad")
    if link["breaker"] == "open":
        return cell("breaker open", "bad")
    if not link["direct"] and link["problem"]:
        return cell(f"none: {link['problem']}", "bad")
    way = "" if link["direct"] else "indirect "
    return cell(f"{way}{millis(link['round_trip_ms'])}" if link["round_trip_ms"] is not None else way or "?")


def models(state: State) -> Sheet:
    """A row for each model, with its state on each node."""
    columns = (
        Column("model"),
        Column("where"),
        Column("queue", right=True, keep=5),
        Column("tok/s", right=True, keep=6),
        Column("context", right=True, keep=4),
        Column("kind", keep=2),
    )
    rows = []
    for model in state["models"]:
        cells = model["nodes"].values()
        speeds = [one["tps"] for one in cells if one["tps"]]
        waiting = sum(one["queue"] or 0 for one in cells)
        rows.append(
            (
                cell(model["name"]),
                _where(model["nodes"]),
                cell(waiting, "warn" if waiting else "dim"),
                cell(f"{max(speeds):.1f}" if speeds else "-", "" if speeds else "dim"),
                cell(model["context_length"] or "-"),
                cell(model["kind"], "dim"),
            )
        )
    return Sheet("Models", columns, rows, "none: `llamesh add` and `llamesh init` bring some")


def _where(by_node: dict[str, State]) -> Cell:
    groups: dict[str, list[str]] = {}
    for node, one in by_node.items():
        state = _DOWNLOADS.get(one["download"] or "") if one["state"] == "missing" else None
        groups.setdefault(state or one["state"].replace("_", " "), []).append(node)
    order = [state for state in _CELL_STATES if state in groups]
    order += [state for state in groups if state not in _CELL_STATES]
    if not order:
        return cell("nowhere", "dim")
    words = "; ".join(f"{state}: {', '.join(groups[state])}" for state in order)
    return cell(words, _CELL_STYLES.get(order[0], ""))


def instances(state: State, now: float) -> Sheet:
    """A row for each llama-server. now: Unix seconds; ages go on between two documents."""
    columns = (
        Column("instance"),
        Column("node"),
        Column("state"),
        Column("slots", right=True, keep=8),
        Column("memory", right=True, keep=7),
        Column("tok/s", right=True, keep=6),
        Column("age", right=True, keep=5),
        Column("load", right=True, keep=3),
        Column("idle", right=True, keep=4),
        Column("pid", right=True, keep=1),
    )
    rows = []
    for one in state["instances"]:
        # The clocks of two machines differ; none runs backwards here.
        idle = None if one["busy"] or not one["last_used"] else max(0.0, now - one["last_used"])
        rows.append(
            (
                cell(one["id"]),
                cell(one["node"]),
                cell(_with_reason(one), _INSTANCE_STYLES.get(one["state"], "")),
                cell(f"{one['busy']}/{one['slots']}", "busy" if one["busy"] else "dim"),
                cell(_memory(one)),
                cell(f"{one['tps']:.1f}" if one["tps"] else "-"),
                cell(lasting(now - one["started"])),
                cell(millis(one["load_ms"]) if one["load_ms"] is not None else "-"),
                cell(lasting(idle) if idle is not None else "-"),
                cell(one["pid"] or "-", "dim"),
            )
        )
    return Sheet("Instances", columns, rows, "none: a model is loaded when it is asked for")


def _with_reason(one: State) -> str:
    return f"{one['state']}: {one['reason']}" if one["reason"] else str(one["state"])


def _memory(one: State) -> str:
    vram = one["vram"] if one["vram"] is not None else one["reserved_vram"]
    ram = one["ram"] if one["ram"] is not None else one["reserved_ram"]
    parts = [f"{size(vram)} vram" if vram else "", f"{size(ram)} ram" if ram else ""]
    return " ".join(part for part in parts if part) or "-"


def requests(state: State, now: float) -> Sheet:
    """A row for each request that is under way."""
    columns = (
        Column("request"),
        Column("model"),
        Column("phase"),
        Column("tokens", right=True, keep=8),
        Column("tok/s", right=True, keep=8),
        Column("prompt", right=True, keep=4),
        Column("for", right=True, keep=7),
        Column("first", right=True, keep=3),
        Column("way", keep=6),
        Column("key", keep=2),
    )
    rows = []
    for one in state["requests"]:
        lasted = max(0.0, now - one["started"]) * 1000
        rows.append(
            (
                cell(one["id"]),
                cell(one["model"] or "?"),
                cell(_phase(one), _PHASE_STYLES.get(one["phase"], "")),
                cell(one["tokens"] or "-"),
                cell(_speed(one, lasted)),
                cell(_prompt(one)),
                cell(millis(lasted)),
                cell(millis(one["first_token_ms"]) if one["first_token_ms"] is not None else "-"),
                cell(" > ".join(one["via"] or [one["node"]])),
                cell(one["key"] or "-", "dim"),
            )
        )
    return Sheet("Requests", columns, rows, "none")


def _phase(one: State) -> str:
    phase, what = str(one["phase"]), str(one["waiting_for"] or "")
    return what if what.startswith(phase) else f"{phase}: {what}" if what else phase


def _prompt(one: State) -> str:
    if one["prompt_tokens"] is None:
        return "-"
    cached = f" ({one['cached_tokens']} cached)" if one["cached_tokens"] else ""
    return f"{one['prompt_tokens']}{cached}"


def _speed(one: State, lasted_ms: float) -> str:
    if not one["tokens"] or one["first_token_ms"] is None:
        return "-"
    seconds = (lasted_ms - one["first_token_ms"]) / 1000
    return f"{one['tokens'] / seconds:.1f}" if seconds > 0.2 else "-"
