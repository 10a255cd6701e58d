"""`llamesh check`: are both files right, and what would start on this machine?"""

from __future__ import annotations

import click

from llamesh.commands.shared.options import Files, files_options, json_option
from llamesh.commands.shared.options import command as make


@make(
    ("llamesh check", "before the node is started, or started again"),
    ("llamesh check --config site.yaml --json | jq .errors", "for a script"),
    epilog="Exit code 1 when something has to be mended; warnings leave it 0.",
)
@click.option("--commands/--no-commands", default=True, help="whether to print the command lines")
@json_option
@files_options(cookbook=True)
def command(commands: bool, as_json: bool, files: Files) -> int:
    """Read configuration and cookbook, and say what would start on this machine.

    All mistakes are told at once, with file and line. Then, for each profile: where its weights are, how
    llama-server would be started, how much memory it needs, and whether that fits on this machine. Nothing is
    started and nothing is downloaded.
    """
    from llamesh.commands.check.report import check

    return check(files, commands=commands, as_json=as_json)
