"""Words for whoever typed the command."""

from __future__ import annotations

import shutil
import sys


def out(text: str) -> None:
    """A line of the result."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def aside(text: str) -> None:
    """A line beside the result: what it is for, what to mind."""
    sys.stdout.flush()
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def fail(reason: object) -> int:
    """Say why nothing came of it; the exit code."""
    aside(f"llamesh: {reason}")
    return 1


def at_terminal() -> bool:
    """Whether a person reads along."""
    return sys.stderr.isatty()


def passing(text: str = "", style: str = "") -> None:
    """A line beside the result that the next one takes the place of; without text it goes away. Only for a
    terminal. style: the escape sequence of a colour.
    """
    # A line that is too long becomes two, of which only one would go.
    width = shutil.get_terminal_size().columns - 1
    sys.stderr.write(f"\r\x1b[K{style}{text[:width]}" + ("\x1b[0m" if style and text else ""))
    sys.stderr.flush()
