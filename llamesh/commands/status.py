"""`llamesh status`: the mesh as tables, once or live."""

from __future__ import annotations

import json
import sys
import time

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.following import Following, State
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.options import json_option
from llamesh.commands.shared.saying import aside, out
from llamesh.commands.shared.sheets import Sheet, plain, show
from llamesh.commands.shared.views import attention, instances, models, nodes, summary

# Ages grow by themselves.
_REDRAW_SECONDS = 1.0

# Without a terminal nobody sees a line that moves.
_PATIENT_SECONDS = 3600.0


@make(
    ("llamesh status", "once"),
    ("llamesh status --watch", "until Ctrl-C"),
    ("llamesh status --json | jq '.nodes[].id'", "the document of docs/api.md"),
    ("llamesh status --url http://192.0.2.7:8080", "of a node elsewhere"),
)
@click.option("-w", "--watch", is_flag=True, help="go on until Ctrl-C; with --json a document a line")
@json_option
@node_options
def command(watch: bool, as_json: bool, reach: Reach) -> int:
    """Show the mesh: its nodes with their memory, models, instances, and what needs attention."""
    client = reach.client()
    if not watch:
        state = client.get("/api/v1/state")
        if as_json:
            out(json.dumps(state, ensure_ascii=False))
        else:
            show(_sheets(state), summary(state))
        return exit_codes.OK
    with Following(client) as following:
        try:
            if sys.stdout.isatty() and not as_json:
                _live(following)
            else:
                _log(following, as_json=as_json)
        except KeyboardInterrupt:
            return exit_codes.OK  # that is how it is meant to end
    return exit_codes.OK


def _sheets(state: State) -> list[Sheet]:
    return [attention(state), nodes(state), models(state), instances(state, time.time())]


def _log(following: Following, *, as_json: bool) -> None:
    """Each change as a document, or as the tables."""
    problem = ""
    while True:
        state = following.state
        out(
            json.dumps(state, ensure_ascii=False)
            if as_json
            else f"{summary(state)}\n\n{plain(_sheets(state))}"
        )
        while not following.wait(_PATIENT_SECONDS) or following.state is state:
            if following.problem and following.problem != problem:
                aside(f"llamesh: {following.problem}; trying again")
            problem = following.problem


def _live(following: Following) -> None:
    from rich.console import Group, RenderableType
    from rich.live import Live
    from rich.text import Text

    from llamesh.commands.shared.screen import console, drawn, heading

    screen = console()

    def picture() -> RenderableType:
        state = following.state
        head = heading(summary(state), following.problem)
        # The last line stays free: the cursor is there.
        return Group(head, Text(), drawn(_sheets(state), screen.width, screen.height - 3))

    with Live(picture(), console=screen, auto_refresh=False) as live:
        while True:
            following.wait(_REDRAW_SECONDS)
            live.update(picture(), refresh=True)
