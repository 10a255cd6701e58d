"""Tables: columns for a pipe, drawn for a person, and nothing that a terminal would obey."""

from __future__ import annotations

import io
import sys

import pytest

from llamesh.commands.tables import printable, show_table


class Terminal(io.StringIO):
    """What stdout is where somebody looks."""

    def isatty(self) -> bool:
        return True


ROWS = [("a", "1", "fits"), ("long name", "1000", "never")]


def test_columns_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("NAME", "MIB", "HERE"), ROWS, right=("MIB",))
    assert capsys.readouterr().out.splitlines() == [
        "NAME        MIB  HERE",
        "a             1  fits",
        "long name  1000  never",
    ]


def test_drawn_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show_table(("NAME", "MIB", "HERE"), [*ROWS, ("[red]x[/red]", "2", "")], styles={"never": "red"})
    shown = terminal.getvalue()
    assert "long name" in shown
    assert "[red]x[/red]" in shown  # a name is text, whatever it looks like
    assert "\x1b[31mnever" in shown


def test_a_name_moves_no_cursor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    show_table(("NAME",), [("a\x1b[2Jb\nc",)])
    assert "\x1b" not in capsys.readouterr().out
    assert printable("a\r\nb\x07") == "a\ufffd\ufffdb\ufffd"
