"""Request heads and chunked bodies, strictly: what a server reads. Sans I/O.

The head is found by its blank line before httptools sees it, which gives the limit and the offset
that httptools lacks. Bodies in chunks are decoded here, since where one ends must be known to the
byte: the next request begins there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import httptools

from llamesh.net.exchange import Headers

# Cookies and long tokens fit; a flood doesn't.
MAX_REQUEST_HEAD = 65_536
MAX_HEADER_LINES = 128


class BadRequest(Exception):
    """Not a request, or one that two readers could take for two different things.

    `too_large`: only its size is wrong.
    """

    def __init__(self, message: str, *, too_large: bool = False) -> None:
        super().__init__(message)
        self.too_large = too_large


@dataclass(slots=True)
class RequestHead:
    """A parsed request head. Header names are lower case; values are as sent, trimmed.

    `target`: as in the request line; `path` and `query`: its two halves, undecoded.
    `length`: Content-Length, None when there is none.
    """

    method: bytes
    target: bytes
    version: str
    headers: Headers
    keep_alive: bool
    upgrade: bool
    length: int | None = None
    chunked: bool = False
    expects_continue: bool = False

    @property
    def path(self) -> bytes:
        return self.target.partition(b"?")[0]

    @property
    def query(self) -> bytes:
        return self.target.partition(b"?")[2]

    def get(self, name: bytes) -> bytes | None:
        """The first header of that (lower case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None


class _Parts:
    """httptools' callbacks."""

    __slots__ = ("headers", "target")

    def __init__(self) -> None:
        self.target = b""
        self.headers: Headers = []

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


# The beginning of a request line, or of a beginning: methods are upper case letters (and M-SEARCH).
_PLAUSIBLE = re.compile(rb"[A-Z][A-Z-]{0,31}(?: |$)")


def find_head(buffer: bytes) -> int:
    """Length of the head at the start of `buffer`, its blank line included; 0 while it is incomplete.

    Raises BadRequest as soon as more bytes can't make it a head.
    """
    end = buffer.find(b"\r\n\r\n")
    if end > MAX_REQUEST_HEAD or (end < 0 and len(buffer) > MAX_REQUEST_HEAD):
        raise BadRequest(f"the request head is larger than {MAX_REQUEST_HEAD} bytes", too_large=True)
    if end >= 0:
        return end + 4
    if not _PLAUSIBLE.match(buffer[:33]):
        raise BadRequest("this is not an HTTP request")
    if b"\n\n" in buffer:
        raise BadRequest("lines of a request head end with CR LF")
    return 0


def parse_head(data: bytes) -> RequestHead:
    """Parse one complete head. Raises BadRequest."""
    parts = _Parts()
    parser = httptools.HttpRequestParser(parts)
    try:
        parser.feed_data(data)
    except httptools.HttpParserUpgrade:
        pass  # the head itself is complete and well-formed
    except httptools.HttpParserError as error:
        raise BadRequest(f"malformed request head: {error}") from error
    headers = parts.headers
    if len(headers) > MAX_HEADER_LINES:
        raise BadRequest(f"more than {MAX_HEADER_LINES} header lines", too_large=True)
    head = RequestHead(
        parser.get_method(),
        parts.target,
        parser.get_http_version(),
        headers,
        parser.should_keep_alive(),
        parser.should_upgrade(),
    )
    hosts = 0
    for name, value in headers:
        if name == b"content-length":
            # httptools refuses two different lengths; two equal ones are a smuggler's tool as well.
            if head.length is not None or not value.isdigit() or len(value) > 20:
                raise BadRequest("Content-Length must be one number")
            head.length = int(value)
        elif name == b"transfer-encoding":
            if head.chunked or value.lower() != b"chunked":
                raise BadRequest("the only transfer encoding is chunked")
            head.chunked = True
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise BadRequest("the only expectation is 100-continue")
            head.expects_continue = True
        elif name == b"host":
            hosts += 1
    if head.chunked and head.length is not None:
        raise BadRequest("Content-Length and Transfer-Encoding exclude each other")
    if hosts != 1 and head.version == "1.1":
        raise BadRequest("exactly one Host header is needed")
    if not parts.target.startswith(b"/") and parts.target != b"*":
        raise BadRequest("the request target must be a path")
    if head.version == "1.1":
        # httptools says "keep alive" for a body in chunks only after the body, and reads one token only.
        head.keep_alive = not _has_token(headers, b"connection", b"close")
    elif not data.partition(b"\r\n")[0].endswith(b" HTTP/1.0"):
        # httptools also takes HTTP/0.9, HTTP/2.0 without its preface, RTSP and ICE.
        raise BadRequest("the request line must end with HTTP/1.1 or HTTP/1.0")
    return head


def _has_token(headers: Headers, name: bytes, token: bytes) -> bool:
    return any(
        key == name and token in [part.strip() for part in value.lower().split(b",")]
        for key, value in headers
    )


_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")

# A chunk's size line with its extensions, and all trailers together: nobody sends either.
_MAX_LINE = 1024
_MAX_TRAILERS = 8192


class ChunkDecoder:
    """A body in chunks, decoded as it comes.

    decoder.feed(data) -> body bytes; then `done`, and what follows the body in `rest`.
    """

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._buffer = b""
        self._left = 0  # of the present chunk
        self._state = "size"
        self._trailers = 0

    def feed(self, data: bytes) -> bytes:
        """The body bytes in `data`. Raises BadRequest."""
        out: list[bytes] = []
        buffer = self._buffer + data if self._buffer else data
        at = 0
        while not self.done:
            if self._state == "data":
                piece = buffer[at : at + self._left]
                if not piece:
                    break
                out.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left == 0:
                    self._state = "end"
                continue
            end = buffer.find(b"\r\n", at)
            if end < 0:
                if len(buffer) - at > _MAX_LINE:
                    raise BadRequest("a chunk's size line is too long")
                break
            line = buffer[at:end]
            at = end + 2
            self._line(line)
        if self.done:
            self.rest, self._buffer = buffer[at:], b""
        else:
            self._buffer = buffer[at:]
        return b"".join(out)

    def _line(self, line: bytes) -> None:
        if self._state == "size":
            match = _SIZE_LINE.fullmatch(line)
            if match is None or len(line) > _MAX_LINE:
                raise BadRequest("malformed chunk size")
            self._left = int(match[1], 16)
            self._state = "data" if self._left else "trailers"
        elif self._state == "end":
            if line:
                raise BadRequest("a chunk is longer than its size")
            self._state = "size"
        else:
            self._trailers += len(line) + 2
            if self._trailers > _MAX_TRAILERS:
                raise BadRequest("trailers are too large")
            if not line:
                self.done = True
