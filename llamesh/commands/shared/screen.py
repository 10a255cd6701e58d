"""Tables on a terminal. Imports rich, so it is imported only where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from llamesh.commands.shared.sheets import STYLES, Cell, Sheet

_GAP = 2

# What a column that may shrink is worth at least.
_LEAST_WIDTH = 12


def drawn(sheets: Iterable[Sheet], width: int, height: int | None = None) -> RenderableType:
    """The tables for a screen of this width; with a height, rows are left out so that all titles fit."""
    shown = [sheet for sheet in sheets if sheet.rows or sheet.empty]
    parts: list[RenderableType] = []
    for sheet, most in zip(shown, _shares(shown, height), strict=True):
        if parts:
            parts.append(Text())
        if sheet.title:
            parts.append(Text(sheet.title, style="bold"))
        parts.append(_table(sheet, width, most) if sheet.rows else Text(f"  {sheet.empty}", style="dim"))
    return Group(*parts)


def console(*, stderr: bool = False) -> Console:
    """rich's, without its guesses about what numbers and paths are."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _shares(sheets: Sequence[Sheet], height: int | None) -> list[int]:
    """How many rows of each are shown: those that need little get it, the rest share what is left."""
    wanted = [len(sheet.rows) for sheet in sheets]
    if height is None:
        return wanted
    # Title, heads, the gap.
    room = height - sum(bool(s.title) + (1 if s.rows and _headed(s) else bool(s.empty)) + 1 for s in sheets)
    shares = [0] * len(sheets)
    waiting = sorted(range(len(sheets)), key=lambda number: wanted[number])
    for done, number in enumerate(waiting):
        fair = max(0, room) // (len(waiting) - done)
        shares[number] = min(wanted[number], fair)
        room -= shares[number]
    return shares


def _headed(sheet: Sheet) -> bool:
    return any(column.title for column in sheet.columns)


def _table(sheet: Sheet, width: int, most: int) -> Table:
    left_out = len(sheet.rows) - most
    rows = sheet.rows[: max(0, most - 1)] if left_out else sheet.rows
    widths = [
        max([cell_len(column.title), *(cell_len(row[number].text) for row in sheet.rows)])
        for number, column in enumerate(sheet.columns)
    ]
    chosen = _fitting(sheet, widths, width - _GAP)
    table = Table(
        box=None, show_header=_headed(sheet), header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False
    )
    table.add_column("", width=0)  # the left margin
    for number in chosen:
        column = sheet.columns[number]
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            # Figures stay whole; what is long and last gives way.
            min_width=widths[number] if widths[number] <= _LEAST_WIDTH else _LEAST_WIDTH,
        )
    for row in rows:
        table.add_row("", *(_text(row[number]) for number in chosen))
    if left_out:
        table.add_row("", Text(f"… {left_out + 1} more", style="dim"))
    return table


def _fitting(sheet: Sheet, widths: Sequence[int], width: int) -> list[int]:
    """The columns that there is room for, in their order."""
    chosen = list(range(len(sheet.columns)))

    def needed() -> int:
        # A column that is kept at all costs may be cut.
        return sum(
            _GAP + (min(widths[n], _LEAST_WIDTH) if sheet.columns[n].keep >= 9 else widths[n]) for n in chosen
        )

    while needed() > width:
        least = min(chosen, key=lambda n: (sheet.columns[n].keep, -n))
        if sheet.columns[least].keep >= 9:
            break
        chosen.remove(least)
    return chosen


def _text(entry: Cell) -> Text:
    return Text(entry.text, style=STYLES.get(entry.style, ""))
