"""Telling a node to do something: what the commands for it share."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

import click

from llamesh.commands.shared.client import Client
from llamesh.commands.shared.completing import complete_models, complete_nodes
from llamesh.commands.shared.failed import Failed, NoSuchModel, Refused

node_option = click.option(
    "--node",
    metavar="ID",
    help="do it at that node of the mesh (default: the one that is asked)",
    shell_complete=complete_nodes,
)

model_argument = click.argument("model", metavar="MODEL", shell_complete=complete_models)

# A node on a slow link is asked by way of the one that is asked.
_SECONDS = 30.0


def tell(
    client: Client, act: str, node: str | None, document: dict[str, Any], *, seconds: float = _SECONDS
) -> dict[str, Any]:
    """`POST /admin/ACT`, at that node; its answer. Raises Failed."""
    return client.post(f"/admin/{act}", document | ({"node": node} if node else {}), seconds=seconds)


def where(answer: dict[str, Any], node: str | None, client: Client) -> str:
    """The node that did it, for people."""
    return str(answer.get("node") or node or client.place.name or client.place)


@contextlib.contextmanager
def naming(client: Client, model: str) -> Iterator[None]:
    """A model that isn't known is an error that names the near ones."""
    try:
        yield
    except Refused as error:
        if error.kind != "model_not_found":
            raise
        names: list[str] = []
        with contextlib.suppress(Failed):
            names = [str(one.get("id")) for one in client.get("/v1/models").get("data") or ()]
        near = difflib.get_close_matches(model, names, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`llamesh status` shows which there are"
        raise NoSuchModel(f"{error.message}; {hint}") from None
