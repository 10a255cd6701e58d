"""The ASGI face of the node: inference through the same gateway as the fast lane, the rest to Quart."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from llamesh.errors import InvalidRequest, LlameshError, MethodNotAllowed, RequestTimeout, RequestTooLarge
from llamesh.net.exchange import Headers
from llamesh.web.answer import Inbound
from llamesh.web.body import Body
from llamesh.web.cors import Cors
from llamesh.web.direct import Call, Direct, Handler
from llamesh.web.gateway import Gateway
from llamesh.web.headers import request_id
from llamesh.web.openai import ROUTES, Route
from llamesh.web.slow_lane import ReplayStream

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

# Visible ASCII: what a request line can carry.
_QUERY = re.compile(rb"[!-~]*")

# For so long an answer that has its last piece may take to end after the client left.
_END_SECONDS = 1.0

# For so long an answer waits for the rest of a request that it doesn't need.
_LINGER_SECONDS = 5.0


class Application:
    """The application that Hypercorn serves."""

    def __init__(self, gateway: Gateway, app: Asgi, direct: Direct | None = None) -> None:
        """`direct`: routes whose answers stream; they are served here, past the application."""
        self._gateway = gateway
        self._app = app
        self._direct = direct
        self._cors = Cors.of(gateway.settings.http.cors_allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification, 3.0."""
        with scope["state"]["connection"].answering():
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send)
        if self._cors is not None:
            preflight = self._cors.preflight(scope["method"], scope["headers"])
            if preflight is not None:
                exchange.extra += preflight
                async with exchange.draining():
                    await exchange.send({"type": "http.response.start", "status": 204, "headers": []})
                    await exchange.send({"type": "http.response.body", "body": b""})
                return
            exchange.extra += self._cors.headers(scope["headers"])
        route = ROUTES.get(scope["raw_path"]) if scope["method"] == "POST" else None
        handler = self._direct.find(scope) if self._direct is not None and route is None else None
        if route is not None:
            await self._infer(route, scope, exchange)
        elif handler is not None:
            await self._stream(handler, scope, exchange)
        else:
            exchange.extra.append((b"x-request-id", request_id(scope["headers"]).encode()))
            await self._app(scope, exchange.receive, exchange.send)

    async def _infer(self, route: Route, scope: Scope, exchange: _Exchange) -> None:
        headers: Headers = list(scope["headers"])
        id = request_id(headers)  # noqa: A001
        sink = AsgiSink(exchange.send, scope)
        started = trio.current_time()
        gateway = self._gateway
        with Body(gateway.budget) as body:
            try:
                _check_query(scope["query_string"])
                caller = gateway.admit(headers)
                if not await self._read(headers, exchange.receive, body):
                    return
            except LlameshError as error:
                gateway.count_refused(error, id, scope["raw_path"], headers, _client(scope))
                if isinstance(error, RequestTimeout):
                    exchange.expect_no_more()
                async with exchange.draining():
                    await gateway.refuse(error, id, sink)
                return
            inbound = Inbound(
                scope["raw_path"], scope["query_string"], headers, body, id, started, caller=caller
            )
            inbound.address = _client(scope)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, exchange.receive, sink, nursery.cancel_scope)
                sink.on_cancel = nursery.cancel_scope.cancel
                await gateway.infer(inbound, route, sink)
                nursery.cancel_scope.cancel()
            if sink.cancelled is not None:
                await gateway.refuse(sink.cancelled, id, sink)

    async def _stream(self, handler: Handler, scope: Scope, exchange: _Exchange) -> None:
        """Answer one of the direct routes, until it is done or its client leaves."""
        headers: Headers = list(scope["headers"])
        id, sink = request_id(headers), AsgiSink(exchange.send, scope)  # noqa: A001
        exchange.extra.append((b"x-request-id", id.encode()))
        gateway = self._gateway
        with Body(gateway.budget) as body:
            call = Call(
                scope["method"], scope["raw_path"], scope["query_string"], headers, id, _client(scope), body,
                sink, exchange.extra,
            )  # fmt: skip
            try:
                _check_query(scope["query_string"])
                handler.admit(call)
                if not await self._read(headers, exchange.receive, body, call.most_bytes):
                    return
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, exchange.receive, sink, nursery.cancel_scope)
                    try:
                        await handler.run(call)
                    except LlameshError as error:
                        await self._refuse_call(error, call)
                    nursery.cancel_scope.cancel()
            except LlameshError as error:
                if isinstance(error, RequestTimeout):
                    exchange.expect_no_more()
                async with exchange.draining():
                    await self._refuse_call(error, call)
            except OSError:
                sink.abort()

    async def _refuse_call(self, error: LlameshError, call: Call) -> None:
        if isinstance(error, MethodNotAllowed) and not call.sink.started:
            body = error.body()
            headers = self._gateway.error_headers(error, call.id)
            headers = [pair for pair in headers if pair[0] != b"x-request-id"]
            call.sink.start(error.status, [*headers, (b"allow", error.allowed.encode())], length=len(body))
            await call.sink.finish(body)
            return
        await self._gateway.refuse(error, call.id, call.sink)

    async def _read(self, headers: Headers, receive: Receive, body: Body, most: int | None = None) -> bool:
        http = self._gateway.settings.http
        limit = http.request_body_limit_bytes
        if most is not None and most < limit:
            limit = most
        if any(
            name == b"content-length" and value.isdigit() and int(value) > limit for name, value in headers
        ):
            raise _too_large(limit, http.request_body_limit_bytes)
        while True:
            with trio.move_on_after(http.body_read_timeout_ms / 1000) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise RequestTimeout("the request body stopped coming")
            if message["type"] == "http.disconnect":
                return False
            body.add(message.get("body", b""))
            if body.length > limit:
                raise _too_large(limit, http.request_body_limit_bytes)
            if not message.get("more_body"):
                return True

    @staticmethod
    async def _watch(receive: Receive, sink: AsgiSink, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if sink.finished:
            # The end of an answer is reported as a disconnect, too. But when the client left at the
            # same moment, Hypercorn may wait for ever to send the last piece.
            await trio.sleep(_END_SECONDS)
        scope.cancel()


def _client(scope: Scope) -> str:
    """The address of the connection's other end."""
    return str((scope.get("client") or ("",))[0])


def _is_http1(scope: Scope) -> bool:
    return str(scope.get("http_version", "1.1")).startswith("1")


def _check_query(query: bytes) -> None:
    # HTTP/2 lets through what would end the request line on the way to the instance.
    if not _QUERY.fullmatch(query):
        raise InvalidRequest("the query has characters that must be percent-encoded")


def _too_large(limit: int, setting: int) -> RequestTooLarge:
    name = "http.request_body_limit_bytes" if limit == setting else "this path takes"
    return RequestTooLarge(f"the request body is larger than {name} ({limit})")


class _Exchange:
    """ASGI's receive and send of one request, with `extra` headers for its response.

    The answer doesn't end before the request did, within bounds. On HTTP/1 a client that still sends
    would get a reset instead of its answer; on HTTP/2 Hypercorn forgets a stream whose answer ended,
    and the next piece of its request would break the connection for all other streams.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # HTTP/1 connections close after one request, so that no client stays in this lane by accident.
        self.extra: Headers = [(b"connection", b"close")] if _is_http1(scope) else []
        self._receive = receive
        self._send = send
        self._read = trio.Event()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] != "http.request" or not message.get("more_body"):
            self._read.set()
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *self.extra]}
        elif not message.get("more_body") and not self._read.is_set():
            await self._send({**message, "more_body": True})
            with trio.move_on_after(_LINGER_SECONDS):
                await self._read.wait()  # somebody else receives: the application, or `draining`
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    def expect_no_more(self) -> None:
        """The client stopped sending: don't wait for the rest."""
        self._read.set()

    @asynccontextmanager
    async def draining(self) -> AsyncIterator[None]:
        """Receive and drop the rest of the request meanwhile."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain)
            yield
            nursery.cancel_scope.cancel()

    async def _drain(self) -> None:
        while not self._read.is_set():
            await self.receive()


class AsgiSink:
    """A `Sink` on ASGI's send. Hypercorn adds the framing."""

    def __init__(self, send: Send, scope: Scope) -> None:
        self.started = False
        self.finished = False
        self._send = send
        self._head: Message | None = None
        self.cancelled: LlameshError | None = None
        self.on_cancel: Callable[[], None] = lambda: None
        self._connection: ReplayStream = scope["state"]["connection"]
        self._aborted = False

    def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """See `Sink.start`."""
        self.started = True
        if length is not None:
            headers = [*headers, (b"content-length", b"%d" % length)]
        self._head = {"type": "http.response.start", "status": status, "headers": headers}

    async def write(self, data: bytes) -> None:
        """See `Sink.write`."""
        await self.flush()
        await self._body(data, more=True)

    async def flush(self) -> None:
        """See `Sink.flush`."""
        if self._head is not None:
            head, self._head = self._head, None
            await self._send(head)

    async def finish(self, data: bytes = b"") -> None:
        """See `Sink.finish`."""
        await self.flush()
        self.finished = True
        await self._body(data, more=False)

    def abort(self) -> None:
        """See `Sink.abort`."""
        if not self._aborted:
            self._aborted = True
            self._connection.cut()

    def cancel(self, error: LlameshError) -> None:
        """See `Sink.cancel`."""
        self.cancelled = error
        self.on_cancel()

    async def _body(self, data: bytes, *, more: bool) -> None:
        if self._aborted:
            raise ConnectionAbortedError("the response was cut")
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
