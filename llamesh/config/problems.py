"""Everything wrong with the files, as values: file, line, YAML path, what, and what instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeAlias

#: Where something stands in a document: `("models", 0, "profiles", 1, "id")`.
KeyPath: TypeAlias = tuple[str | int, ...]


class Place(NamedTuple):
    """Where a value was written: a file (or an environment variable) and its line, counted from 1."""

    file: str
    line: int | None


class Finding(NamedTuple):
    """A problem before its place is known: a path below the value that was looked at."""

    at: KeyPath
    message: str
    hint: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    `path` is written as in `models[0].profiles[1].idle_timeout_seconds`, empty for the file as a
    whole; `line` counts from 1 and is None where there is none. `message` says what is wrong and
    `hint` what would be right; neither ever holds a key's value.
    """

    file: str
    line: int | None
    path: str
    message: str
    hint: str

    def __str__(self) -> str:
        where = self.file if self.line is None else f"{self.file}:{self.line}"
        what = f"{self.path}: {self.message}" if self.path else self.message
        return f"{where}: {what}" + (f" ({self.hint})" if self.hint else "")


class ConfigError(Exception):
    """Files that can't be used, with every problem that was found; `str()` is one line for each.

    A file of another program can be wrong in thousands of places: `str()` stops at SHOWN lines and
    says how many more there are.
    """

    SHOWN: ClassVar[int] = 100

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(dict.fromkeys(problems))
        lines = [str(problem) for problem in self.problems[: self.SHOWN]]
        if len(self.problems) > self.SHOWN:
            lines.append(f"... and {len(self.problems) - self.SHOWN} more")
        super().__init__("\n".join(lines))


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """The problems file by file as they first appear, and in the order of their lines in each."""
    listed = list(problems)
    files = list(dict.fromkeys(problem.file for problem in listed))
    return sorted(listed, key=lambda problem: (files.index(problem.file), problem.line or 0))


def written(path: Sequence[str | int]) -> str:
    """A key path as people write it: `models[0].name`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        # A stranger's key may be long, or hold what a terminal would obey.
        word = part if part.isprintable() and len(part) <= 60 else shown(part)
        text += f".{word}" if text else word
    return text


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that resembles `word` most; there must be one."""
    by_folded = {name.casefold(): name for name in known}
    # Long inputs cost quadratic time and resemble nothing anyway.
    folded = word.casefold()[:100]
    (close,) = difflib.get_close_matches(folded, by_folded, n=1, cutoff=0.0)
    return by_folded[close]


def shown(value: object, limit: int = 60) -> str:
    """A value for a message: on one line and short."""
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value if len(value) <= limit else value[:limit] + "...")
        case int() | float():
            # A thousand digits are a mistake, and Python refuses to print more than 4,300.
            return str(value) if isinstance(value, float) or abs(value) < 10**30 else "a huge number"
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return "nothing" if value is None else type(value).__name__
