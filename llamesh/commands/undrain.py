"""`llamesh undrain`: have a node take requests again."""

from __future__ import annotations

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.acts import node_option, tell, where
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import out


@make(("llamesh undrain", "after `llamesh drain`"))
@node_option
@node_options
def command(node: str | None, reach: Reach) -> int:
    """Have a node take requests again, after `llamesh drain`."""
    client = reach.client()
    answer = tell(client, "undrain", node, {})
    out(f"{where(answer, node, client)}: {answer.get('status') or 'ready'}")
    return exit_codes.OK
