"""Response heads: which headers pass, which are ours, and their bytes on the wire."""

from __future__ import annotations

import random
import re
import secrets
from http import HTTPStatus

from llamesh.net.exchange import Headers

NONE: Headers = []

# Hop-by-hop (RFC 9110, 7.6.1), plus what is this node's to say: framing, CORS, who answered.
_DROPPED_FROM_UPSTREAM = frozenset(
    [
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"server",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-request-id",
        b"x-accel-buffering",
    ]
)
_DROPPED_PREFIXES = (b"access-control-", b"x-llamesh-", b"x-llama-mesh-")

# What a client sends that isn't the child's business: hop-by-hop, keys of this node, routing.
_DROPPED_FROM_CLIENT = frozenset(
    [
        b"accept-encoding",  # a compressed answer couldn't be counted nor have comments put between
        b"authorization",
        b"connection",
        b"content-length",
        b"cookie",
        b"expect",
        b"host",
        b"keep-alive",
        b"origin",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
        b"x-request-id",
    ]
)

# With it llama-server keeps an answer for whoever names the conversation later, and goes on writing when the
# client has left: other keys could read it, and a slot that is free here would be busy there. A peer gets it,
# as a hint where the conversation's cache is.
RESUMES = b"x-conversation-id"

_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}

# Ids have to be different, not secret: a call into the kernel for each would cost 6 % of the hot path.
_random = random.Random(secrets.token_bytes(32))  # noqa: S311

# Printable ASCII without spaces and quotes: safe in a header, a log line and a file name.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


def request_id(headers: Headers) -> str:
    """The client's X-Request-Id where it is harmless, else a new one."""
    for name, value in headers:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return value.decode()
    return f"{_random.getrandbits(64):016x}"


def pass_back(headers: Headers) -> Headers:
    """Of an upstream's response headers, those that the client gets."""
    return [
        (name, value)
        for name, value in headers
        if name not in _DROPPED_FROM_UPSTREAM and not name.startswith(_DROPPED_PREFIXES)
    ]


def upstream_request(
    target: bytes,
    headers: Headers,
    *,
    host: bytes,
    authorization: bytes,
    length: int,
    id: str,  # noqa: A002
    key_header: bytes,
    to_peer: bool = False,
    more: Headers = NONE,
) -> bytes:
    """The head of the request to a llama-server or a peer. `key_header`: the configured header for client
    keys; `authorization`: the child's key, b"" for none; `more`: headers of ours."""
    lines = [b"POST ", target, b" HTTP/1.1\r\nhost: ", host]
    if authorization:
        lines += (b"\r\nauthorization: ", authorization)
    for name, value in more:
        lines += (b"\r\n", name, b": ", value)
    for name, value in headers:
        if (
            name not in _DROPPED_FROM_CLIENT
            and name != key_header
            and (to_peer or name != RESUMES)
            and not name.startswith((b"x-llamesh-", b"x-llama-mesh-"))
        ):
            lines += (b"\r\n", name, b": ", value)
    lines.append(b"\r\nx-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (id.encode(), length))
    return b"".join(lines)


def response_head(
    status: int, headers: Headers, *, length: int | None, keep_alive: bool, has_body: bool = True
) -> bytes:
    """Status line and headers with this hop's framing: `length`, or chunks when it is None."""
    lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown\r\n" % status]
    for name, value in headers:
        lines += (name, b": ", value, b"\r\n")
    if has_body:
        lines.append(
            b"transfer-encoding: chunked\r\n" if length is None else b"content-length: %d\r\n" % length
        )
    lines.append(b"connection: keep-alive\r\n\r\n" if keep_alive else b"connection: close\r\n\r\n")
    return b"".join(lines)
