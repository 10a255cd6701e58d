"""`llamesh doctor`: what is wrong on this machine, and what to do about it.

Exit codes: 0, also with warnings; 1 when something has to be mended. It takes some seconds at most.
"""

from __future__ import annotations

from pathlib import Path

import click

from llamesh.commands.file_options import FilePaths, file_options, json_option


@click.command(
    name="doctor",
    short_help="Say what is wrong on this machine, and what to do.",
    epilog="\b\nExamples:\n  llamesh doctor\n"
    "  llamesh doctor --json | jq '.findings[] | select(.level == \"bad\")'",
)
@file_options
@json_option
@click.pass_context
def command(
    context: click.Context, config: Path | None, secrets: Path | None, cookbook: Path, as_json: bool
) -> None:
    """Look at files, ports, multicast, GPUs, the engine, the clock, peers, limits and the service, and say
    what is wrong and what mends it. With a node running, its state is asked, too (LLAMESH_API_KEY, or the
    configuration's own key). Takes some seconds at most, and changes nothing.

    Exit code 1 when something has to be mended.
    """
    from llamesh.commands.doctor.report import doctor

    context.exit(doctor(FilePaths(config, secrets, cookbook), as_json=as_json))
