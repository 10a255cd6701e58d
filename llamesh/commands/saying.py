"""Words for whoever typed the command."""

from __future__ import annotations

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
