"""What a log line looks like: fields made safe, secrets hidden, JSON or a line for people.

An event is a mapping of field names to values, with its text under `event`. `clean` turns it
into plain values that nobody can change afterwards; `json_line` and `terminal_line` render
that. Both keep one event on one line (a traceback on a terminal excepted, which is indented):
what a client sends in a header or a model name can't forge a second line.

Nothing here raises: a log line is written while something else is going wrong.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from enum import Enum
from types import TracebackType
from typing import Any

import msgspec

HIDDEN = "[hidden]"
# A longer line is cut value by value: the queue of the writer is bounded in lines.
MAX_LINE_BYTES = 16 * 1024
_MAX_TEXT = 1024
_MAX_DEPTH = 4

_PLAIN = frozenset({int, float, bool, type(None)})
_NUMBERS = frozenset({int, float})
_OURS = frozenset({"time", "level", "event"})

# By the end of the name, so that `prompt_tokens`, a count, stays readable and `hf_token` does not.
_SECRET_NAME = re.compile(
    r"(?:key|keys|token|secrets?|cookies?|credentials?|psk|passwd|passphrase)$|password|authorization"
)
# Secrets inside a text: `Bearer ...` of a header, `--api-key ...` of a command line.
_SECRET_TEXT = re.compile(
    r"(?P<lead>\b(?:bearer|basic)\s+|--(?:api-key|hf-token)[=\s]\s*)(?P<value>[^\s'\",;]+)", re.IGNORECASE
)
_SECRET_FLAGS = frozenset({"--api-key", "--hf-token", "-hft"})
# JSON escapes what is below U+0020; these end or restyle a line for some readers, too.
_LINE_BREAKERS = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")

_name_is_secret: dict[str, bool] = {}


def is_secret_name(name: str) -> bool:
    """Whether a field or header of this name is never shown (`X-Api-Key`, `authorization`, `hf_token`)."""
    known = _name_is_secret.get(name)
    if known is None:
        known = _SECRET_NAME.search(name.lower()) is not None
        if len(_name_is_secret) < 1024:  # names can come from outside: don't collect them for ever
            _name_is_secret[name] = known
    return known


class Shown(str):
    """Text that is no secret, though its field is called as one: the name of a key."""

    __slots__ = ()


def clean(event: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an event as plain values: text, numbers, lists and mappings, secrets hidden.

    Objects become their `str`, not their attributes: a class decides there what it shows.
    `exc_info` becomes `exception`, the traceback as text. A field may not take the place of
    `time` or `level`: it gets a `_` behind its name.
    """
    fields: dict[str, Any] = {}
    for name, value in event.items():
        kind = type(value)
        if kind is str:
            fields[name] = HIDDEN if is_secret_name(name) else _text(value)
        elif kind in _PLAIN:
            # A number may be the secret; whether there is one may be told.
            fields[name] = HIDDEN if kind in _NUMBERS and is_secret_name(name) else value
        elif kind is Shown:
            fields[name] = _text(str(value))
        else:
            fields[name] = HIDDEN if is_secret_name(name) else _value(value, _MAX_DEPTH)
    if "exc_info" in event:
        del fields["exc_info"]
        if text := _traceback(event["exc_info"]):
            fields["exception"] = _text(text)
    for name in ("time", "level"):
        if name in fields:
            fields[name + "_"] = fields.pop(name)
    return fields


def _text(text: str) -> str:
    # Four substring tests cost a fraction of the expression, and nearly every text holds none of them.
    if "-key" in text or "-token" in text or "earer " in text or "asic " in text or "EARER " in text:
        return _SECRET_TEXT.sub(rf"\g<lead>{HIDDEN}", text)
    return text


def _value(value: object, depth: int) -> object:
    match value:
        case bool() | None:
            return value
        case Enum():
            return _value(value.value, depth - 1) if depth > 0 else _str(value)
        case int() | float():
            return value
        case str():
            return _text(str.__str__(value))
        case bytes() | bytearray():
            return _text(repr(bytes(value)))
        case Mapping() if depth > 0:
            return _mapping(value, depth)
        case list() | tuple() | set() | frozenset() if depth > 0 and type(value).__str__ is object.__str__:
            return _sequence(value, depth)
        case _:
            return _text(_str(value))


def _mapping(value: Mapping[Any, Any], depth: int) -> object:
    try:
        return {
            (name := _str(key)): HIDDEN if is_secret_name(name) else _value(inner, depth - 1)
            for key, inner in value.items()
        }
    except Exception as error:  # a mapping that changes meanwhile, or a broken one
        return _unprintable(value, error)


def _sequence(value: Iterable[object], depth: int) -> object:
    """A list, with what follows `--api-key` hidden: command lines are logged as lists."""
    shown: list[object] = []
    hide = False
    for item in value:
        shown.append(HIDDEN if hide else _value(item, depth - 1))
        hide = isinstance(item, str) and item in _SECRET_FLAGS
    return shown


def _str(value: object) -> str:
    try:
        return str(value)
    except Exception as error:
        return _unprintable(value, error)


def _unprintable(value: object, error: Exception) -> str:
    return f"<{type(value).__name__} that can't be shown: {type(error).__name__}>"


def _traceback(exc_info: object) -> str:
    """The text of `exc_info` as callers give it: True, an exception, or the triple of `sys.exc_info`."""
    trace: TracebackType | None = None
    error: object = exc_info
    if isinstance(exc_info, tuple) and len(exc_info) == 3:
        _, error, trace = exc_info
    elif exc_info and not isinstance(exc_info, BaseException):
        error = sys.exc_info()[1]
    if not isinstance(error, BaseException):
        return ""
    try:
        return "".join(traceback.format_exception(type(error), error, trace or error.__traceback__)).rstrip()
    except Exception as broken:
        return _unprintable(error, broken)


class _Clock:
    """Seconds since the epoch as text, the whole second formatted once: it is asked for on each line."""

    def __init__(self, *, utc: bool) -> None:
        self._convert, self._format = (
            (time.gmtime, "%Y-%m-%dT%H:%M:%S") if utc else (time.localtime, "%H:%M:%S")
        )
        self._end = "Z" if utc else ""
        self._known: tuple[int, str] = (-1, "")

    def text(self, now: float) -> str:
        """`now` with milliseconds: RFC 3339 in UTC, or the local time of day."""
        second = int(now)
        known, prefix = self._known  # one tuple: another thread sees the old pair or the new one
        if known != second:
            prefix = time.strftime(self._format, self._convert(second))
            self._known = (second, prefix)
        return f"{prefix}.{int((now - second) * 1000):03d}{self._end}"


def utc_text(now: float) -> str:
    """Seconds since the epoch in RFC 3339, UTC, with milliseconds."""
    return _UTC.text(now)


def on_one_line(data: bytes) -> bytes:
    """JSON in which nothing ends a line for any reader: what is above U+007E and does that, escaped."""
    if data.isascii() and b"\x7f" not in data:
        return data
    return _LINE_BREAKERS.sub(lambda found: f"\\u{ord(found[0]):04x}", data.decode()).encode()


_UTC = _Clock(utc=True)
_LOCAL = _Clock(utc=False)
_encode = msgspec.json.Encoder(enc_hook=_str).encode


def json_line(now: float, level: str, fields: Mapping[str, Any]) -> bytes:
    """A JSON object and a newline, `time` (RFC 3339, UTC, ms), `level`, `event`, then the fields."""
    line = {"time": _UTC.text(now), "level": level, "event": fields.get("event"), **fields}
    try:
        data = _encode(line)
    except Exception:  # a lone surrogate, an integer of 70 bits
        data = _encode({_printable(name): _fitting(value) for name, value in line.items()})
    if len(data) > MAX_LINE_BYTES:
        cut = {name[:_MAX_TEXT]: _cut(_fitting(value)) for name, value in list(line.items())[:32]}
        data = _encode(cut)
    return on_one_line(data) + b"\n"


def _fitting(value: object) -> object:
    """A value that every JSON writer takes."""
    if type(value) in (float, bool, type(None)) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    return _printable(value if isinstance(value, str) else _str(value))


def _cut(value: object) -> object:
    if isinstance(value, str) and len(value) > _MAX_TEXT:
        # The end of a traceback or of a child's last words says most.
        head, tail = value[: _MAX_TEXT // 4], value[-3 * _MAX_TEXT // 4 :]
        return f"{head} [{len(value) - _MAX_TEXT} characters cut] {tail}"
    return value


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31", "critical": "1;31"}
_EVENT_WIDTH = 28


def terminal_line(now: float, level: str, fields: Mapping[str, Any], *, colour: bool) -> bytes:
    """`12:00:00.123 warning  what happened    field=value ...` for a person, newline included.

    Whatever a terminal would act on is escaped; a traceback follows on lines of its own, each
    begun by a bar. The time is local.
    """

    def paint(code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    event = _shown(_str(fields.get("event")), quote=False)
    rest = [
        f"{paint('36', _shown(name))}={_shown(_cut_text(value))}"
        for name, value in fields.items()
        if name not in _OURS and name != "exception"
    ]
    pieces = [
        paint("2", _LOCAL.text(now)),
        paint(_COLOURS.get(level, "0"), f"{level:<8}"),
        paint("1", f"{event:<{_EVENT_WIDTH}}" if rest else event),
        *rest,
    ]
    lines = [" ".join(pieces)]
    if (trace := fields.get("exception")) is not None:
        lines += [paint("2", "  | ") + _shown(line, quote=False) for line in _str(trace).splitlines()[-100:]]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def _cut_text(value: object) -> str:
    text = value if isinstance(value, str) else _str(value)
    return str(_cut(text))


def _shown(text: str, *, quote: bool = True) -> str:
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if quote and (not text or " " in text or "=" in text or '"' in text):
        return '"' + text.replace('"', '\\"') + '"'
    return text
