"""A file on the web: ranges over HTTP/1.1, redirects followed with care.

`http.client` on plain sockets, read straight into the caller's buffer: measured, that is what moves a
gigabyte a second in Python (httpx copies each piece several times).

- A token goes to the host that it is for and to no other, and never over plain http, but to this machine.
- No redirect leads from https to http, nor to anything else.
- Where the file really lies (a content network, by an address that is good for some minutes) is found out
  once and used by all connections; when it is refused, once more.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

import llamesh
from llamesh.config.model_names import is_loopback
from llamesh.local.weights.errors import (
    Hostile,
    NotAllowed,
    NotFound,
    Unreachable,
    WeightsError,
    WholeOnly,
    WrongContent,
)

# Silence, not total time.
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0

_REDIRECTS = 5
_LARGEST_FILE = 1 << 44
_RETRY_AFTER_MOST = 60.0
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
# Larger than what comes in one go, so that the kernel and not Python assembles it.
_RECEIVE_BUFFER = 1 << 20


class WebSource:
    """One file at an address. `size`: what it must have, in bytes; a server that says otherwise is
    refused.
    """

    def __init__(
        self,
        url: str,
        size: int,
        *,
        token: str | None = None,
        what: str,
        context: ssl.SSLContext | None = None,
        silence: float = SILENCE_SECONDS,
        refusal: Callable[[int, str], WeightsError] | None = None,
    ) -> None:
        """`url` is checked (`config.model_names`) or made by us; `what` names the file in messages.
        `refusal`: what it means when that very host refuses, by status and X-Error-Code.
        """
        self.name = urlsplit(url).hostname or "?"
        self.what = what
        self.size = size
        self.silence = silence
        self.ranges = True
        self._url = url
        self._token = token
        self.refusal = refusal
        self._context = context
        self._lock = threading.Lock()
        self._location: str | None = None

    def channel(self) -> WebChannel:
        return WebChannel(self)

    def location(self) -> tuple[str, bool]:
        """Where to ask: an address, and whether it is one that a redirect gave."""
        with self._lock:
            return (self._url, False) if self._location is None else (self._location, True)

    def note_location(self, url: str | None) -> None:
        """What a redirect gave; None: ask at the beginning again."""
        with self._lock:
            self._location = url

    def is_home(self, to: tuple[str, str, int] | None) -> bool:
        """Whether this is the host that the address itself names."""
        return to == _origin(urlsplit(self._url))

    def headers_for(self, url: SplitResult) -> dict[str, str]:
        """What every request to `url` carries."""
        headers = {
            "User-Agent": f"llamesh/{llamesh.__version__}",
            "Accept": "*/*",
            "Accept-Encoding": "identity",  # the bytes of the file, and their number
        }
        home = urlsplit(self._url)
        private = url.scheme == "https" or is_loopback(url.hostname or "")
        if self._token and private and _origin(url) == _origin(home):
            headers["Authorization"] = f"Bearer {self._token}"
        return headers

    def connection(self, url: SplitResult) -> http.client.HTTPConnection:
        """A connection to the host of `url`, not opened yet; through the system's proxy, if it has one for
        https.
        """
        _, host, port = _origin(url)
        if url.scheme != "https":
            return http.client.HTTPConnection(host, port, timeout=CONNECT_SECONDS)
        proxy = urlsplit(urllib.request.getproxies().get("https", ""))
        if not proxy.hostname or urllib.request.proxy_bypass(host):
            return http.client.HTTPSConnection(host, port, timeout=CONNECT_SECONDS, context=self.tls())
        through = http.client.HTTPSConnection(
            proxy.hostname, proxy.port or 8080, timeout=CONNECT_SECONDS, context=self.tls()
        )
        headers = {}
        if proxy.username is not None:
            who = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
            headers["Proxy-Authorization"] = "Basic " + base64.b64encode(who.encode()).decode()
        through.set_tunnel(host, port, headers)
        return through

    def tls(self) -> ssl.SSLContext:
        """Made when the first https address is called: reading the system's certificates takes 20 ms."""
        with self._lock:
            if self._context is None:
                self._context = ssl.create_default_context()
            return self._context


class WebChannel:
    """One connection, kept while the server keeps it."""

    def __init__(self, source: WebSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._connection: http.client.HTTPConnection | None = None
        self._to: tuple[str, str, int] | None = None
        self._cut = False

    def open(self, start: int, end: int) -> WebBody:
        url, redirected = self._source.location()
        try:
            return self._ask(url, start, end)
        except (NotAllowed, NotFound):
            if not redirected:
                raise
            # The address of the content network was good for some time only.
            self._source.note_location(None)
            return self._ask(self._source.location()[0], start, end)

    def size(self) -> int:
        """How long the file says it is. Raises WeightsError."""
        source = self._source
        response = self._find(source.location()[0], 0, 1)
        if response.status not in (200, 206):
            raise self._failed(response.status, response.headers)
        found = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
        size = int(found[3]) if found and response.status == 206 else response.length
        self.close()
        if size is None or not 0 < size <= _LARGEST_FILE:
            raise WrongContent(f"{source.what}: {source.name} doesn't say how long it is")
        return size

    def cut(self) -> None:
        with self._lock:
            self._cut = True
            if self._connection is not None and self._connection.sock is not None:
                # Not close: another thread is in recv, and only this wakes it.
                with contextlib.suppress(OSError):
                    self._connection.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Also when what comes on the connection is of no use any more: the next `open` makes another."""
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _ask(self, url: str, start: int, end: int) -> WebBody:
        return self._body(self._find(url, start, end), start, end)

    def _find(self, url: str, start: int, end: int) -> http.client.HTTPResponse:
        """The answer of whoever has it, all redirects followed."""
        source = self._source
        for _ in range(_REDIRECTS):
            response = self._request(urlsplit(url), start, end)
            status = response.status
            if status not in (301, 302, 303, 307, 308):
                if status in (200, 206):
                    source.note_location(url)
                return response
            target = response.getheader("Location") or ""
            self.close()
            url = self._follow(url, target)
        raise Hostile(f"{source.what}: {source.name} sends us in circles")

    def _follow(self, url: str, target: str) -> str:
        source = self._source
        try:
            there, here = urlsplit(urljoin(url, target)), urlsplit(url)
            _ = there.port
        except ValueError:
            raise Hostile(f"{source.what}: {here.hostname} redirects to no address") from None
        if there.scheme not in ("http", "https") or not there.hostname or there.username is not None:
            raise Hostile(f"{source.what}: {here.hostname} redirects to what isn't an address of a file")
        if there.scheme == "http" and not (here.scheme == "http" and _may_be_plain(here, there)):
            raise Hostile(
                f"{source.what}: {here.hostname} redirects to plain http at {there.hostname}, "
                "which isn't followed"
            )
        return there.geturl()

    def _request(self, url: SplitResult, start: int, end: int) -> http.client.HTTPResponse:
        fresh = self._connect(url)
        try:
            return self._send(url, start, end)
        except WeightsError:
            if fresh:
                raise
        # A connection that was kept may have been closed by the other side at any moment.
        self.close()
        self._connect(url)
        return self._send(url, start, end)

    def _connect(self, url: SplitResult) -> bool:
        """Have a connection to the host of `url`; whether it is a new one."""
        to = _origin(url)
        if self._connection is not None and self._to == to:
            return False
        self.close()
        host = to[1]
        connection = self._source.connection(url)
        try:
            connection.connect()
            connection.sock.settimeout(self._source.silence)
            with contextlib.suppress(OSError):
                connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        except (OSError, ValueError) as error:
            connection.close()
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise Unreachable(f"{self._source.what}: {host} can't be reached: {why}") from None
        with self._lock:
            self._connection, self._to = connection, to
            if self._cut:
                connection.sock.shutdown(socket.SHUT_RDWR)
        return True

    def _send(self, url: SplitResult, start: int, end: int) -> http.client.HTTPResponse:
        assert self._connection is not None  # noqa: S101
        headers = self._source.headers_for(url)
        if self._source.ranges:
            headers["Range"] = f"bytes={start}-{end - 1}"
        target = url._replace(scheme="", netloc="", fragment="").geturl() or "/"
        try:
            self._connection.request("GET", target, headers=headers)
            return self._connection.getresponse()
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Unreachable(f"{self._source.what}: {url.hostname} {_broke(error)}") from None

    def _body(self, response: http.client.HTTPResponse, start: int, end: int) -> WebBody:
        source, status = self._source, response.status
        if status == 206:
            found = _CONTENT_RANGE.fullmatch(response.getheader("Content-Range") or "")
            told = tuple(int(number) for number in found.groups()) if found else None
            if told is not None and told[2] != source.size:
                raise self._refused(
                    f"is {told[2]} bytes long there, not {source.size}: the hub and its store disagree"
                )
            if told is None or told[:2] != (start, end - 1) or response.length not in (None, end - start):
                raise self._refused("comes in another part than was asked for")
            return WebBody(self, response, end - start)
        if status == 200:
            if response.length not in (None, source.size):
                raise self._refused(f"is {response.length} bytes long there, not {source.size}")
            if (start, end) != (0, source.size):
                source.ranges = False
                self.close()
                raise WholeOnly(f"{source.what}: {source.name} sends whole files only")
            return WebBody(self, response, source.size)
        raise self._failed(status, response.headers)

    def _refused(self, words: str) -> WrongContent:
        self.close()
        return WrongContent(f"{self._source.what} {words}")

    def _failed(self, status: int, headers: http.client.HTTPMessage) -> WeightsError:
        source, what, host = self._source, self._source.what, self._to[1] if self._to else self._source.name
        home = source.is_home(self._to)
        self.close()
        if home and source.refusal is not None and status in (401, 403, 404, 410):
            return source.refusal(status, headers.get("X-Error-Code") or "")
        if status in (401, 403):
            return NotAllowed(f"{what}: {host} refuses it ({status})")
        if status in (404, 410):
            return NotFound(f"{what}: {host} doesn't have it ({status})")
        if status in (408, 425, 429) or status >= 500:
            wait = _retry_after(headers.get("Retry-After"))
            return Unreachable(f"{what}: {host} answers {status}", retry_after=wait)
        return WrongContent(f"{what}: {host} answers {status}")


class WebBody:
    """The bytes of one answer. Ends with an error, never early."""

    def __init__(self, channel: WebChannel, response: http.client.HTTPResponse, length: int) -> None:
        self._channel = channel
        self._response = response
        self._left = length
        self._exact = response.length == length

    def readinto(self, buffer: memoryview) -> int:
        if not self._left:
            return 0
        what = self._channel._source.what
        host = self._channel._to[1] if self._channel._to else self._channel._source.name
        try:
            count = self._take(buffer[: self._left])
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Unreachable(f"{what}: {host} {_broke(error)}") from None
        if not count:
            left, self._left = self._left, 0
            self._channel.close()
            raise Unreachable(f"{what}: {host} broke off, {left} bytes before the end")
        self._left -= count
        if not self._left:
            if self._exact:
                self._response.close()  # read to its end: the connection can be used again
            else:
                # There may be more: whatever that is, it isn't an answer to the next question.
                self._channel.close()
        return count

    def _take(self, buffer: memoryview) -> int:
        if self._response.chunked:
            return self._response.readinto(buffer)
        # Not `HTTPResponse.readinto`, which waits until the buffer is full.
        return self._response.fp.readinto1(buffer)

    def close(self) -> None:
        if self._left:
            self._left = 0
            self._channel.close()


def _origin(url: SplitResult) -> tuple[str, str, int]:
    return url.scheme, (url.hostname or "").lower(), url.port or (443 if url.scheme == "https" else 80)


def _may_be_plain(here: SplitResult, there: SplitResult) -> bool:
    """From a mirror in plain http to itself, or from this machine to this machine."""
    if _origin(here) == _origin(there):
        return True
    return is_loopback(here.hostname or "") and is_loopback(there.hostname or "")


def _broke(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "has gone silent"
    if isinstance(error, http.client.IncompleteRead | http.client.RemoteDisconnected):
        return "broke off"
    if isinstance(error, http.client.HTTPException):
        return "doesn't speak HTTP as it should"
    return f"broke off: {getattr(error, 'strerror', None) or type(error).__name__}"


def _retry_after(text: str | None) -> float:
    """Seconds, 0 for none."""
    if not text:
        return 0.0
    if text.strip().isdecimal():
        seconds = float(text)
    else:
        when = email.utils.parsedate_tz(text)
        seconds = email.utils.mktime_tz(when) - time.time() if when else 0.0
    return min(max(seconds, 0.0), _RETRY_AFTER_MOST)
