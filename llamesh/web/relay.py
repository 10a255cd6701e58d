"""One inference request, from its body to the last byte of its answer.

    find a slot (maybe wait, telling the client what for)
    -> send the request to the instance -> hand its answer on, piece by piece -> free the slot

Rules
- Bodies pass byte for byte, both ways.
- A reused connection that turns out to be closed is replaced silently: llama-server closes them
  after 5 s and after 100 requests, and that can cross with a request on its way.
- Before the first byte of the answer, a failed upstream is tried once more; a request that killed
  an instance gets one more instance, not all of them. After that byte the answer is cut.
- Leaving early in any way (cancelled, client gone, timeout) closes the upstream connection, which
  is how llama-server learns of it, and frees the slot. All of that is in one `finally`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec
import trio

from llamesh.config.settings import Settings
from llamesh.core.lifecycle import State
from llamesh.dispatch import Dispatch
from llamesh.errors import UpstreamError, UpstreamTimeout
from llamesh.lease import Ask, Lease
from llamesh.local.instance import Instance
from llamesh.net.exchange import Headers, UpstreamBroken, UpstreamConnection
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.stats import Usage
from llamesh.web.body import Body
from llamesh.web.headers import pass_back, upstream_request
from llamesh.web.openai import Route
from llamesh.web.sink import Sink
from llamesh.web.usage import UsageScan

log = get_logger("relay")

# One retry in all: the second failure is the request's own doing more often than not.
_MAX_ATTEMPTS = 2

# How long a broken instance may take to be reaped, so that its last words are known.
_REAP_SECONDS = 1.0

_SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(slots=True)
class Inbound:
    """A request as a lane read it. `query`: without the question mark; `started`: trio's time."""

    path: bytes
    query: bytes
    headers: Headers
    body: Body
    request_id: str
    started: float


@dataclass(slots=True)
class Outcome:
    """What became of a request; filled as it goes, so that it is right whenever it ends."""

    status: int = 0
    instance: str = ""
    queued_seconds: float = 0.0
    first_byte_seconds: float | None = None
    attempts: int = 0
    error: str = ""  # an error's type, "cut" or "cancelled"; empty for an answer that was relayed whole
    usage: Usage = field(default_factory=Usage)


class ClientGone(Exception):
    """Writing to the client failed: nothing more to do for it."""


class Relay:
    """Carries requests out; one object for the whole node."""

    def __init__(self, settings: Settings, dispatch: Dispatch) -> None:
        self._dispatch = dispatch
        self.configure(settings)

    def configure(self, settings: Settings) -> None:
        """Take over settings, at the start and after a reload."""
        self._node = settings.node_id
        self._node_header = settings.node_id.encode()
        self._key_header = settings.auth.required_header.lower().encode()
        self._keepalive = settings.http.stream_keepalive_seconds or math.inf
        self._silence_ms = settings.upstream_read_timeout_ms
        self._duration_ms = settings.model_defaults.max_request_duration_ms

    async def run(self, inbound: Inbound, ask: Ask, route: Route, sink: Sink, outcome: Outcome) -> None:
        """Answer one request through `sink`.

        Raises LlameshError when no byte of an upstream's answer was sent (though `sink` may have
        started with comments), ClientGone when the client can't be written to.
        """
        limit = ask.profile.max_request_duration_ms
        if limit is None:
            limit = self._duration_ms
        if not limit:
            await self._attempts(inbound, ask, route, sink, outcome)
            return
        with trio.move_on_after(limit / 1000) as scope:
            await self._attempts(inbound, ask, route, sink, outcome)
        if scope.cancelled_caught:
            self._too_late(f"took longer than max_request_duration_ms ({limit} ms)", ask, sink, outcome)

    def _too_late(self, what: str, ask: Ask, sink: Sink, outcome: Outcome) -> None:
        if outcome.first_byte_seconds is not None:
            outcome.error = "request_timeout"
            sink.abort()
            return
        raise UpstreamTimeout(f"the request to {ask.profile.key} on node {self._node} {what}")

    async def _attempts(self, inbound: Inbound, ask: Ask, route: Route, sink: Sink, outcome: Outcome) -> None:
        while True:
            outcome.attempts += 1
            lease = self._dispatch.take(ask)
            if lease is None:
                lease = await self._wait_for_turn(ask, route, sink, again=outcome.attempts > 1)
            outcome.queued_seconds += lease.queued_seconds
            outcome.instance = lease.instance.id
            try:
                await self._exchange(lease, inbound, ask, route, sink, outcome)
                return
            except UpstreamBroken as error:
                await self._after_break(error, lease.instance, ask, sink, outcome)
                if outcome.first_byte_seconds is not None:
                    return

    async def _wait_for_turn(self, ask: Ask, route: Route, sink: Sink, *, again: bool) -> Lease:
        """Wait in the queue; a stream hears after a while, and again and again, what it waits for."""
        every = self._keepalive if ask.streams else math.inf
        with self._dispatch.join(ask, admitted=again) as ticket:
            while True:
                lease = await ticket.wait(every)
                if lease is not None:
                    return lease
                if not sink.started:
                    sink.start(200, [*_SSE_HEADERS, *self._own_headers(ask, 0.0)], length=None)
                await _write(sink, _keepalive(route, ticket.waiting_for))

    async def _exchange(
        self, lease: Lease, inbound: Inbound, ask: Ask, route: Route, sink: Sink, outcome: Outcome
    ) -> None:
        connection: UpstreamConnection | None = None
        complete = working = False
        try:
            connection = await lease.connect(fresh=outcome.attempts > 1)
            request = self._request(inbound, lease.instance, route)
            parts = inbound.body.parts()
            working = True
            try:
                await connection.send(request, parts)
                await self._read(connection, ask, sink, outcome)
            except UpstreamBroken as error:
                if error.started or not connection.served:
                    raise
                # It was closed under us before it took the request.
                connection.close()
                connection = None
                connection = await lease.connect(fresh=True)
                await connection.send(request, parts)
                await self._read(connection, ask, sink, outcome)
            while not connection.response.has_head:
                await self._read(connection, ask, sink, outcome)
            await self._pass_answer(connection, lease, inbound, ask, route, sink, outcome)
            complete = True
        except UpstreamBroken:
            working = False
            raise
        finally:
            lease.release(connection, complete=complete, working=working)

    async def _pass_answer(
        self,
        connection: UpstreamConnection,
        lease: Lease,
        inbound: Inbound,
        ask: Ask,
        route: Route,
        sink: Sink,
        outcome: Outcome,
    ) -> None:
        response = connection.response
        status = response.status
        if sink.started and status != 200:
            # The client has its 200 already, for the comments: the error travels as an event.
            await self._pass_late_error(connection, ask, sink, route, outcome)
            return
        outcome.status = status
        outcome.first_byte_seconds = trio.current_time() - inbound.started
        if not sink.started:
            headers = pass_back(response.headers)
            headers += self._own_headers(ask, lease.queued_seconds)
            if ask.streams:
                headers.append((b"x-accel-buffering", b"no"))
            sink.start(status, headers, length=response.length)
        scan = UsageScan(streams=ask.streams)
        feed, take, read = scan.feed, response.take, self._read
        try:
            while True:
                data = take()
                if data:
                    feed(data)
                if response.complete:
                    break
                if data:
                    await sink.write(data)
                else:
                    await sink.flush()
                await read(connection, ask, sink, outcome)
            await sink.finish(data)
        except OSError as error:
            raise ClientGone(str(error)) from error
        finally:
            outcome.usage = scan.result()

    async def _pass_late_error(
        self, connection: UpstreamConnection, ask: Ask, sink: Sink, route: Route, outcome: Outcome
    ) -> None:
        response = connection.response
        body = response.take()
        while not response.complete and len(body) < 65_536:
            await self._read(connection, ask, sink, outcome)
            body += response.take()
        outcome.status = response.status
        outcome.error = "upstream_error"
        try:
            document = msgspec.json.decode(body)
            error = document["error"]
        except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
            message = f"{ask.profile.key} on node {self._node} answered with status {response.status}"
            document = UpstreamError(message).document()
            error = document["error"]
        await finish_with_event(sink, route, {"error": error})

    async def _read(self, connection: UpstreamConnection, ask: Ask, sink: Sink, outcome: Outcome) -> None:
        if not self._silence_ms:
            await connection.read()
            return
        with trio.move_on_after(self._silence_ms / 1000) as scope:
            await connection.read()
        if scope.cancelled_caught:
            what = f"was silent for upstream_read_timeout_ms ({self._silence_ms} ms)"
            self._too_late(what, ask, sink, outcome)
            raise UpstreamBroken(what, started=True)

    async def _after_break(
        self, error: UpstreamBroken, instance: Instance, ask: Ask, sink: Sink, outcome: Outcome
    ) -> None:
        """Return to try again (or, when the answer had begun, to give up). Raises UpstreamError."""
        if instance.state is not State.GONE:
            with trio.move_on_after(_REAP_SECONDS):
                await instance.wait_gone()
        why = str(instance.failure or error)
        if instance.end_reason == "given up":
            # It took very long to find out; another instance would hang on it just the same.
            outcome.attempts = _MAX_ATTEMPTS
        log.warning("upstream broke", instance=instance.id, error=why, attempt=outcome.attempts)
        if outcome.first_byte_seconds is not None:
            outcome.error = outcome.error or "cut"
            sink.abort()
            return
        if outcome.attempts >= _MAX_ATTEMPTS:
            raise UpstreamError(
                f"{ask.profile.key} on node {self._node} broke before it answered, twice: {why}",
                param="model",
            ) from error

    def _request(self, inbound: Inbound, instance: Instance, route: Route) -> bytes:
        target = route.upstream + b"?" + inbound.query if inbound.query else route.upstream
        return upstream_request(
            target,
            inbound.headers,
            host=b"llamesh",
            authorization=instance.authorization,
            length=inbound.body.length,
            id=inbound.request_id,
            key_header=self._key_header,
        )

    def _own_headers(self, ask: Ask, queued_seconds: float) -> Headers:
        return [
            (b"x-request-id", ask.request_id.encode()),
            (b"x-llamesh-node", self._node_header),
            (b"x-llamesh-profile", ask.profile.key.encode()),
            (b"x-llamesh-queue-ms", b"%d" % round(queued_seconds * 1000)),
            (b"x-llamesh-affinity", b"off"),
        ]


async def finish_with_event(sink: Sink, route: Route, document: dict[str, object]) -> None:
    """End a stream that has started with an error event in the route's dialect. Raises ClientGone."""
    if route.dialect == "anthropic":
        error = document["error"]
        body = msgspec.json.encode({"type": "error", "error": error})
        data = b"event: error\ndata: " + body + b"\n\n"
    else:
        data = b"data: " + msgspec.json.encode(document) + b"\n\n"
    try:
        await sink.finish(data)
    except OSError as error:
        raise ClientGone(str(error)) from error


async def _write(sink: Sink, data: bytes) -> None:
    try:
        await sink.write(data)
    except OSError as error:
        raise ClientGone(str(error)) from error


def _keepalive(route: Route, waiting_for: str) -> bytes:
    if route.dialect == "anthropic":
        return b'event: ping\ndata: {"type": "ping"}\n\n'
    return b": " + waiting_for.replace("\n", " ").replace("\r", " ").encode() + b"\n\n"
