"""Tables on a terminal. Imports rich, so it is imported only where there is one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llamesh.commands.shared.sheets import STYLES, Cell, Sheet

_GAP = 2

_MARGIN = 2

# A column that always stays may be cut, to no less than this as long as others can go.
_LEAST_WIDTH = 14
_ALWAYS = 9


def drawn(sheets: Iterable[Sheet], width: int, height: int | None = None) -> RenderableType:
    """The tables for a screen of this width; with a height, rows are left out so that all titles fit."""
    shown = [sheet for sheet in sheets if sheet.rows or sheet.empty]
    parts: list[RenderableType] = []
    for sheet, most in zip(shown, _shares(shown, height), strict=True):
        if parts:
            parts.append(Text())
        if sheet.title:
            parts.append(Text(sheet.title, style="bold"))
        if sheet.rows:
            parts.append(_table(sheet, width, most, wraps=height is None))
        else:
            parts.append(Text(f"{' ' * _MARGIN}{sheet.empty}", style="dim"))
    return Group(*parts)


def heading(words: str, problem: str = "") -> Text:
    """The first line of a screen that moves."""
    style = "bold red" if problem else "dim"
    return Text(problem or words, style=style, no_wrap=True, overflow="ellipsis")


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


def _table(sheet: Sheet, width: int, most: int, *, wraps: bool) -> RenderableType:
    left_out = len(sheet.rows) - most
    rows = sheet.rows[: max(0, most - 1)] if left_out else sheet.rows
    table = Table(
        box=None, show_header=_headed(sheet), header_style="dim", padding=(0, _GAP, 0, 0), pad_edge=False
    )
    margin = _MARGIN if sheet.title else 0
    chosen = _fitting(sheet, width - margin)
    for number, columns in chosen.items():
        column = sheet.columns[number]
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            width=columns,
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    for row in rows:
        table.add_row(*(_text(row[number]) for number in chosen))
    shown = Padding(table, (0, 0, 0, margin))
    if not left_out:
        return shown
    more = Text(f"{' ' * margin}… {len(sheet.rows) - len(rows)} more", style="dim")
    return Group(shown, more) if rows else more


def _fitting(sheet: Sheet, width: int) -> dict[int, int]:
    """The columns that there is room for, and how wide each is."""
    widths = {
        number: max([cell_len(column.title), *(cell_len(row[number].text) for row in sheet.rows)])
        for number, column in enumerate(sheet.columns)
    }

    def over(least: int) -> int:
        """What is too much when columns that stay are cut down to `least`."""
        needed = (
            min(columns, least) if sheet.columns[number].keep >= _ALWAYS else columns
            for number, columns in widths.items()
        )
        return sum(needed) + _GAP * (len(widths) - 1) - width

    while over(_LEAST_WIDTH) > 0:
        number = min(widths, key=lambda n: (sheet.columns[n].keep, -n))
        if sheet.columns[number].keep >= _ALWAYS:
            break
        del widths[number]
    # The longest gives way first.
    while (excess := over(1_000_000)) > 0:
        number = max(widths, key=lambda n: widths[n])
        others = max([columns for n, columns in widths.items() if n != number], default=0)
        if widths[number] <= 1:
            break
        widths[number] = max(1, widths[number] - excess, min(others, widths[number] - 1))
    return widths


def _text(entry: Cell) -> Text:
    return Text(entry.text, style=STYLES.get(entry.style, ""))
