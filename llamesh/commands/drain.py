"""`llamesh drain`: have a node take no new requests, and wait until those that are there have ended."""

from __future__ import annotations

import sys
import time
from typing import Any

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.acts import node_option, tell, where
from llamesh.commands.shared.client import Client
from llamesh.commands.shared.failed import Failed, TimedOut
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import aside, out
from llamesh.commands.shared.words import count

_LOOK_SECONDS = 0.25

# Other nodes are asked for their state at most twice a second.
_LOOK_FAR_SECONDS = 0.6


@make(
    ("llamesh drain --wait --timeout 60", "at most a minute; 4 when requests are left"),
    ("llamesh drain --wait && systemctl restart llamesh", "no request is lost"),
    ("llamesh drain --node box-b", "another node"),
    epilog="Exit code 4: requests were left when the time was over. The node goes on draining then.",
)
@click.option("--wait", is_flag=True, help="until no request is left there")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="wait no longer than that (default: as long as it takes)",
)
@node_option
@node_options
def command(wait: bool, timeout: float | None, node: str | None, reach: Reach) -> int:
    """Have a node take no new requests until `llamesh undrain`.

    Those that are there are finished; new ones go to other nodes, or are refused.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is for --wait")
    client = reach.client()
    answer = tell(client, "drain", node, {})
    there = where(answer, node, client)
    if wait:
        _wait(client, node, there, timeout)
    out(f"{there}: {'drained' if wait else answer.get('status') or 'draining'}")
    return exit_codes.OK


def _wait(client: Client, node: str | None, there: str, timeout: float | None) -> None:
    """Until nothing runs. Raises TimedOut when something still does, Failed."""
    ends_at = None if timeout is None else time.monotonic() + timeout
    told = -1
    while left := _left(client, node):
        if ends_at is not None and time.monotonic() >= ends_at:
            raise TimedOut(
                f"{count(left, 'request')} {'is' if left == 1 else 'are'} still left on {there} after "
                f"{timeout:g} s; it goes on draining"
            )
        if left != told and sys.stderr.isatty():
            told = left
            aside(f"{there}: {count(left, 'request')} left")
        time.sleep(_LOOK_SECONDS if node is None else _LOOK_FAR_SECONDS)


def _left(client: Client, node: str | None) -> int:
    """How many requests are on the node."""
    if node is None:
        running = client.get("/metrics/json").get("current_requests")
        if not isinstance(running, int):
            raise Failed("the node doesn't tell how many requests it has")
        return running
    return _left_on(client.get("/api/v1/state"), node)


def _left_on(state: dict[str, Any], node: str) -> int:
    """The same of another node: requests that it answers, that wait there, or that its clients sent."""
    found = [one for one in state["nodes"] if one["id"] == node]
    if not found:
        raise Failed(f"node {node[:64]} isn't in the mesh any more, so nobody knows what runs there")
    [one] = found
    if one["self"] or one["fresh"]:
        passing = sum(node in (r["node"], r["served_by"], *r["via"]) for r in state["requests"])
        return max(passing, (one["queue"] or 0) + (one["running"] or 0))
    # What it said is from before; something may run.
    return 1
