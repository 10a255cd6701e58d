"""Commands run in this process, as from a shell."""

from __future__ import annotations

import click
from click.testing import CliRunner, Result


def run(command: click.Command, *arguments: str, text: str | None = None) -> Result:
    """Run a command; a defect in it is raised."""
    result = CliRunner().invoke(command, list(arguments), input=text, catch_exceptions=False)
    assert "Traceback" not in result.output
    return result
