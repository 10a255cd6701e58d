"""Tables, and how they are printed: as plain text here, with colours by `screen`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from llamesh.commands.shared.saying import out
from llamesh.commands.shared.words import one_line


class Cell(NamedTuple):
    """style: "" or one of STYLES."""

    text: str
    style: str = ""


#: style -> what rich calls it
STYLES = {"good": "green", "busy": "cyan", "warn": "yellow", "bad": "bold red", "dim": "dim", "bold": "bold"}


class Column(NamedTuple):
    """right: figures are; keep: the columns with the least of it go first where a screen is too narrow."""

    title: str
    right: bool = False
    keep: int = 9


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table. empty: what stands there instead of no rows; without it, nothing does."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]] = field(default=())
    empty: str = ""


def cell(value: object, style: str = "") -> Cell:
    """Of anything; control characters can't get in."""
    return Cell(one_line(str(value)), style)


def show(sheets: Iterable[Sheet], heading: str = "") -> None:
    """Print tables to stdout, below a heading if there is one: drawn at a terminal, plain anywhere else."""
    if not sys.stdout.isatty():
        out((f"{heading}\n\n" if heading else "") + plain(sheets).rstrip("\n"))
        return
    # Late: it imports rich, megabytes that only a person at a terminal pays for.
    from llamesh.commands.shared.screen import console, drawn

    screen = console()
    if heading:
        screen.print(heading, style="dim")
        screen.print()
    screen.print(drawn(sheets, screen.width))


def plain(sheets: Iterable[Sheet]) -> str:
    """For files and pipes: every column, as wide as it has to be; below a title, indented."""
    return "\n".join(block for sheet in sheets if (block := _plain(sheet)))


def _plain(sheet: Sheet) -> str:
    if not sheet.rows:
        return f"{sheet.title}\n  {sheet.empty}\n" if sheet.empty else ""
    titles = [column.title.upper() for column in sheet.columns]
    rows = [titles, *([entry.text or "-" for entry in row] for row in sheet.rows)]
    if not any(titles):
        del rows[0]
    widths = [max(len(row[number]) for row in rows) for number in range(len(sheet.columns))]
    lines, margin = ([sheet.title], "  ") if sheet.title else ([], "")
    for row in rows:
        cells = [
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(row, widths, sheet.columns, strict=True)
        ]
        lines.append((margin + "  ".join(cells)).rstrip())
    return "\n".join(lines) + "\n"
