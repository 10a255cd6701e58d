"""`llamesh why`: what became of a request, and why."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.client import Client, path_of
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.options import json_option
from llamesh.commands.shared.saying import aside, out
from llamesh.commands.shared.sheets import Cell, Column, Sheet, cell, show
from llamesh.commands.shared.words import millis

Record = dict[str, Any]

_PATH = "/api/v1/requests"

# The terms of a decision, in the order in which they pass.
_PARTS = ("link", "wake", "download", "room", "start", "queue", "prefill", "decode")


@make(
    ("llamesh why", "the last request that failed, else the last one"),
    ("llamesh why chat-1f0c-2", "ids: the header X-Request-Id, `llamesh top`, the log"),
    ("llamesh why --last --json", "the record of the last one"),
)
@click.argument("request_id", metavar="[REQUEST_ID]", required=False)
@click.option("--last", is_flag=True, help="the last request that ended, whether it failed or not")
@json_option
@node_options
def command(request_id: str | None, last: bool, as_json: bool, reach: Reach) -> int:
    """Explain a request: its way, how long each phase took, why it went where it went, and its error."""
    if request_id is not None and last:
        raise click.UsageError("name a REQUEST_ID, or --last")
    client = reach.client()
    if request_id is None:
        request_id = _newest(client, failed=not last)
    record = client.get(path_of(_PATH, request_id))
    if as_json:
        out(json.dumps(record, ensure_ascii=False))
        return exit_codes.OK
    show(explained(record))
    return exit_codes.OK


def _newest(client: Client, *, failed: bool) -> str:
    """The id of the last request that failed, or that ended at all."""
    if failed:
        found = client.get(f"{_PATH}?limit=1&failed=1")["requests"]
        if found:
            return str(found[0]["id"])
    for one in client.get(f"{_PATH}?limit=1000")["requests"]:
        if one["phase"] == "done":
            if failed:
                aside("No request failed; this is the last one.")
            return str(one["id"])
    raise Failed("no request has ended on this node since it started")


def explained(record: Record) -> list[Sheet]:
    """A record of `/api/v1/requests/{id}` as tables."""
    return [_overview(record), _times(record), _decision(record), _tries(record), _records(record)]


def _overview(record: Record) -> Sheet:
    rows = [("outcome", _outcome(record))]
    if record["message"]:
        rows.append(("because", cell(record["message"])))
    if record["waiting_for"] and record["phase"] != "done":
        rows.append(("waits for", cell(record["waiting_for"])))
    asked = "a stream" if record["streams"] else "a whole answer"
    started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record["started"]))
    rows += [
        ("asked", cell(f"{record['path']} of {record['model'] or 'no model'}, {asked}")),
        ("started", cell(f"{started}, {millis(record['ms'])} in all")),
        ("way", cell(_way(record))),
    ]
    if record["key"]:
        rows.append(("key", cell(record["key"])))
    return Sheet(
        f"Request {cell(record['id']).text}",
        (Column(""), Column("")),
        [(Cell(name, "dim"), entry) for name, entry in rows],
    )


def _outcome(record: Record) -> Cell:
    if record["phase"] != "done":
        return cell(f"runs: {record['phase']}", "busy")
    status, error = record["status"], record["error"]
    if error:
        return cell(f"failed: {error}" + (f" ({status})" if status else ""), "bad")
    if status >= 400:
        return cell(f"failed ({status}), as llama-server answered it", "bad")
    return cell(f"answered ({status})", "good")


def _way(record: Record) -> str:
    nodes = " > ".join(record["via"] or [record["node"]])
    if record["instance"]:
        return f"{nodes}, instance {record['instance']}"
    return nodes if record["served_by"] else f"{nodes}; no instance took it"


def _times(record: Record) -> Sheet:
    rows: list[tuple[str, str, str]] = []
    first, total = record["first_token_ms"], record["ms"]
    # Where it was forwarded it may have waited again.
    waits = [one["queue_ms"] for one in (record, *record["records"]) if one["queue_ms"] is not None]
    waited = (max(waits) if waits else None) if record["served_by"] else total
    if waited is not None:
        rows.append(("waiting", millis(waited), "for a slot, a load, or another node"))
    prompt = _prompt(record)
    if first is not None:
        rows.append(("prompt", millis(max(0.0, first - (waited or 0.0))), prompt))
        if total is not None:
            rows.append(("answer", millis(max(0.0, total - first)), _answer(record, total - first)))
    elif total is not None and record["served_by"]:
        words = ", ".join(part for part in (prompt, _answer(record, None)) if part)
        rows.append(("answer", millis(max(0.0, total - (waited or 0.0))), words))
    columns = (Column("phase"), Column("took", right=True), Column(""))
    return Sheet(
        "Time", columns, [(cell(name), cell(took), cell(words, "dim")) for name, took, words in rows]
    )


def _prompt(record: Record) -> str:
    if record["prompt_tokens"] is None:
        return ""
    cached = f", {record['cached_tokens']} of them cached" if record["cached_tokens"] is not None else ""
    return f"{record['prompt_tokens']} prompt tokens{cached}"


def _answer(record: Record, ms: float | None) -> str:
    tokens = record["tokens"]
    if not tokens:
        return ""
    speed = f", {(tokens - 1) / ms * 1000:.1f} a second" if ms and ms > 0 and tokens > 1 else ""
    return f"{tokens} tokens{speed}"


def _decision(record: Record) -> Sheet:
    """What each node would have cost, in ms, cheapest first."""
    candidates = sorted(record["decision"], key=lambda one: (one["total"] is None, one["total"] or 0.0))
    parts = [part for part in _PARTS if any(part in one["parts"] for one in candidates)]
    parts += sorted({part for one in candidates for part in one["parts"]} - set(parts))
    reasons = any(one["why_not"] for one in candidates)
    columns = [
        Column("node"),
        Column("total", right=True),
        *(Column(part, right=True, keep=8) for part in parts),
    ]
    rows = []
    for one in candidates:
        chosen = one["node"] == record["served_by"]
        row = [cell(one["node"], "good" if chosen else ""), cell(_figure(one["total"]))]
        row += [cell(_figure(one["parts"].get(part)), "dim") for part in parts]
        rows.append([*row, cell(one["why_not"] or ("taken" if chosen else ""), "dim")] if reasons else row)
    if reasons:
        columns.append(Column(""))
    return Sheet("Choice: what each node would have taken, in ms", columns, rows)


def _figure(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.1f}" if ms < 10 else f"{ms:,.0f}"


def _tries(record: Record) -> Sheet:
    rows = [(cell(number), cell(words)) for number, words in enumerate(record["tries"], 1)]
    return Sheet("What was tried before", (Column("", right=True), Column("")), rows)


def _records(record: Record) -> Sheet:
    """What each node saw of it, where there are several."""
    seen = record["records"]
    columns = (Column("node"), Column("outcome"), Column("waited", right=True), Column("in all", right=True))
    rows = [
        (
            cell(one["seen_by"]),
            _outcome(one),
            cell(millis(one["queue_ms"]) if one["queue_ms"] is not None else "-"),
            cell(millis(one["ms"])),
        )
        for one in seen
    ]
    return Sheet("Seen by", columns, rows if len(rows) > 1 else ())
