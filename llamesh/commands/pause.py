"""`llamesh pause [TIME]`: have a node leave its machine to the owner for a while.

Exit codes: 0 when it does, 1 when it can't be reached or refuses, 2 for a bad TIME.
"""

from __future__ import annotations

import re
from typing import Any

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.acts import node_option, tell, where
from llamesh.commands.shared.failed import Failed, TimedOut, Unreached
from llamesh.commands.shared.node import Reach, node_options
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import out
from llamesh.commands.shared.words import clean

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def pause_seconds(text: str) -> float:
    """`30m`, `2h`, `1h30m`, `90` (seconds): in seconds; `off`: 0. Raises click.BadParameter."""
    word = text.strip().lower()
    if word == "off":
        return 0.0
    if not re.fullmatch(r"\d{1,9}(\.\d{1,3})?[smhd]?|(\d{1,9}[smhd])+", word):
        raise click.BadParameter(f"not a time: {text[:40]!r}; such as 90 (seconds), 30m, 2h, or off")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"([\d.]+)([smhd]?)", word))


def _seconds(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    return None if text is None else pause_seconds(text)


@make(
    ("llamesh pause 2h", "for two hours; also 90 (seconds), 30m, 1h30m"),
    ("llamesh pause", "until `llamesh pause off`"),
    epilog="Exit code 1 also where no node answers.",
)
@click.argument("time", metavar="[TIME]", required=False, callback=_seconds)
@node_option
@node_options
def command(time: float | None, node: str | None, reach: Reach) -> int:
    """Have a node end its instances and take no requests, for TIME or until `off`."""
    document: dict[str, Any] = {} if time is None else {"seconds": time}
    try:
        client = reach.client()
        answer = tell(client, "pause", node, document)
    except (Unreached, TimedOut) as error:
        raise Failed(error.message) from None
    words = answer.get("reason") or answer.get("status") or "done"
    out(f"{where(answer, node, client)}: {clean(str(words))}")
    return exit_codes.OK
