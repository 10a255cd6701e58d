"""Strict reading of the variables that a service manager sets. Whoever reads one takes it out of the
environment, so that no child takes it for its own."""

from __future__ import annotations

import re
from collections.abc import MutableMapping


class BadHandover(Exception):
    """The service manager passed something that can't be used; the message says what and what to do."""


def take_number(environ: MutableMapping[str, str], name: str, most: int) -> int | None:
    """The number from 0 to `most` in a variable, None where it isn't set. Raises BadHandover.

    Only plain decimal digits count: `int` would take signs, spaces, underscores and other scripts' digits.
    """
    text = environ.pop(name, None)
    if text is None:
        return None
    if not re.fullmatch(r"0|[1-9][0-9]{0,19}", text, re.ASCII) or int(text) > most:
        raise BadHandover(
            f"{name} is {text[:40]!r}, not a number from 0 to {most}; "
            "it is for a service manager to set: remove it from the environment"
        )
    return int(text)
