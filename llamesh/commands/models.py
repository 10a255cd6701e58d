"""`llamesh models`: which weights are on this disk, and which others of the mesh have."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.node import read_state
from llamesh.commands.shared.options import Files, files_options, json_option
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import fail, out
from llamesh.commands.shared.sheets import Column, Sheet, cell, show
from llamesh.commands.shared.shelf import Item, inventory
from llamesh.config.problems import ConfigError
from llamesh.local.weights import WeightsError, find_cache
from llamesh.local.weights.progress import in_words

# States of a model on a node in which its weights are there, see docs/api.md.
_WITH_WEIGHTS = ("loaded", "loading", "fits", "needs_eviction")


@make(("llamesh models", "a table"), ("llamesh models --hash --json", "with the SHA-256 of all of them"))
@click.option("--hash", "work_out", is_flag=True, help="work out hashes that aren't known yet")
@json_option
@files_options(cookbook=True)
def command(work_out: bool, as_json: bool, files: Files) -> int:
    """Show which models are on this disk and, while the node runs, which other nodes have."""
    try:
        settings, cookbook = files.read()
        items = inventory(settings, cookbook, find_cache(os.environ), work_out=work_out)
        _add_other_nodes(items, settings.node_id, read_state(settings, os.environ))
    except (ConfigError, WeightsError, OSError) as error:
        return fail(error)
    if as_json:
        out(json.dumps([_document(item) for item in items], indent=1))
        return exit_codes.OK
    if not items:
        out("no models on this disk nor in the mesh; `llamesh add` and `llamesh pull` bring some")
        return exit_codes.OK
    show([_sheet(items)])
    return exit_codes.OK


def _sheet(items: list[Item]) -> Sheet:
    columns = (
        Column("model"),
        Column("size", right=True, keep=5),
        Column("sha256", keep=1),
        Column("from", keep=3),
        Column("used by", keep=4),
        Column("node"),
    )
    rows = [
        (
            cell(item.name),
            cell(in_words(item.size) if item.path else "-"),
            cell(item.sha256[:12] or "-", "dim"),
            cell(item.origin),
            cell(", ".join(item.profiles) or "-"),
            cell(", ".join(item.nodes)),
        )
        for item in items
    ]
    return Sheet("", columns, rows)


def _add_other_nodes(items: list[Item], own: str, state: dict[str, Any]) -> None:
    """Who else has the weights of the profiles, as the running node knows it; and what only others have."""
    for model in state.get("models", ()):
        having = {
            node
            for node, cell in model["nodes"].items()
            if node != own and cell.get("state") in _WITH_WEIGHTS
        }
        known = [item for item in items if model["name"] in item.profiles]
        for item in known:
            item.nodes += sorted(having - set(item.nodes))
        if having and not known:
            items.append(Item(model["name"], "", 0, "", "mesh", sorted(having), [model["name"]]))


def _document(item: Item) -> dict[str, object]:
    document = asdict(item)
    del document["record"]
    return document
