"""`llamesh schema`: the JSON Schema of a file, for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import click

from llamesh.commands.exit_codes import FAILED, OK
from llamesh.commands.saying import aside, out


@click.command(
    name="schema",
    short_help="Print the JSON schema of a file, for editors.",
    epilog="\b\nExample:\n  llamesh schema cookbook --output cookbook.schema.json\n"
    "and as the first line of cookbook.yaml:\n  # yaml-language-server: $schema=./cookbook.schema.json",
)
@click.argument("file", type=click.Choice(["config", "cookbook", "secrets"]))
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="PATH", help="Write it to a file."
)
@click.option("--json", "as_json", is_flag=True, hidden=True, help="It is JSON in any case.")
@click.pass_context
def command(context: click.Context, file: str, output: Path | None, as_json: bool) -> None:
    """Print the JSON Schema (draft 2020-12) of config.yaml, cookbook.yaml or secrets.yaml. Editors with the
    YAML language server complete and check by it, and show what each key means.
    """
    from llamesh.config.json_schema import Name, json_schema

    text = json.dumps(json_schema(cast(Name, file)), indent=1)
    if output is None:
        out(text)
        context.exit(OK)
    try:
        # What was there is a schema of an older version, or of another name.
        output.write_text(text + "\n")
    except OSError as error:
        aside(f"llamesh: {output} can't be written: {error.strerror}")
        context.exit(FAILED)
