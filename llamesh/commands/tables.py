"""Tables for people: drawn with rich at a terminal, plain columns anywhere else."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence


def printable(text: str) -> str:
    """The text on one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def show_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[str] = (),
    styles: Mapping[str, str] | None = None,
) -> None:
    """Print rows to stdout. `right`: headers of columns of numbers; `styles`: how a cell of this very text
    looks at a terminal (`{"never": "red"}`).
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(headers, cells, right, styles or {})
        return
    widths = [max(len(row[column]) for row in (headers, *cells)) for column in range(len(headers))]
    for row in (headers, *cells):
        words = (
            cell.rjust(width) if header in right else cell.ljust(width)
            for header, cell, width in zip(headers, row, widths, strict=True)
        )
        sys.stdout.write("  ".join(words).rstrip() + "\n")


def _draw(
    headers: Sequence[str],
    cells: Sequence[Sequence[str]],
    right: Collection[str],
    styles: Mapping[str, str],
) -> None:
    # Megabytes that only a person at a terminal pays for.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for header in headers:
        # Folded, not cut: a name that is cut can't be copied.
        table.add_column(header, justify="right" if header in right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, style=styles.get(cell, "")) for cell in row))
    Console().print(table)
