"""`llamesh schema`: the JSON Schema of a file, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import click

from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.options import command as make
from llamesh.commands.shared.saying import out


@make(
    ("llamesh schema cookbook --output cookbook.schema.json", "for cookbook.yaml beside it"),
    epilog="Then as the first line of cookbook.yaml:\n\n\b\n"
    "  # yaml-language-server: $schema=./cookbook.schema.json",
)
@click.argument("file", type=click.Choice(["config", "cookbook", "secrets"]))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="PATH",
    help="the file to write (default: stdout)",
)
@click.option("--json", "as_json", is_flag=True, hidden=True, help="it is JSON in any case")
def command(file: str, output: Path | None, as_json: bool) -> int:
    """Print the JSON Schema (draft 2020-12) of config.yaml, cookbook.yaml or secrets.yaml.

    Editors with the YAML language server complete and check by it, and show what each key means.
    """
    from llamesh.config.json_schema import Name, json_schema

    text = json.dumps(json_schema(cast(Name, file)), indent=1)
    if output is None:
        out(text)
        return exit_codes.OK
    try:
        # What was there is a schema of an older version, or of another name.
        output.write_text(text + "\n")
    except OSError as error:
        raise Failed(f"{output} can't be written: {error.strerror}") from None
    return exit_codes.OK
