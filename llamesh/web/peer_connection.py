"""A peer's connection: the same HTTP/1.1 server as for clients, inside the encrypted stream.

What differs from a client: it has proven who it is, so no key is asked for, and its routing headers
count; it may use the mesh's own routes; nothing is handed over to the slow lane. While a request of
its waits, it hears once a second what for (`102 Processing`), so that silence means that something is
wrong; the head of an answer is never sent before its time, since the peer may still go elsewhere.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable

import trio

from llamesh.dispatch.lease import Travel
from llamesh.errors import LlameshError, NotFound, RequestTooLarge
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.net.heads import RequestHead
from llamesh.telemetry.logs import get_logger
from llamesh.web.body import Body
from llamesh.web.caller import Caller
from llamesh.web.connection import Connection
from llamesh.web.headers import request_id, response_head
from llamesh.web.lane import Lane
from llamesh.web.peer_exchange import read_travel
from llamesh.web.peer_files import PREFIX as FILES
from llamesh.web.peer_files import PeerFiles

log = get_logger("mesh")

# (who asks, method, path, body) -> status and JSON; None: there is nothing at that path.
MeshRoutes = Callable[[str, bytes, bytes, bytes], Awaitable[tuple[int, bytes] | None]]

# How often a peer hears that its request still waits.
_PROGRESS_SECONDS = 1.0


# More than any message of the mesh itself.
_MOST_BYTES = 4 << 20

_UNPRINTABLE = re.compile(rb"[^\x20-\x7e]")


def _nothing() -> None:
    pass


class PeerConnection(Connection):
    """One connection on which a peer sends requests."""

    __slots__ = ("_files", "_on_request", "_routes", "_stream", "peer")

    def __init__(
        self,
        stream: NoiseTransport,
        lane: Lane,
        peer: str,
        routes: MeshRoutes,
        *,
        idle_seconds: float,
        on_request: Callable[[], None] | None = None,
        files: PeerFiles | None = None,
    ) -> None:
        """`peer`: the node id that the handshake proved. `on_request`: called at its first request; `files`:
        what it may fetch."""
        super().__init__(stream, stream.sock, lane)
        self._stream = stream
        self._routes = routes
        self._files = files
        self._on_request = on_request or _nothing
        self._idle_seconds = idle_seconds
        self.peer = peer
        self.deadline = trio.current_time() + idle_seconds

    def expire(self) -> None:
        """The sweep: a request that waits is told so, anything else has taken too long."""
        inbound = self._inbound
        if inbound is None or not self._working or self.started:
            super().expire()
            return
        # A control character would make it no HTTP, and the peer would take that for a breakdown.
        text = _UNPRINTABLE.sub(b" ", inbound.waiting_for().encode("ascii", "replace")[:200])
        self._stream.send_now(b"HTTP/1.1 102 Processing\r\nx-llamesh-waiting-for: " + text + b"\r\n\r\n")
        self.deadline = trio.current_time() + _PROGRESS_SECONDS

    @property
    def _origin(self) -> str:
        return self.peer

    def _work_begins(self) -> None:
        self.deadline = trio.current_time() + _PROGRESS_SECONDS

    async def _one_request(self) -> bool:
        # The first byte of the first request, or its whole head: either way this connection is taken.
        if self._on_request is not _nothing:
            self._unread = await self._stream.receive()
            on_request, self._on_request = self._on_request, _nothing
            on_request()
            if not self._unread:
                return False
        return await super()._one_request()

    def _admit(self, head: RequestHead) -> tuple[Travel, Caller]:
        caller = self._lane.gateway.admit(head.headers, peer=True)
        return read_travel(head.headers, self.peer), caller

    async def _answer_other(self, head: RequestHead, size: int) -> bool:
        self._unread = self._unread[size:]
        if head.chunked or (head.length or 0) > _MOST_BYTES:
            error = RequestTooLarge(f"a message of the mesh has a length, of {_MOST_BYTES} bytes at most")
            await self._refuse_unread(error, request_id(head.headers), head)
            return False
        if self._files is not None and head.path.startswith(FILES) and not head.length:
            return await self._send_file(head, self._files)
        with Body(self._lane.gateway.budget) as body:
            try:
                if not await self._read_body(head, body):
                    self._reason = None
                    return False
                self._reason = None
                self.deadline = math.inf
                if self._left:
                    return False
                self._working = True
                answer = await self._routes(self.peer, head.method, head.path, bytes(body.view()))
                if answer is None:
                    raise NotFound(f"the mesh has nothing at {head.path[:200].decode('ascii', 'replace')}")
                status, data = answer
            except LlameshError as error:
                status, data = error.status, error.body()
        return await self._answer_json(head, status, data)

    async def _send_file(self, head: RequestHead, files: PeerFiles) -> bool:
        self._reason = None
        if self._left:
            return False
        # Whoever cancels a download closes the connection, and that ends it here, wherever it is.
        self._working = self.started = True
        try:
            await files.answer(self._transport, head, self._keep_alive, self._allow)
        except LlameshError as error:
            self.started = False
            return await self._answer_json(head, error.status, error.body(), error.retry_after)
        except OSError as error:
            log.info("weights weren't sent to their end", peer=self.peer, problem=str(error))
            return False
        self._working = False
        self.deadline = trio.current_time() + self._idle_seconds
        return self._keep_alive

    def _allow(self, seconds: float) -> None:
        self.deadline = trio.current_time() + seconds

    async def _answer_json(
        self, head: RequestHead, status: int, data: bytes, retry_after: int | None = None
    ) -> bool:
        self._working = False
        self.deadline = trio.current_time() + self._idle_seconds
        headers = [
            (b"content-type", b"application/json"),
            (b"x-request-id", request_id(head.headers).encode()),
        ]
        if retry_after is not None:
            headers.append((b"retry-after", b"%d" % retry_after))
        answer_head = response_head(status, headers, length=len(data), keep_alive=self._keep_alive)
        await self._transport.send(answer_head + data)
        return self._keep_alive

    async def _hand_over(self) -> bool:
        await self._say(NotFound("a peer's connection carries plain HTTP/1.1 requests"))
        return False

    async def _linger(self) -> None:
        """A peer reads its answers; it needs no such help."""
        self._keep_alive = False
