"""What nodes say to each other in the headers of a forwarded request and of its answer.

| request | |
|---|---|
| X-Llama-Mesh-Hops | forwards so far, this one included |
| X-Llamesh-Via | ids of the nodes it came by, the one with the client first |
| X-Llamesh-Attempt | instances that broke on it already |
| X-Llamesh-Max-Wait-Ms | when it would have to wait longer for a slot, it had better go elsewhere |
| X-Llamesh-Deadline-Ms | what is left of max_request_duration_ms |
| X-Llamesh-Model | the profile, percent-encoded: the body's name for it may be the entry node's own alias |
| X-Llamesh-Fingerprint | of embeddings: only what runs just so will do |

| answer | |
|---|---|
| X-Llamesh-Error | type of an error that is the node's own, not its llama-server's |
| X-Llamesh-Attempt | of an error: instances that broke on it meanwhile |
| X-Llamesh-Load | how busy the profile is there, see core.offers.Situation |
| X-Llamesh-Waiting-For | of an interim response: what the request waits for |

They count only on a connection of a peer; from clients they are dropped unread.
"""

from __future__ import annotations

import re
from urllib.parse import quote, unquote

import msgspec

from llamesh import errors
from llamesh.dispatch.lease import Travel
from llamesh.errors import InvalidRequest, LlameshError
from llamesh.net.exchange import Headers

# After one of these, and only these, another node is asked: nothing was begun.
_ASK_OTHERS: dict[str, type[LlameshError]] = {
    error.type: error
    for error in (
        errors.QueueFull,
        errors.QueueTimeout,
        errors.NoCapacity,
        errors.Draining,
        errors.SpawnFailed,
        errors.ModelNotFound,  # its cookbook was changed, and the news of it is on the way
    )
}

_NODE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# A month; larger numbers are mistakes.
_MAX_MS = 31 * 86400 * 1000

# Two names of 256 characters, each of up to 4 bytes, percent-encoded.
_MAX_TEXT = 8192

_MAX_ATTEMPTS = 1000
_MAX_HOPS = 1 << 20


class PeerRefused(Exception):
    """A peer said no. `face`: its error, as ours; `broken`: instances that broke on the request so far."""

    def __init__(self, node: str, kind: str, body: bytes, broken: int = 0) -> None:
        super().__init__(f"node {node}: {kind}")
        self.node = node
        self.broken = broken
        self.face = _face(node, kind, body)


def refused(status: int, headers: Headers) -> str:
    """The type of the peer's own error when others are to be asked after it, else ""."""
    if status < 400:
        return ""
    for name, value in headers:
        if name == b"x-llamesh-error":
            kind = value.decode("latin-1")
            return kind if kind in _ASK_OTHERS else ""
    return ""


def _face(node: str, kind: str, body: bytes) -> LlameshError:
    extra, message = {}, f"node {node} refused it ({kind})"
    try:
        document = msgspec.json.decode(body, type=dict[str, object])
        error = document.pop("error", None)
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            message = error["message"][:2000]
        extra = document
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        pass
    return _ASK_OTHERS[kind](message, param="model", extra=extra)


def peer_headers(travel: Travel) -> Headers:
    """The headers with which a request goes on to a peer."""
    headers: Headers = [
        (b"x-llama-mesh-hops", b"%d" % travel.hops),
        (b"x-llamesh-via", ",".join(travel.via).encode()),
    ]
    if travel.attempt:
        headers.append((b"x-llamesh-attempt", b"%d" % travel.attempt))
    if travel.max_wait_ms is not None:
        headers.append((b"x-llamesh-max-wait-ms", b"%d" % max(0.0, travel.max_wait_ms)))
    if travel.deadline_ms is not None:
        headers.append((b"x-llamesh-deadline-ms", b"%d" % max(1.0, travel.deadline_ms)))
    if travel.model:
        headers.append((b"x-llamesh-model", quote(travel.model, safe=":").encode()))
    if travel.fingerprint:
        headers.append((b"x-llamesh-fingerprint", quote(travel.fingerprint).encode()))
    return headers


def heard_attempts(headers: Headers) -> int:
    """How many instances broke on a request so far, in the headers of a peer's answer."""
    for name, value in headers:
        if name == b"x-llamesh-attempt" and value.isdigit():
            return min(int(value[:9]), _MAX_ATTEMPTS)
    return 0


def read_travel(headers: Headers, origin: str) -> Travel:
    """How a request came, from the headers of a peer that is known to be `origin`. Raises InvalidRequest."""
    found = dict(headers)
    via = tuple(part for part in found.get(b"x-llamesh-via", b"").decode("latin-1").split(",") if part)
    if len(via) > 64 or not all(_NODE_ID.fullmatch(part) for part in via):
        raise InvalidRequest("X-Llamesh-Via must hold at most 64 node ids")
    if origin not in via:
        via = (*via, origin)
    return Travel(
        origin,
        _number(found, b"x-llama-mesh-hops", _MAX_HOPS) or 1,
        via,
        _number(found, b"x-llamesh-attempt", _MAX_ATTEMPTS) or 0,
        _number(found, b"x-llamesh-max-wait-ms", _MAX_MS),
        _number(found, b"x-llamesh-deadline-ms", _MAX_MS),
        _text(found, b"x-llamesh-model"),
        _text(found, b"x-llamesh-fingerprint"),
    )


def _text(headers: dict[bytes, bytes], name: bytes) -> str:
    value = headers.get(name, b"")
    if len(value) > _MAX_TEXT:
        raise InvalidRequest(f"{name.decode()} is too long")
    return unquote(value.decode("latin-1"), errors="replace")


def _number(headers: dict[bytes, bytes], name: bytes, most: int) -> int | None:
    value = headers.get(name)
    if value is None:
        return None
    if not value.isdigit() or len(value) > 12:
        raise InvalidRequest(f"{name.decode()} must be a number")
    return min(int(value), most)
