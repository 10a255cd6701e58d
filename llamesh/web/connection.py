"""One client connection in the fast lane: HTTP/1.1 on a raw socket.

    read a head -> is it for this lane? -> read the body -> gateway -> next head on the same connection

It answers the inference routes and the GETs that OpenAI clients begin with. Everything else (other
paths, HTTP/1.0, HTTP/2, upgrades) is handed over with the bytes read so far, before any of it was
answered.

One task per connection and no more. While a request is worked on, nobody reads the client's
socket: `HangupWatch` tells when the client left, `Sweep` when a deadline passed, and both cancel
the connection's one scope. A client that sends its next request early finds it read when its turn comes.
"""

from __future__ import annotations

import math
import socket

import trio

from llamesh.dispatch.lease import AT_HOME, Travel
from llamesh.errors import HeadersTooLarge, InvalidRequest, LlameshError, RequestTimeout, RequestTooLarge
from llamesh.net.exchange import Headers
from llamesh.net.heads import BadRequest, ChunkDecoder, RequestHead, find_head, parse_head
from llamesh.net.transport import SocketTransport, Transport
from llamesh.telemetry.logs import get_logger
from llamesh.web.answer import Inbound
from llamesh.web.body import Body
from llamesh.web.caller import Caller
from llamesh.web.headers import request_id, response_head
from llamesh.web.http_sink import HttpSink
from llamesh.web.lane import Lane
from llamesh.web.openai import ROUTES, Route

log = get_logger("http")

_LINE_END = (b"\r", b"\n")

# The first byte of a peer's encrypted connection; no HTTP begins with it.
NOISE = b"\0"

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# After an answer to a request whose body wasn't read: read on for this long, so that the client
# gets to see the answer instead of a reset (it is still sending).
_LINGER_SECONDS = 2.0
_LINGER_BYTES = 4 << 20


class Connection(HttpSink):
    """One client connection. As a `Sink` it is the response to its present request."""

    __slots__ = (
        "_address",
        "_handed_over",
        "_idle_seconds",
        "_inbound",
        "_left",
        "_reason",
        "_scope",
        "_sock",
        "_unread",
        "_working",
    )

    def __init__(self, transport: Transport, sock: socket.socket, lane: Lane) -> None:
        """`sock`: the one below `transport`, to see its client leave."""
        super().__init__(transport, lane)
        self._sock = sock
        self._scope = trio.CancelScope()
        self._unread = b""
        self._left = False
        self._working = False  # a request is being answered: its client's leaving ends it
        self._handed_over = False
        self._reason: LlameshError | None = None
        self._idle_seconds = lane.idle_seconds
        self._inbound: Inbound | None = None  # the request that is being answered
        # Asked at the start: of a connection that was reset the kernel doesn't know it any more.
        self._address = _far_end(sock) if lane.gateway.audit is not None else ""
        self.deadline = trio.current_time() + lane.first_byte_seconds

    async def run(self) -> None:
        """Requests, one after the other, until one side has had enough."""
        lane, transport = self._lane, self._transport
        lane.gateway.stats.connections += 1
        lane.sweep.add(self)
        lane.hangups.add(self._sock, self._client_left)
        try:
            with self._scope:
                while await self._one_request():
                    pass
            if self._reason is not None and not self.started:
                await self._say(self._reason)
        except OSError as error:
            log.debug("connection lost", error=str(error))
        finally:
            lane.gateway.stats.connections -= 1
            self._unwatch()
            if not self._handed_over:
                transport.close()

    # Called from outside.

    def expire(self) -> None:
        """The sweep found the deadline passed."""
        self.deadline = math.inf
        self._scope.cancel()

    def cancel(self, error: LlameshError) -> None:
        """See `Sink.cancel`. The connection ends with its request."""
        if self._working:
            self._reason = error
            self._scope.cancel()

    def _client_left(self) -> None:
        self._left = True
        if self._working:
            self._scope.cancel()

    def _unwatch(self) -> None:
        self._lane.sweep.discard(self)
        if not self._transport.closed:
            self._lane.hangups.remove(self._sock)

    # Requests.

    async def _one_request(self) -> bool:
        """Read and answer one request. False when the connection is done with."""
        lane = self._lane
        self.started = False
        try:
            size = await self._read_head()
            if size == 0:
                return False
            if size < 0:  # HTTP/2, or Noise
                return await self._hand_over()
            head = parse_head(self._unread[:size])
        except BadRequest as error:
            await self._refuse_bytes(error)
            return False
        self._keep_alive = head.keep_alive and not lane.closing
        if lane.cors is not None:
            self._cors = lane.cors.headers(head.headers)
        route = ROUTES.get(head.path) if head.method == b"POST" else None
        if head.version != "1.1" or head.upgrade:
            return await self._hand_over()
        if route is None:
            return await self._answer_other(head, size)
        self._unread = self._unread[size:]
        await self._infer(head, route)
        return self._keep_alive

    async def _answer_other(self, head: RequestHead, size: int) -> bool:
        """Answer what isn't inference. False when the connection is done with."""
        page = self._lane.pages(head.path, head.headers) if self._is_plain_get(head) else None
        if page is None:
            return await self._hand_over()
        self._unread = self._unread[size:]
        await self._answer_page(page, head)
        return self._keep_alive

    @staticmethod
    def _is_plain_get(head: RequestHead) -> bool:
        return head.method in (b"GET", b"HEAD") and not head.chunked and not head.length

    async def _read_head(self) -> int:
        """Length of the next request's head in `_unread`; 0 at the end of the stream, -1 for what isn't for
        this lane: HTTP/2, a peer.
        """
        waiting = trio.current_time()
        while True:
            if self._unread[:1] in _LINE_END:
                # RFC 9112, 2.2: an empty line before a request is harmless.
                self._unread = self._unread.lstrip(b"\r\n")
            if self._unread:
                if self._unread[:1] == NOISE:
                    return -1
                if _PREFACE.startswith(self._unread[: len(_PREFACE)]):
                    if len(self._unread) >= len(_PREFACE):
                        return -1
                else:
                    size = find_head(self._unread)
                    if size:
                        self.deadline = math.inf
                        return size
                if self._reason is None:
                    # From its first byte on, a head has a time limit, however it trickles in.
                    self.deadline = waiting + self._lane.read_seconds
                    self._reason = RequestTimeout("the request head took too long")
            data = await self._transport.receive()
            if not data:
                self._reason = None
                return 0
            if not self._unread:
                waiting = trio.current_time()
            self._unread += data

    async def _infer(self, head: RequestHead, route: Route) -> None:
        lane = self._lane
        gateway = lane.gateway
        started = trio.current_time()
        self._reason = None
        id = request_id(head.headers)  # noqa: A001
        try:
            travel, caller = self._admit(head)
            if head.length is not None and head.length > lane.body_limit:
                raise _too_large(lane.body_limit)
        except LlameshError as error:
            await self._refuse_unread(error, id, head)
            return
        with Body(gateway.budget) as body:
            try:
                if not await self._read_body(head, body):
                    self._keep_alive = False
                    self._reason = None
                    return
            except BadRequest as error:
                await self._refuse_unread(InvalidRequest(str(error)), id, head)
                return
            except LlameshError as error:
                await self._refuse_unread(error, id, head)
                return
            self.deadline = math.inf
            self._reason = None
            if self._left:
                self._keep_alive = False
                return
            self._working = True
            self._work_begins()
            inbound = self._inbound = Inbound(
                head.path, head.query, head.headers, body, id, started, travel, caller=caller
            )
            if gateway.audit is not None:
                inbound.address = self._address
            await gateway.infer(inbound, route, self)
            self._working = False
            self._inbound = None
            self.deadline = trio.current_time() + self._idle_seconds

    @property
    def _origin(self) -> str:
        """The peer at the other end, "" for a client."""
        return ""

    def _work_begins(self) -> None:
        """A request was read, and is about to be answered."""

    def _admit(self, head: RequestHead) -> tuple[Travel, Caller]:
        """Whether the request may be made at all, how it came and who asks. Raises LlameshError."""
        return AT_HOME, self._lane.gateway.admit(head.headers)

    async def _read_body(self, head: RequestHead, body: Body) -> bool:
        """Read all of it into `body`; False when the client left. Raises BadRequest, RequestTooLarge."""
        self._reason = RequestTimeout("the request body stopped coming")
        if head.expects_continue and not self._unread:
            await self._transport.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if head.chunked:
            return await self._read_chunks(body)
        left = head.length or 0
        while left:
            if not self._unread:
                self.deadline = trio.current_time() + self._lane.read_seconds
                self._unread = await self._transport.receive()
                if not self._unread:
                    return False
            piece = self._unread[:left]
            self._unread = self._unread[left:]
            left -= len(piece)
            body.add(piece)
        return True

    async def _read_chunks(self, body: Body) -> bool:
        decoder = ChunkDecoder()
        limit = self._lane.body_limit
        while True:
            body.add(decoder.feed(self._unread))
            self._unread = b""
            if body.length > limit:
                raise _too_large(limit)
            if decoder.done:
                self._unread = decoder.rest
                return True
            self.deadline = trio.current_time() + self._lane.read_seconds
            self._unread = await self._transport.receive()
            if not self._unread:
                return False

    async def _hand_over(self) -> bool:
        self._unwatch()
        self._reason = None
        self._handed_over = True
        assert isinstance(self._transport, SocketTransport)  # noqa: S101
        sock = self._transport.detach()
        unread, self._unread = self._unread, b""
        if unread[:1] == NOISE:
            await self._lane.serve_peer(sock, unread)
        else:
            await self._lane.slow_lane.serve(sock, unread)
        return False

    # Answers that aren't relayed.

    async def _answer_page(self, page: tuple[int, Headers, bytes], head: RequestHead) -> None:
        status, headers, body = page
        headers = [*headers, *self._cors, (b"x-request-id", request_id(head.headers).encode())]
        data = response_head(status, headers, length=len(body), keep_alive=self._keep_alive)
        self._reason = None
        self.deadline = trio.current_time() + self._idle_seconds
        await self._transport.send(data if head.method == b"HEAD" else data + body)

    async def _refuse_bytes(self, error: BadRequest) -> None:
        self._lane.gateway.stats.bad_heads += 1
        log.info("bad request", error=str(error))
        self._keep_alive = False
        self._reason = None
        face = HeadersTooLarge(str(error)) if error.too_large else InvalidRequest(str(error))
        await self._say(face)
        await self._linger()

    async def _refuse_unread(self, error: LlameshError, id: str, head: RequestHead) -> None:  # noqa: A002
        """Refuse a request whose body is still on its way. A short one is read and dropped instead."""
        left = None if head.chunked else (head.length or 0) - len(self._unread)
        at_hand = left is not None and left <= 0
        self._keep_alive = self._keep_alive and at_hand
        if at_hand:
            self._unread = self._unread[head.length or 0 :]
        log.info("request", request_id=id, path=head.path.decode("ascii", "replace"), error=error.type)
        self._lane.gateway.count_refused(error, id, head.path, head.headers, self._address, self._origin)
        await self._lane.gateway.refuse(error, id, self)
        if not at_hand and (self._unread or not head.expects_continue):
            await self._linger()

    async def refuse(self, error: LlameshError) -> None:
        """Say why nothing on this connection is served, and let the client read it."""
        try:
            await self._say(error)
            await self._linger()
        except OSError as failure:
            log.debug("connection lost", error=str(failure))

    async def _say(self, error: LlameshError) -> None:
        """One last answer before the connection closes; bounded, since the client may not read."""
        body = error.body()
        id = self._inbound.request_id if self._inbound is not None else request_id([])  # noqa: A001
        headers = self._lane.gateway.error_headers(error, id)
        data = response_head(error.status, headers, length=len(body), keep_alive=False) + body
        with trio.move_on_after(_LINGER_SECONDS):
            await self._transport.send(data)

    async def _linger(self) -> None:
        """Half-close and read what still comes, within bounds, so that no reset eats the answer."""
        self._keep_alive = False
        try:
            self._sock.shutdown(socket.SHUT_WR)
            taken = 0
            with trio.move_on_after(_LINGER_SECONDS):
                while taken < _LINGER_BYTES:
                    data = await self._transport.receive()
                    if not data:
                        break
                    taken += len(data)
        except OSError as error:
            log.debug("connection lost", error=str(error))


def _far_end(sock: socket.socket) -> str:
    """The address of a connection's other end."""
    try:
        return str(sock.getpeername()[0])
    except OSError:
        return ""


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"the request body is larger than http.request_body_limit_bytes ({limit})")
