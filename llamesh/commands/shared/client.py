"""The control client: asks a running node over HTTP, and puts what goes wrong into words.

http.client, not httpx: it blocks, as a command may, and is imported in a third of the time. No proxy is used:
a node is near, and its key for nobody else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from llamesh.commands.shared.failed import Refused, TimedOut, Unreached
from llamesh.commands.shared.words import clean
from llamesh.config.environment import KEY_VARIABLE

PATIENCE_SECONDS = 15.0
"""How long an answer may take that waits for nothing."""

_MOST_CONNECT_SECONDS = 5.0

# A state document of a large mesh is a few megabytes.
_MOST_BYTES = 64 << 20

# Of an error's answer.
_MOST_ERROR_BYTES = 1 << 20

# A node tells something at least every ten seconds on streams that last.
STREAM_SECONDS = 30.0

_MOST_LINE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a node answers. path: what goes before each of its own; context: None without TLS; name: its id,
    if that is known.
    """

    host: str
    port: int
    path: str = ""
    context: ssl.SSLContext | None = None
    name: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}{self.path}"


class Client:
    """Each call is a connection of its own. All raise Unreached, TimedOut or Refused."""

    def __init__(self, place: Place, key: str | None, seconds: float = PATIENCE_SECONDS) -> None:
        self.place = place
        self._key = key
        self._seconds = seconds

    def get(self, path: str, *, seconds: float | None = None) -> dict[str, Any]:
        """The JSON object at `path`."""
        with self._asked("GET", path, None, seconds or self._seconds) as reply:
            return self._document(reply)

    def post(self, path: str, document: Mapping[str, Any], *, seconds: float | None = None) -> dict[str, Any]:
        """What a POST of a JSON object is answered."""
        with self._asked("POST", path, document, seconds or self._seconds) as reply:
            return self._document(reply)

    @contextlib.contextmanager
    def lines(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | None = None,
        *,
        seconds: float = STREAM_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[Answer]:
        """An answer that comes bit by bit. `seconds`: how long it may be silent. The block's end ends it."""
        with self._asked(method, path, document, seconds, headers) as reply:
            yield Answer(self, reply, seconds)

    @contextlib.contextmanager
    def _asked(
        self,
        method: str,
        path: str,
        document: Mapping[str, Any] | None,
        seconds: float,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[http.client.HTTPResponse]:
        sent = {"accept": "application/json", **(headers or {})}
        body = None
        if document is not None:
            sent["content-type"] = "application/json"
            body = json.dumps(document).encode()
        if self._key:
            sent["authorization"] = f"Bearer {self._key}"
        connection = self._connect(seconds)
        try:
            try:
                connection.request(method, self.place.path + path, body, sent)
                reply = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                raise self._broken(error, seconds) from None
            if reply.status >= 400:
                raise self._refusal(reply)
            yield reply
        finally:
            connection.close()

    def _connect(self, seconds: float) -> http.client.HTTPConnection:
        place = self.place
        short = min(seconds, _MOST_CONNECT_SECONDS)
        connection: http.client.HTTPConnection
        if place.context is None:
            connection = http.client.HTTPConnection(place.host, place.port, timeout=short)
        else:
            connection = http.client.HTTPSConnection(
                place.host, place.port, timeout=short, context=place.context
            )
        try:
            connection.connect()
        except ssl.SSLCertVerificationError as error:
            connection.close()
            raise Unreached(
                f"{place} shows a certificate that isn't trusted: {error.verify_message}; "
                "name the right one with --cacert"
            ) from None
        except (OSError, UnicodeError) as error:
            connection.close()
            raise Unreached(f"no node answers at {place}: {_reason(error)}; is it running?") from None
        connection.sock.settimeout(seconds)
        return connection

    def _broken(self, error: OSError | http.client.HTTPException, seconds: float) -> Unreached | TimedOut:
        if isinstance(error, TimeoutError):
            return TimedOut(f"the node at {self.place} doesn't answer within {seconds:g} seconds")
        hint = "" if self.place.context else "; if it speaks TLS, its address begins with https://"
        return Unreached(f"no node answers at {self.place}: {_reason(error)}; is it running?{hint}")

    def _document(self, reply: http.client.HTTPResponse) -> dict[str, Any]:
        try:
            data = reply.read(_MOST_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise self._broken(error, self._seconds) from None
        document = _decoded(data)
        if document is None:
            raise Unreached(f"what answers at {self.place} isn't a llamesh node")
        return document

    def _refusal(self, reply: http.client.HTTPResponse) -> Refused:
        """An error's answer, and what to do about it."""
        try:
            answer = _decoded(reply.read(_MOST_ERROR_BYTES)) or {}
        except (OSError, http.client.HTTPException):
            answer = {}
        error = answer.get("error")
        told = error if isinstance(error, dict) else {}
        message = clean(str(told.get("message") or "it isn't a llamesh node"))
        kind, status = str(told.get("type") or ""), reply.status
        hint = self._hint(status, reply.getheader("retry-after") or "")
        # What isn't there isn't refused.
        verb = "answers" if status in (400, 404) else "refused"
        return Refused(f"the node at {self.place} {verb} ({status}): {message}{hint}", status, kind)

    def _hint(self, status: int, after: str) -> str:
        again = f"; try again in {after} s" if after.isdigit() else "; try again later"
        match status:
            case 401 if self._key:
                return f"; this key isn't known there: look at {KEY_VARIABLE} or --key-file"
            case 401:
                return f"; set {KEY_VARIABLE}, or use --key-file"
            case 403:
                return f"; a key that may administer comes by {KEY_VARIABLE} or --key-file"
            case 429 | 503:
                return again
            case _:
                return ""


class Answer:
    """An answer that is read line by line."""

    def __init__(self, client: Client, reply: http.client.HTTPResponse, seconds: float) -> None:
        self.headers = reply.headers
        self._client = client
        self._reply = reply
        self._seconds = seconds

    def __iter__(self) -> Iterator[str]:
        """The lines without their ends. Raises Unreached when the connection breaks, TimedOut."""
        while True:
            try:
                line = self._reply.readline(_MOST_LINE_BYTES)
            except (OSError, http.client.HTTPException, AttributeError, ValueError) as error:
                # The last two: http.client's, when another thread closes the connection.
                if not isinstance(error, OSError | http.client.HTTPException):
                    error = ConnectionAbortedError("closed")
                raise self._client._broken(error, self._seconds) from None
            if not line:
                return
            yield line.decode("utf-8", "replace").rstrip("\r\n")


def _reason(error: Exception) -> str:
    """Without the number of an error of the system."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def path_of(prefix: str, name: str) -> str:
    """A path with a name in it, which may hold anything."""
    return f"{prefix}/{quote(name)}"


def events_in(lines: Iterator[str]) -> Iterator[tuple[str, str, str]]:
    """Server-sent events: name ("" is usual), data, id. A comment is an event named ":"."""
    name, last = "", ""
    data: list[str] = []
    for line in lines:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield name, "\n".join(data), last
            name, data = "", []
        elif not field:
            yield ":", value, last
        elif field == "data":
            data.append(value)
        elif field == "event":
            name = value
        elif field == "id":
            last = value


def _decoded(body: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
