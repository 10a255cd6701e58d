"""`llamesh check`: are both files right, and what would start on this machine?

Exit codes: 0, also with warnings; 1 when something has to be mended. A node needn't run; nothing is
started but the engine's `--version` and `--help`, and nothing is fetched.
"""

from __future__ import annotations

from pathlib import Path

import click

from llamesh.commands.file_options import FilePaths, file_options, json_option


@click.command(
    name="check",
    short_help="Check both files, and say what would start on this machine.",
    epilog="\b\nExamples:\n  llamesh check\n  llamesh check --config site.yaml --json | jq .errors",
)
@file_options
@click.option("--commands/--no-commands", default=True, help="Whether to print the command lines.")
@json_option
@click.pass_context
def command(
    context: click.Context,
    config: Path | None,
    secrets: Path | None,
    cookbook: Path,
    commands: bool,
    as_json: bool,
) -> None:
    """Read configuration and cookbook, tell all mistakes at once with file and line, and say for each
    profile where its weights are, how llama-server would be started, how much memory it needs, and whether
    that fits on this machine. Nothing is started and nothing is downloaded.

    Exit code 1 when something has to be mended.
    """
    from llamesh.commands.check.report import check

    paths = FilePaths(config, secrets, cookbook)
    context.exit(check(paths, commands=commands, as_json=as_json))
