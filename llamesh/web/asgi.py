"""The ASGI face of the node: inference through the same gateway as the fast lane, the rest to Quart."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from llamesh.errors import LlameshError, RequestTimeout, RequestTooLarge
from llamesh.net.exchange import Headers
from llamesh.web.body import Body
from llamesh.web.gateway import Gateway
from llamesh.web.headers import request_id
from llamesh.web.openai import ROUTES, Route
from llamesh.web.relay import Inbound
from llamesh.web.slow_lane import ReplayStream

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]


class Application:
    """The application that Hypercorn serves."""

    def __init__(self, gateway: Gateway, app: Asgi) -> None:
        self._gateway = gateway
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the ASGI specification, 3.0."""
        if scope["type"] == "http" and scope["method"] == "POST":
            route = ROUTES.get(scope["raw_path"])
            if route is not None:
                await self._infer(route, scope, receive, send)
                return
        await self._app(scope, receive, _closing(send) if _is_http1(scope) else send)

    async def _infer(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        headers: Headers = list(scope["headers"])
        id = request_id(headers)  # noqa: A001
        sink = AsgiSink(send, scope)
        started = trio.current_time()
        gateway = self._gateway
        with Body(gateway.budget) as body:
            try:
                gateway.admit(headers)
                if not await self._read(receive, body):
                    return
            except LlameshError as error:
                gateway.stats.rejected[error.type] += 1
                await gateway.refuse(error, id, sink)
                if _is_http1(scope):
                    await self._drain(receive)
                return
            inbound = Inbound(scope["raw_path"], scope["query_string"], headers, body, id, started)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, receive, sink, nursery.cancel_scope)
                await gateway.infer(inbound, route, sink)
                nursery.cancel_scope.cancel()

    async def _read(self, receive: Receive, body: Body) -> bool:
        http = self._gateway.settings.http
        limit = http.request_body_limit_bytes
        while True:
            with trio.move_on_after(http.body_read_timeout_ms / 1000) as scope:
                message = await receive()
            if scope.cancelled_caught:
                raise RequestTimeout("the request body stopped coming")
            if message["type"] == "http.disconnect":
                return False
            body.add(message.get("body", b""))
            if body.length > limit:
                raise RequestTooLarge(
                    f"the request body is larger than http.request_body_limit_bytes ({limit})"
                )
            if not message.get("more_body"):
                return True

    @staticmethod
    async def _drain(receive: Receive) -> None:
        """Read what the client still sends, within bounds, so that it gets to read its answer."""
        taken = 0
        with trio.move_on_after(2):
            while taken < 4 << 20:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
                taken += len(message.get("body", b""))

    @staticmethod
    async def _watch(receive: Receive, sink: AsgiSink, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not sink.finished:  # a finished response is reported as a disconnect, too
            scope.cancel()


def _is_http1(scope: Scope) -> bool:
    return str(scope.get("http_version", "1.1")).startswith("1")


def _closing(send: Send) -> Send:
    """HTTP/1 connections close after one request, so that no client stays in this lane by accident."""

    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await send(message)

    return wrapped


class AsgiSink:
    """A `Sink` on ASGI's send. Hypercorn adds the framing."""

    def __init__(self, send: Send, scope: Scope) -> None:
        self.started = False
        self.finished = False
        self._send = send
        self._head: Message | None = None
        self._extra: Headers = [(b"connection", b"close")] if _is_http1(scope) else []
        self._connection: ReplayStream = scope["state"]["connection"]
        self._aborted = False

    def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        """See `Sink.start`."""
        self.started = True
        if length is not None:
            headers = [*headers, (b"content-length", b"%d" % length)]
        self._head = {
            "type": "http.response.start",
            "status": status,
            "headers": [*headers, *self._extra],
        }

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

    async def _body(self, data: bytes, *, more: bool) -> None:
        if self._aborted:
            raise ConnectionAbortedError("the response was cut")
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
