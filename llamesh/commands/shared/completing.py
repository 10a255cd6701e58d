"""Names that the shell completes: models and nodes, from the running node, or from the cookbook."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

# Somebody waits with a finger on the key.
_SECONDS = 0.5


def complete_models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models of the mesh where a node answers at once, else those of the cookbook; nothing in doubt."""
    answer = _ask(ctx, "/v1/models")
    listed = answer.get("data") if answer is not None else None
    names = [one["id"] for one in listed or () if isinstance(one, dict) and isinstance(one.get("id"), str)]
    if answer is None:
        names = _in_cookbook(ctx)
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_nodes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Nodes of the mesh, as the running node knows them."""
    answer = _ask(ctx, "/cluster/nodes") or {}
    nodes = answer.get("nodes")
    return [CompletionItem(name) for name in nodes or () if str(name).startswith(incomplete)]


def _ask(ctx: click.Context, path: str) -> dict[str, Any] | None:
    """What a node says, None when none does in time. Nothing goes wrong loudly."""
    from llamesh.commands.shared.node import Reach
    from llamesh.commands.shared.options import Files

    given = ctx.params
    found: list[dict[str, Any]] = []

    def ask() -> None:
        with contextlib.suppress(Exception):
            key_file = given.get("key_file")
            reach = Reach(
                Files.named(_path(ctx, "config"), _path(ctx, "secrets")),
                given.get("url"),
                None if key_file == "-" else key_file,
                given.get("cacert"),
            )
            found.append(reach.client(_SECONDS).get(path))

    # A thread, since a name server that is asleep keeps no time limit of ours.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(2 * _SECONDS)
    return found[0] if found else None


def _in_cookbook(ctx: click.Context) -> list[str]:
    from llamesh.config.cookbook import load_cookbook

    with contextlib.suppress(Exception):
        path = _path(ctx, "cookbook") or Path("cookbook.yaml")
        return [profile.public_name for profile in load_cookbook(path).listed()]
    return []


def _path(ctx: click.Context, name: str) -> Path | None:
    """A file that was named after the command or before it."""
    for one in (ctx, ctx.parent):
        value = one.params.get(name) if one is not None else None
        if value is not None:
            return Path(value)
    return None
