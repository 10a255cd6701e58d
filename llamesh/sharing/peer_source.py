"""A file that a peer has, as a download sees it: ranges over encrypted connections, in its threads."""

from __future__ import annotations

import re
import threading
from collections.abc import Awaitable, Callable

import trio

from llamesh.local.weights.errors import NotFound, Unreachable, WeightsError, WrongContent
from llamesh.mesh.blocking import BlockingLink

_MOST_HEAD = 16_384
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})(?: [^\r\n]*)?")
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})")
_LENGTH = re.compile(r"\d{1,19}")
_MOST_WAIT = 60.0

# (whether one that was kept turned out to be closed) -> a connection of the caller's own; raises OSError
Opener = Callable[[bool], Awaitable[BlockingLink]]


class PeerSource:
    """A `SizedSource`. `name`: "node ID"; connections are opened in the trio run of `token`."""

    ranges = True

    def __init__(
        self, name: str, sha256: str, size: int, open_link: Opener, token: trio.lowlevel.TrioToken
    ) -> None:
        self.name = name
        self.size = size
        self.sha256 = sha256
        self._open_link = open_link
        self._token = token

    def channel(self) -> PeerChannel:
        return PeerChannel(self)

    def link(self, *, fresh: bool) -> BlockingLink:
        """A connection, from any thread but trio's. Raises Unreachable."""
        try:
            return trio.from_thread.run(self._open_link, fresh, trio_token=self._token)
        except (OSError, trio.RunFinishedError, trio.Cancelled) as error:
            raise Unreachable(str(error) or f"{self.name} can't be asked: this node is ending") from None


class PeerChannel:
    """One connection to the peer, kept while it lasts."""

    def __init__(self, source: PeerSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._link: BlockingLink | None = None
        self._cut = False

    def open(self, start: int, end: int) -> PeerBody:
        for fresh in (False, True):
            link = self._connect(fresh=fresh)
            try:
                return self._ask(link, start, end)
            except OSError as error:
                self.close()
                # One that was kept may have been closed over there at any moment.
                if fresh or self._cut or isinstance(error, TimeoutError):
                    raise self.broken(error) from None
        raise AssertionError

    def cut(self) -> None:
        with self._lock:
            self._cut = True
            if self._link is not None:
                self._link.cut()

    def close(self) -> None:
        """Also when what comes is of no use any more: the next `open` makes another."""
        with self._lock:
            link, self._link = self._link, None
        if link is not None:
            link.close()

    def broken(self, error: OSError) -> Unreachable:
        """What to raise for it."""
        name = self._source.name
        if isinstance(error, TimeoutError):
            return Unreachable(f"{name} has gone silent")
        return Unreachable(f"{name} broke off: {error}")

    def refused(self, why: str) -> WrongContent:
        """The peer doesn't do as it should."""
        self.close()
        return WrongContent(f"{self._source.name} {why}")

    def _connect(self, *, fresh: bool) -> BlockingLink:
        if self._link is not None:
            return self._link
        link = self._source.link(fresh=fresh)
        with self._lock:
            self._link = link
            if self._cut:
                link.cut()
        return link

    def _ask(self, link: BlockingLink, start: int, end: int) -> PeerBody:
        target = f"/mesh/weights/{self._source.sha256}"
        link.send(
            f"GET {target} HTTP/1.1\r\nhost: llamesh\r\nrange: bytes={start}-{end - 1}\r\n\r\n".encode()
        )
        data = b""
        while (at := data.find(b"\r\n\r\n")) < 0:
            if len(data) > _MOST_HEAD:
                raise self.refused("doesn't speak HTTP as it should")
            piece = link.receive()
            if not piece:
                raise ConnectionError("it ended the connection")
            data += piece
        status, headers = self._head(data[:at])
        length = headers.get("content-length", "")
        if status != 206:
            raise self._failed(status, headers)
        found = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        told = tuple(int(number) for number in found.groups()) if found else ()
        if told != (start, end - 1, self._source.size) or "transfer-encoding" in headers:
            raise self.refused("sends another part than was asked for")
        if not _LENGTH.fullmatch(length) or int(length) != end - start:
            raise self.refused("sends another part than was asked for")
        body = data[at + 4 :]
        if len(body) > end - start:
            raise self.refused("sends more than was asked for")
        return PeerBody(self, link, body, end - start, headers.get("connection", "").lower() != "close")

    def _head(self, data: bytes) -> tuple[int, dict[str, str]]:
        first, *lines = data.split(b"\r\n")
        found = _STATUS.fullmatch(first)
        headers: dict[str, str] = {}
        for line in lines:
            name, colon, value = line.decode("latin-1").partition(":")
            key = name.lower()
            if not colon or not name or key != key.strip() or key in headers:
                raise self.refused("doesn't speak HTTP as it should")
            headers[key] = value.strip()
        if found is None:
            raise self.refused("doesn't speak HTTP as it should")
        return int(found[1]), headers

    def _failed(self, status: int, headers: dict[str, str]) -> WeightsError:
        name = self._source.name
        self.close()
        if status == 404:
            return NotFound(f"{name} doesn't have it any more")
        if status == 503:
            wait = headers.get("retry-after", "")
            seconds = float(wait) if _LENGTH.fullmatch(wait) else 0.0
            return Unreachable(f"{name} has no time for it", retry_after=min(seconds, _MOST_WAIT))
        return WrongContent(f"{name} answers {status}")


class PeerBody:
    """The bytes of one answer. Ends with an error, never early."""

    def __init__(
        self, channel: PeerChannel, link: BlockingLink, first: bytes, length: int, keep: bool
    ) -> None:
        self._channel = channel
        self._link = link
        self._pending = memoryview(first)
        self._left = length  # that wasn't handed out
        self._keep = keep

    def readinto(self, buffer: memoryview) -> int:
        if not self._left:
            return 0
        if not self._pending:
            try:
                piece = self._link.receive()
            except OSError as error:
                self.close()
                raise self._channel.broken(error) from None
            if not piece:
                self.close()
                raise self._channel.broken(ConnectionError("it ended the connection"))
            if len(piece) > self._left:
                self._left = 0
                raise self._channel.refused("sends more than was asked for")
            self._pending = memoryview(piece)
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        self._left -= count
        if not self._left and not self._keep:
            self._channel.close()
        return count

    def close(self) -> None:
        if self._left:
            self._left = 0
            self._channel.close()
