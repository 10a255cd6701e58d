"""`llamesh logs`: what the llama-server processes of a model say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import urlencode

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.acts import naming
from llamesh.commands.shared.client import STREAM_SECONDS, Client, events_in, path_of
from llamesh.commands.shared.completing import complete_models, complete_nodes
from llamesh.commands.shared.failed import Failed, Unreached
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, out
from llamesh.commands.shared.words import clean, one_line

_PATH = "/logs/stream"


@make(
    ("llamesh logs qwen3", "the last lines, of instances that ended a moment ago, too"),
    ("llamesh logs qwen3 -f -n 0", "what comes from now on"),
    ("llamesh logs --node box-b", "of all models there"),
)
@click.argument("model", metavar="[MODEL]", required=False, shell_complete=complete_models)
@click.option("-f", "--follow", is_flag=True, help="go on until Ctrl-C")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0),
    metavar="N",
    help="the last N lines (default: all, 200 of each instance)",
)
@click.option(
    "--node",
    metavar="ID",
    help="of that node's instances (default: the one that is asked; of MODEL, one that runs it)",
    shell_complete=complete_nodes,
)
@node_options
def command(model: str | None, follow: bool, lines: int | None, node: str | None, reach: Reach) -> int:
    """Show what the llama-server processes of MODEL, or of all models, say."""
    client = reach.client()
    if model and not node:
        node = _home(client, model)
    wanted = {"format": "sse", "follow": "true" if follow else "false"}
    if lines is not None:
        wanted["lines"] = str(lines)
    if node:
        wanted["node"] = node
    path = f"{path_of(_PATH, model) if model else _PATH}?{urlencode(wanted)}"
    try:
        with naming(client, model or ""), client.lines("GET", path, seconds=STREAM_SECONDS) as answer:
            _print(iter(answer), named=model is None)
    except KeyboardInterrupt:
        if not follow:
            raise
        return exit_codes.OK  # that is how it is meant to end
    if follow:
        raise Unreached(f"the node at {client.place} closed the connection")
    return exit_codes.OK


def _home(client: Client, model: str) -> str | None:
    """The node where its instances are, when none is at the node that is asked."""
    try:
        state = client.get("/api/v1/state")
    except Failed:
        return None
    word = model.casefold()
    keys = {
        one["key"]
        for one in state.get("models", ())
        if word in (str(one["key"]).casefold(), str(one["name"]).casefold())
    }
    homes = list(dict.fromkeys(one["node"] for one in state.get("instances", ()) if one["model"] in keys))
    if not homes or state.get("node_id") in homes:
        return None
    others = f"; also at {', '.join(map(one_line, homes[1:]))}: --node" if homes[1:] else ""
    aside(f"llamesh: it runs at node {one_line(homes[0])}{others}")
    return str(homes[0])


def _print(lines: Iterator[str], *, named: bool) -> None:
    """Each line; whose it is where that changes, as `tail` does."""
    last = None
    for name, data, _ in events_in(lines):
        if name:
            continue
        entry = json.loads(data)
        instance = entry.get("instance")
        if instance != last and (named or last is not None):
            out(f"==> {one_line(str(instance))} <==")
        last = instance
        out(clean(str(entry.get("line"))))
