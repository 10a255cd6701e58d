"""`llamesh unload`: end the instances of a model."""

from __future__ import annotations

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.acts import node_option, tell, where
from llamesh.commands.shared.completing import complete_models
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import out
from llamesh.commands.shared.words import clean


@make(
    ("llamesh unload qwen3", "this model, here"), ("llamesh unload --all --node box-b", "everything, there")
)
@click.argument("model", metavar="[MODEL]", required=False, shell_complete=complete_models)
@click.option("--all", "everything", is_flag=True, help="all models of the node")
@node_option
@node_options
def command(model: str | None, everything: bool, node: str | None, reach: Reach) -> int:
    """End the instances of MODEL on a node once their requests have ended, and free their memory."""
    if everything == (model is not None):
        raise click.UsageError("name a MODEL, or --all of them")
    client = reach.client()
    answer = tell(client, "unload", node, {} if everything else {"model": model})
    ids = [clean(str(one)) for one in answer.get("unloading") or ()]
    there = where(answer, node, client)
    if ids:
        out(f"{there}: unloading {', '.join(ids)}")
        return exit_codes.OK
    others = [clean(str(one)) for one in answer.get("loaded_on") or ()]
    hint = f"; it is on {', '.join(others)}: see --node" if others else ""
    out(f"{there}: nothing was loaded{hint}")
    return exit_codes.OK
