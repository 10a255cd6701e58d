"""Lines that can't be forged, values that can't break them, secrets that don't show."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from llamesh.telemetry.log_lines import (
    HIDDEN,
    MAX_LINE_BYTES,
    clean,
    is_secret_name,
    json_line,
    terminal_line,
)

NOON = 20_000 * 86_400.0 + 43_200.0


def test_time_is_utc_with_milliseconds() -> None:
    assert (
        json.loads(json_line(1_700_000_000.0625, "info", {"event": "x"}))["time"]
        == "2023-11-14T22:13:20.062Z"
    )


NASTY = 'x\n{"level":"info","event":"forged"}\r\u2028\u2029\x85\x1b[31m\x9b2J\u202e\x00\x7f\ud800é✓'


def test_no_value_and_no_name_can_forge_a_line() -> None:
    fields = clean({"event": NASTY, "model": NASTY, NASTY: "v", "deep": [{NASTY: (NASTY,)}]})
    for text in (
        json_line(NOON, "info", fields).decode(),
        terminal_line(NOON, "info", fields, colour=False).decode(),
    ):
        assert text.endswith("\n")
        assert len(text.splitlines()) == 1
        assert not re.search("[\x00-\x09\x0b-\x1f\x80-\x9f\u2028\u2029\u202e]", text)
        assert "é✓" in text
    parsed = json.loads(json_line(NOON, "info", fields))
    assert parsed["event"].replace("\\ud800", "\ud800") == NASTY


SECRET_NAMES = [
    "api_key",
    "API-Key",
    "x-api-key",
    "apiKey",
    "key",
    "allowed_keys",
    "private_key",
    "set-cookie",
    "psk",
    "Authorization",
    "proxy-authorization",
    "token",
    "hf_token",
    "cluster_token",
    "accessToken",
    "credentials",
    "password",
    "db_password_old",
    "client_secret",
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_secrets_are_hidden_by_name(name: str) -> None:
    assert is_secret_name(name)
    fields = clean({"event": "e", name: "s3cret", "headers": {name: ["s3cret"]}, "list": [{name: 4711}]})
    shown = json_line(NOON, "info", fields) + terminal_line(NOON, "info", fields, colour=False)
    assert b"s3cret" not in shown
    assert b"4711" not in shown
    assert fields[name] == HIDDEN


@pytest.mark.parametrize("name", ["prompt_tokens", "tokens_per_second", "keyboard", "profile", "tokenizer"])
def test_ordinary_names_are_shown(name: str) -> None:
    assert clean({name: 5})[name] == 5


@pytest.mark.parametrize(
    "value",
    [
        "Authorization: Bearer s3cret",
        "bearer s3cret",
        "BEARER s3cret",
        "llama-server --api-key s3cret --port 1",
        "llama-server --api-key=s3cret",
        ["llama-server", "--api-key", "s3cret", "--port", "1"],
        {"argv": ("--hf-token", "s3cret")},
        RuntimeError("refused: Bearer s3cret"),
    ],
)
def test_secrets_are_hidden_inside_values(value: object) -> None:
    shown = json_line(NOON, "info", clean({"event": "e", "value": value}))
    assert b"s3cret" not in shown
    assert HIDDEN.encode() in shown


def test_traceback_texts_hide_secrets() -> None:
    shown = clean({"event": "e", "exc_info": RuntimeError("sent Authorization: Bearer s3cret")})["exception"]
    assert shown == f"RuntimeError: sent Authorization: Bearer {HIDDEN}"


class Broken:
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Colour(Enum):
    RED = "red"


@dataclass
class Holder:
    api_key: str

    def __repr__(self) -> str:
        return "Holder(...)"


def test_odd_values_become_something_readable() -> None:
    endless: list[object] = []
    endless.append(endless)
    fields = clean(
        {
            "event": "e",
            "path": Path("/a/b"),
            "broken": Broken(),
            "colour": Colour.RED,
            "holder": Holder("s3cret"),
            "huge": 2**90,
            "nan": float("nan"),
            "bytes": b"\x00\xff",
            "set": {1},
            "numbered": {1: 2},
            "endless": endless,
        }
    )
    line = json.loads(json_line(NOON, "info", fields))
    assert line["path"] == "/a/b"
    assert "Broken" in line["broken"]
    assert line["colour"] == "red"
    assert line["holder"] == "Holder(...)"
    assert line["huge"] in (2**90, str(2**90))
    assert line["nan"] in (None, "nan")
    assert line["set"] == [1]
    assert line["numbered"] == {"1": 2}
    assert terminal_line(NOON, "info", fields, colour=True).endswith(b"\n")


def test_a_huge_line_is_cut_and_stays_json() -> None:
    text = "head" + "x" * 1_000_000 + "tail"
    fields = clean({"event": "e", "text": text, "list": [text] * 3, **{f"f{n}": text for n in range(100)}})
    data = json_line(NOON, "info", fields)
    assert len(data) < 4 * MAX_LINE_BYTES
    line = json.loads(data)
    assert line["text"].startswith("head")
    assert line["text"].endswith("tail")
    assert len(terminal_line(NOON, "info", {"event": "e", "text": text}, colour=False)) < MAX_LINE_BYTES


def test_a_terminal_line_is_aligned_and_shows_its_traceback_indented() -> None:
    plain = terminal_line(NOON, "info", {"event": "short", "a": 1, "b": "two words", "c": ""}, colour=False)
    longer = terminal_line(NOON, "warning", {"event": "longer text", "a": 1}, colour=False)
    assert plain.index(b"a=1") == longer.index(b"a=1")
    assert re.match(rb"\d\d:\d\d:\d\d\.\d{3} info     short +a=1 b=\"two words\" c=\"\"\n$", plain)
    failed = terminal_line(
        NOON, "error", {"event": "e", "exception": "Trace\n  x\x1b[0m\nValueError"}, colour=False
    )
    first, *rest = failed.decode().splitlines()
    assert first.endswith("e")
    assert rest == ["  | Trace", "  |   x\\x1b[0m", "  | ValueError"]
