"""What the lines of the audit file say. See `telemetry.audit`."""

from __future__ import annotations

import msgspec

from llamesh.telemetry.log_lines import on_one_line

# The longest text that is kept of anything that a client can choose.
MOST_TEXT = 300


class Line(msgspec.Struct, kw_only=True):
    """What all lines have. time: when it ended, RFC 3339 in UTC; node: that writes this file."""

    time: str
    what: str
    node: str


class RequestLine(Line, kw_only=True):
    """key: name of the client's key, "" without; address: the connection's other end; origin: the node that
    sent it, "" for a client (only that one's line has the key); served_by: the node that answered; status:
    as the client got it, 0 = none; outcome: "ok", "upstream_status", "cancelled", "cut" or an error type;
    reason: why it was refused; ms: all of it.
    """

    request_id: str
    key: str
    address: str
    origin: str
    path: str
    model: str
    served_by: str
    status: int
    outcome: str
    reason: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ms: float | None = None


class ActLine(Line, kw_only=True):
    """target: the node that was named, "" = this one; model: that was named; about: the request that it
    cancels. The rest as for requests.
    """

    request_id: str
    key: str
    address: str
    origin: str
    path: str
    target: str
    model: str
    about: str
    status: int
    outcome: str
    reason: str


class CountLine(Line, kw_only=True):
    """count: of what `what` says."""

    count: int


def encoded(line: Line) -> bytes:
    """JSON and a newline. Nothing in it ends the line for any reader, whatever a client sent."""
    try:
        data = _encode(line)
    except (UnicodeEncodeError, ValueError):  # half of a character, from some header
        data = _encode(msgspec.structs.replace(line, **_printable(line)))
    return on_one_line(data) + b"\n"


_encode = msgspec.json.Encoder().encode


def cut(text: str | bytes) -> str:
    """A text that a client chose, at a length that fits; bytes as ASCII, with escapes."""
    short = text[:MOST_TEXT]
    return short if isinstance(short, str) else short.decode("ascii", "backslashreplace")


def _printable(line: Line) -> dict[str, str]:
    return {
        name: value.encode("utf-8", "backslashreplace").decode()
        for name, value in msgspec.structs.asdict(line).items()
        if isinstance(value, str)
    }
