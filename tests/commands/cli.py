"""Commands run in this process, as from a shell."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click
from click.testing import CliRunner, Result

from llamesh import cli


class _Shell(click.Command):
    """What click's runner calls: one command, ended as the program ends it."""

    def __init__(self, command: click.Command) -> None:
        super().__init__(command.name)
        self.command = command

    def main(self, args: Sequence[str] | None = None, *more: Any, **others: Any) -> Any:
        """Run it, and exit with its code."""
        sys.exit(cli.run(self.command, args))


def run(command: click.Command, *arguments: str, text: str | None = None) -> Result:
    """Run a command; a defect in it is raised."""
    result = CliRunner().invoke(_Shell(command), list(arguments), input=text, catch_exceptions=False)
    assert "Traceback" not in result.output
    return result
