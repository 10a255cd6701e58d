"""Which web pages of other origins may use the node: `http.cors_allowed_origins`, none by default.

What llama-server says about origins never passes (see `web.headers`); this is the node's own word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from llamesh.net.exchange import Headers

# Names of headers, as a browser lists them: lower case tokens.
_NAMES = re.compile(rb"[a-z0-9!#$%&'*+.^_`|~, -]{1,1024}")

# What a page may read beside the few headers that are always open to it.
_EXPOSED = (
    b"retry-after, x-request-id, x-llamesh-node, x-llamesh-profile, x-llamesh-queue-ms, x-llamesh-affinity, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)

_METHODS = b"GET, HEAD, POST, OPTIONS"

# Browsers ask again after this many seconds (Chromium's own limit is 7200).
_MAX_AGE = b"7200"


class Cors:
    """The allowed origins, such as `https://chat.example.org`; `*` allows all."""

    def __init__(self, allowed: Iterable[str]) -> None:
        self._allowed = frozenset(origin.lower().encode() for origin in allowed)
        self._any = b"*" in self._allowed

    @classmethod
    def of(cls, allowed: Iterable[str]) -> Cors | None:
        """None when nothing is allowed, so that nothing has to be done per request."""
        origins = tuple(allowed)
        return cls(origins) if origins else None

    def headers(self, request: Headers) -> Headers:
        """What an answer to this request says about its origin."""
        if self._any:
            return [(b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED)]
        vary: Headers = [(b"vary", b"Origin")]  # a cache must not hand one origin's answer to another
        origin = _get(request, b"origin")
        if origin.lower() not in self._allowed:
            return vary
        return [
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", _EXPOSED),
            *vary,
        ]

    def preflight(self, method: str, request: Headers) -> Headers | None:
        """The headers of the 204 for a browser's question before the request; None when it is no such
        question, or not one of an allowed origin.
        """
        if method != "OPTIONS" or not _get(request, b"access-control-request-method"):
            return None
        headers = self.headers(request)
        if headers[0][0] != b"access-control-allow-origin":
            return None
        wanted = _get(request, b"access-control-request-headers").lower()
        if _NAMES.fullmatch(wanted):
            headers.append((b"access-control-allow-headers", wanted))
        return [
            *headers,
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", _MAX_AGE),
        ]


def _get(headers: Headers, name: bytes) -> bytes:
    return next((value for key, value in headers if key == name), b"")
