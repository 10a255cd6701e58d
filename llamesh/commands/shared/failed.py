"""Why a command isn't done, with its exit code."""

from __future__ import annotations

import sys
from typing import IO, Any, ClassVar

import click

from llamesh.commands.shared import exit_codes


class Failed(click.ClickException):
    """It can't be done; the message says why, and what to do."""

    exit_code: ClassVar[int] = exit_codes.FAILED

    def show(self, file: IO[Any] | None = None) -> None:
        """One line on stderr, as all of the program's own."""
        sys.stdout.flush()
        click.echo(f"llamesh: {self.message}", file=file or sys.stderr)


class BadFiles(Failed):
    """A file isn't right; the message names it, and the line."""

    def show(self, file: IO[Any] | None = None) -> None:
        """The list of what is wrong, as a node prints it."""
        click.echo(self.message, file=file or sys.stderr)


class Unreached(Failed):
    """No node answers there."""

    exit_code: ClassVar[int] = exit_codes.UNREACHABLE


class TimedOut(Failed):
    """It took longer than anybody waits."""

    exit_code: ClassVar[int] = exit_codes.TIMEOUT


class NoSuchModel(Failed):
    """Nobody there knows a model of that name."""


class Refused(Failed):
    """The node answered with an error. status: of HTTP; kind: the error's `type`."""

    def __init__(self, message: str, status: int, kind: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
