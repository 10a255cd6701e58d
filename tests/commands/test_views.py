"""The tables: what they say of a state, and how they fit a screen."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import msgspec
import pytest
from rich.console import Console

from llamesh.commands.shared.screen import drawn
from llamesh.commands.shared.sheets import Column, Sheet, cell, plain, show
from llamesh.commands.shared.views import attention, instances, models, nodes, requests, summary
from llamesh.commands.shared.words import clean, count, lasting, millis, of_size, one_line, size
from llamesh.commands.why import explained
from llamesh.web import state_schema as schema

NOW = 1_800_000_000.0


def state() -> dict[str, Any]:
    """Two nodes with something of everything."""
    vram = schema.Room(total=24576, used=12288)
    series = schema.Series([None] * 359 + [42.0], [], [], [], [])
    document = schema.Document(
        schema=1,
        node_id="a",
        time=NOW,
        version="1.2.3",
        nodes=[
            schema.Node(
                id="a",
                self=True,
                ready=True,
                memory=schema.Memory(vram, schema.Room(total=900, used=890)),
                devices=[schema.Device("GPU", utilization=0.5)],
                running=2,
                queue=1,
                started=NOW - 7384,
            ),
            schema.Node(
                id="b", status="suspect", last_seen=NOW - 9, link=schema.Link(problem="refused"), running=0
            ),
            schema.Node(id="c", fresh=True, ready=True, link=schema.Link(direct=True, round_trip_ms=0.42)),
            schema.Node(id="d", status="asleep", link=schema.Link(breaker="open")),
        ],
        models=[
            schema.Model(
                "m:default",
                "m",
                "text",
                "",
                4096,
                {
                    "a": schema.Cell("fits"),
                    "b": schema.Cell("loaded", tps=31.25, queue=2),
                    "c": schema.Cell("loaded"),
                    "d": schema.Cell("needs_eviction"),
                },
            ),
            schema.Model("n:default", "n", "text", "", None, {"a": schema.Cell("failed")}),
        ],
        instances=[
            schema.Instance(
                node="b",
                id="m:default#1",
                model="m:default",
                state="draining",
                slots=4,
                busy=0,
                started=NOW - 70,
                age=70,
                load_ms=4200,
                vram=5000,
                reserved_ram=100,
                reason="idle",
                last_used=NOW - 61,
            )
        ],
        requests=[
            schema.Request(
                id="evil\x1b[31m\nid",
                node="a",
                seen_by="a",
                served_by="b",
                model="m:default",
                path="/v1/chat/completions",
                phase="decode",
                started=NOW - 12,
                via=["a", "b"],
                tokens=100,
                first_token_ms=2000,
                prompt_tokens=800,
                cached_tokens=700,
                key="bob",
            ),
            schema.Request(
                id="r2",
                node="a",
                seen_by="a",
                path="/v1/embeddings",
                phase="queued",
                waiting_for="queued for m:default, 1 ahead",
                started=NOW,
            ),
        ],
        attention=[schema.Concern("error", "crashed", "b", "it crashed", NOW, "read its log")],
        events=[],
        history=schema.History(10, NOW, series),
    )
    found: dict[str, Any] = msgspec.to_builtins(document)
    return found


def rows(sheet: Sheet) -> list[dict[str, str]]:
    return [
        {column.title: entry.text for column, entry in zip(sheet.columns, row, strict=True)}
        for row in sheet.rows
    ]


def test_a_line_about_all_of_it() -> None:
    assert summary(state()) == "llamesh 1.2.3 at a, 4 nodes, 1 instance, 2 running, 1 waiting, 42 tokens/s"


def test_nodes() -> None:
    a, b, c, d = rows(nodes(state()))
    assert (a["state"], a["vram"], a["ram"], a["gpu"]) == ("ready", "12.0/24.0 GiB", "890/900 MiB", "50%")
    assert (a["running"], a["queue"], a["link"], a["up"]) == ("2", "1", "self", "2h03m")
    assert (b["state"], b["link"], b["vram"], b["queue"]) == ("silent for 9s", "none: refused", "-", "?")
    assert (c["state"], c["link"]) == ("ready", "0.4 ms")
    assert (d["state"], d["link"]) == ("asleep", "breaker open")


def test_models_say_where_they_are() -> None:
    m, n = rows(models(state()))
    assert m["where"] == "loaded: b, c; fits: a; needs eviction: d"
    assert (m["tok/s"], m["queue"], m["context"]) == ("31.2", "2", "4096")
    assert (n["where"], n["context"]) == ("failed: a", "-")


def test_weights_that_a_request_fetches_are_not_called_missing() -> None:
    document = state()
    document["models"][1]["nodes"] = {
        node: {"state": "missing", "download": download, "tps": None, "queue": 0}
        for node, download in (("a", "needed"), ("b", "coming"), ("c", None))
    }
    assert rows(models(document))[1]["where"] == "downloading: b; to download: a; missing: c"


def test_instances_and_requests() -> None:
    [one] = rows(instances(state(), NOW))
    assert (one["state"], one["slots"], one["memory"]) == (
        "draining: idle",
        "0/4",
        "4.9 GiB vram 100 MiB ram",
    )
    assert (one["load"], one["idle"], one["age"]) == ("4.2 s", "1m01s", "1m10s")
    first, second = rows(requests(state(), NOW))
    assert first["request"] == "evil\N{REPLACEMENT CHARACTER}[31m id"
    assert (first["way"], first["prompt"], first["key"]) == ("a > b", "800 (700 cached)", "bob")
    assert first["tok/s"] == "10.0"
    assert (second["phase"], second["tokens"]) == ("queued for m:default, 1 ahead", "-")


def test_plain_text_has_every_column_in_line() -> None:
    document = state()
    text = plain([attention(document), nodes(document), requests({**document, "requests": []}, NOW)])
    assert "Needs attention\n  error  b  it crashed; read its log\n\nNodes\n  NODE" in text
    assert text.endswith("\nRequests\n  none\n")
    lines = text.splitlines()
    head = next(line for line in lines if "NODE" in line)
    column = head.index("LINK")
    assert next(line for line in lines if line.startswith("  c "))[column:].startswith("0.4 ms")
    assert not any(line != line.rstrip() for line in lines)


def picture(sheets: list[Sheet], width: int, height: int | None = None) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, no_color=True, color_system=None)
    console.print(drawn(sheets, width, height))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [30, 60, 80, 120, 200])
def test_a_screen_of_any_width_is_kept(width: int) -> None:
    document = state()
    sheets = [
        attention(document),
        requests(document, NOW),
        instances(document, NOW),
        nodes(document),
        models(document),
    ]
    lines = picture(sheets, width)
    assert max(len(line) for line in lines) <= width
    if width >= 80:
        assert any("it crashed; read its log" in line for line in lines)
        assert any("0.4 ms" in line for line in lines)
    wide = any("version" in line for line in lines)
    assert wide == (width >= 120)


@pytest.mark.parametrize("height", [20, 30, 60])
def test_a_screen_of_any_height_is_kept(height: int) -> None:
    document = state()
    document["requests"] = [{**document["requests"][1], "id": f"r{number}"} for number in range(50)]
    sheets = [requests(document, NOW), instances(document, NOW), nodes(document)]
    lines = picture(sheets, 100, height)
    assert len(lines) <= height
    assert {"Requests", "Instances", "Nodes"} <= set(lines)
    [more] = [line for line in lines if "more" in line]
    shown = sum(line.startswith("  r") for line in lines) - 1
    assert f"… {50 - shown} more" in more


def test_columns_go_by_what_they_are_worth() -> None:
    columns = (Column("name"), Column("rare", keep=1), Column("useful", keep=5))
    sheet = Sheet("", columns, [(cell("x" * 20), cell("y" * 20), cell("z" * 20))])
    assert "rare" not in picture([sheet], 50)[0]
    assert "useful" in picture([sheet], 50)[0]
    assert picture([sheet], 12)[0].split() == ["name"]


def record(**more: Any) -> dict[str, Any]:
    request = schema.Request(
        id="r1", node="a", seen_by="a", path="/v1/chat/completions", phase="done", started=NOW
    )
    found: dict[str, Any] = {**msgspec.to_builtins(request), "records": [], **more}
    return found


def test_why_of_an_answer() -> None:
    decision = [
        {"node": "a", "total": None, "parts": {}, "why_not": "its file isn't there"},
        {"node": "c", "total": 9120.0, "parts": {"start": 9000.0, "prefill": 120.0}, "why_not": None},
        {"node": "b", "total": 121.4, "parts": {"link": 1.4, "prefill": 120.0}, "why_not": None},
    ]
    seen = [record(seen_by="a", status=200, queue_ms=0.1), record(seen_by="b", status=200, queue_ms=300.0)]
    text = plain(
        explained(
            record(
                status=200,
                model="m:default",
                streams=True,
                via=["a", "b"],
                served_by="b",
                instance="m:default#2",
                queue_ms=0.1,
                first_token_ms=800.0,
                ms=2800.0,
                tokens=101,
                prompt_tokens=900,
                cached_tokens=512,
                key="bob",
                decision=decision,
                tries=["b: connection refused"],
                records=seen,
            )
        )
    )
    for words in (
        "Request r1\n",
        "outcome  answered (200)",
        "way      a > b, instance m:default#2",
        "key      bob",
        "waiting  300 ms  for a slot",
        "prompt   500 ms  900 prompt tokens, 512 of them cached",
        "answer    2.0 s  101 tokens, 50.0 a second",
        "its file isn't there",
        "1  b: connection refused",
    ):
        assert words in text
    table = text[text.index("Choice") :].splitlines()
    assert [line.split()[0] for line in table[2:5]] == ["b", "c", "a"]
    assert table[1].split() == ["NODE", "TOTAL", "LINK", "START", "PREFILL"]
    assert table[2].split() == ["b", "121", "1.4", "-", "120", "taken"]


def test_why_of_a_failure() -> None:
    failed = record(status=503, error="queue_timeout", message="nothing was free", ms=60_000.0)
    text = plain(explained(failed))
    assert "outcome  failed: queue_timeout (503)" in text
    assert "because  nothing was free" in text
    assert "way      a; no instance took it" in text
    assert "waiting  1m00s" in text
    assert "Choice" not in text
    running = plain(explained(record(phase="loading", waiting_for="loading m:default")))
    assert "runs: loading" in running
    assert "waits for  loading m:default" in running
    assert "as llama-server answered it" in plain(explained(record(status=400)))


def test_words() -> None:
    assert [lasting(s) for s in (0.4, 59, 252, 7500, 273_600, None)] == [
        "0s",
        "59s",
        "4m12s",
        "2h05m",
        "3d4h",
        "?",
    ]
    assert [millis(ms) for ms in (0.42, 85, 1234, 252_000, None)] == [
        "0.4 ms",
        "85 ms",
        "1.2 s",
        "4m12s",
        "?",
    ]
    assert [size(mib) for mib in (812, 24_000, None)] == ["812 MiB", "23.4 GiB", "?"]
    assert [of_size(*pair) for pair in ((1, None), (None, 2048), (512, 2048))] == [
        "-",
        "?/2.0 GiB",
        "0.5/2.0 GiB",
    ]
    assert [count(number, "node") for number in (0, 1, 2)] == ["no nodes", "1 node", "2 nodes"]
    assert clean("a\tb\n\x1b]0;x\x07\u202e") == "a\tb\n\ufffd]0;x\ufffd\ufffd"
    assert one_line(" a\n b\t") == "a b"
    assert one_line(os.fsdecode(b"caf\xe9.gguf")) == "caf\ufffd.gguf"  # what can't be printed


class Terminal(io.StringIO):
    """What stdout is where somebody looks."""

    def isatty(self) -> bool:
        return True


NAMES = Sheet(
    "",
    (Column("name"), Column("mib", right=True), Column("here")),
    [[cell("a\x1b[2Jb\nc"), cell(1), cell("fits")], [cell("[red]x[/red]"), cell(1000), cell("never", "bad")]],
)


def test_columns_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show([NAMES])
    assert capsys.readouterr().out.splitlines() == [
        "NAME           MIB  HERE",
        "a\ufffd[2Jb c         1  fits",
        "[red]x[/red]  1000  never",
    ]
    show([Sheet("Titled", NAMES.columns, NAMES.rows[:1])], "above")
    assert capsys.readouterr().out.splitlines()[:4] == ["above", "", "Titled", "  NAME      MIB  HERE"]


def test_drawn_at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    show([NAMES], "above")
    shown = terminal.getvalue()
    assert "above" in shown
    assert "[red]x[/red]" in shown  # a name is text, whatever it looks like
    assert "\x1b[1;31mnever" in shown
    assert "\x1b[2J" not in shown
