"""`llamesh import FILE`: a cookbook from llama-swap's YAML or from a preset of llama.cpp's router.

What can't be taken over is said on stderr, and in comments where it would stand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from llamesh.commands.shared.options import command as make

_PATH = click.Path(path_type=Path)


@make(
    ("llamesh import llama-swap.yaml > cookbook.yaml", "models only"),
    ("llamesh import models.ini --output cookbook.yaml --config-output config.yaml", "settings, too"),
    epilog="Exit code 1 when FILE can't be read, nothing of it can be taken over, or a file is in the way.",
)
@click.argument("file", type=_PATH)
@click.option(
    "--from", "kind", type=click.Choice(["llama-swap", "llama.cpp"]), help="whose file it is, without a guess"
)
@click.option("--output", type=_PATH, metavar="PATH", help="the cookbook to write (default: stdout)")
@click.option("--config-output", type=_PATH, metavar="PATH", help="also write the settings that follow")
@click.option("--force", is_flag=True, help="overwrite files that are there")
@click.option("--json", "as_json", is_flag=True, help="print texts and report as JSON")
def command(
    file: Path,
    kind: Literal["llama-swap", "llama.cpp"] | None,
    output: Path | None,
    config_output: Path | None,
    force: bool,
    as_json: bool,
) -> int:
    """Make a cookbook of llama-swap's configuration (YAML), or of a preset of llama.cpp's router (INI).

    What can't be taken over is reported on stderr and in comments of the cookbook.
    """
    from llamesh.commands.convert.conversion import Wanted, import_file

    return import_file(file, kind, Wanted(output, config_output, force, as_json))
