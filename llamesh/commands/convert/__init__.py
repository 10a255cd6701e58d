"""`llamesh import FILE`: a cookbook from llama-swap's YAML or from a preset of llama.cpp's router.

What can't be taken over is said on stderr, and in comments where it would stand. Exit codes: 0 when
there is a cookbook; 1 when the file can't be read, nothing in it can be taken over, or a file would
be overwritten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

_PATH = click.Path(path_type=Path)


@click.command(
    name="import",
    short_help="Make a cookbook from llama-swap's YAML or a llama.cpp preset.",
    epilog="\b\nExamples:\n  llamesh import llama-swap.yaml > cookbook.yaml\n"
    "  llamesh import models.ini --output cookbook.yaml --config-output config.yaml",
)
@click.argument("file", type=_PATH)
@click.option("--from", "kind", type=click.Choice(["llama-swap", "llama.cpp"]), help="Instead of a guess.")
@click.option("--output", type=_PATH, metavar="PATH", help="The cookbook to write (default: stdout).")
@click.option("--config-output", type=_PATH, metavar="PATH", help="Also write the settings that follow.")
@click.option("--force", is_flag=True, help="Overwrite files that are there.")
@click.option("--json", "as_json", is_flag=True, help="Print texts and report as JSON.")
@click.pass_context
def command(
    context: click.Context,
    file: Path,
    kind: Literal["llama-swap", "llama.cpp"] | None,
    output: Path | None,
    config_output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Turn the configuration of llama-swap (YAML), or a preset of llama.cpp's router (INI), into a cookbook.
    What can't be taken over is reported on stderr and in comments of the cookbook.
    """
    from llamesh.commands.convert.conversion import Wanted, import_file

    context.exit(import_file(file, kind, Wanted(output, config_output, force, as_json)))
