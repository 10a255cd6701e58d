"""`llamesh cancel`: end a request that runs."""

from __future__ import annotations

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import out


@make(("llamesh cancel req-7f3a", "ids: `llamesh top`, or the header X-Request-Id"))
@click.argument("request_id", metavar="REQUEST_ID")
@node_options
def command(request_id: str, reach: Reach) -> int:
    """End a request that runs or waits anywhere in the mesh; its client gets an error."""
    answer = reach.client().post("/admin/cancel", {"request_id": request_id})
    out(f"{answer.get('node') or 'a node'}: cancelled {request_id}")
    return exit_codes.OK
