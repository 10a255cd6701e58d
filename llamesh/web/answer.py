"""The way back of an inference request: an upstream's answer, or an error, through a sink."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec
import trio

from llamesh.dispatch.lease import AT_HOME, AnyLease, Ask, Lease, Travel
from llamesh.errors import UpstreamError
from llamesh.net.exchange import Headers, UpstreamConnection
from llamesh.telemetry.recorder import Record
from llamesh.telemetry.stats import Usage
from llamesh.web.body import Body
from llamesh.web.caller import ANYBODY, Caller
from llamesh.web.headers import pass_back
from llamesh.web.openai import Route
from llamesh.web.sink import Sink
from llamesh.web.usage import StreamScan, UsageScan

SSE_HEADERS: Headers = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

# Of an upstream's error that comes when the client has its 200 already.
_LATE_ERROR_BYTES = 65_536


def working() -> str:
    """What a request waits for that an instance has taken."""
    return "working"


@dataclass(slots=True)
class Inbound:
    """A request as a lane read it. `query`: without the question mark; `started`: trio's time.

    `travel`: how it came through the mesh; `waiting_for()`: what it waits for now, for people;
    `caller`: whose key it has; `told`: headers that its answer gets besides, whatever it is; `address`: of
    the connection's other end, where somebody wants to know it; `answers`: how many it asks for.
    """

    path: bytes
    query: bytes
    headers: Headers
    body: Body
    request_id: str
    started: float
    travel: Travel = AT_HOME
    caller: Caller = ANYBODY
    told: Headers | None = None
    waiting_for: Callable[[], str] = working
    address: str = ""
    answers: int = 1


@dataclass(slots=True)
class Outcome:
    """What became of a request; filled as it goes, so that it is right whenever it ends.

    record: what people are shown of it, while it goes and afterwards.
    """

    record: Record
    status: int = 0
    instance: str = ""  # or the peer
    node: str = ""  # that served it, as the client is told
    queued_seconds: float = 0.0
    first_byte_seconds: float | None = None
    scan: StreamScan | None = None  # of an answer that streams
    attempts: int = 0
    error: str = ""  # an error's type, "cut" or "cancelled"; empty for an answer that was relayed whole
    retries: tuple[str, ...] = ()  # why forwards came to nothing: an error's type, or "lost"
    usage: Usage = field(default_factory=Usage)


@dataclass(slots=True)
class Job:
    """One request on its way. `broken`: instances that broke on it, here or at those it came from; `lost`:
    peers that went away with it; `deadline`: trio's time; `spoke`: when its client last heard from us;
    `heard`: when its upstream did something last; `unreached`: nodes that couldn't be connected with.
    """

    inbound: Inbound
    ask: Ask
    route: Route
    sink: Sink
    outcome: Outcome
    broken: int = 0
    lost: int = 0
    deadline: float = math.inf
    spoke: float = 0.0
    heard: float = 0.0
    unreached: set[str] = field(default_factory=set)

    def exclude(self, node: str) -> None:
        """Don't ask that peer again for this request."""
        self.ask = replace(self.ask, excluded=self.ask.excluded | {node})

    def avoid(self, node: str, *, had_it: bool) -> None:
        """A peer was lost. Behind one that couldn't be dialled, and so never had the request, there may be
        another way to the same place: only the second time it isn't asked again."""
        if had_it or node in self.unreached:
            self.exclude(node)
        self.unreached.add(node)

    def hear_progress(self, status: int, headers: Headers) -> None:
        """An interim response of a peer: what it is waiting for."""
        for name, value in headers:
            if name == b"x-llamesh-waiting-for":
                self.inbound.waiting_for = partial(str, value[:200].decode("latin-1"))


class ClientGone(Exception):
    """Writing to the client failed: nothing more to do for it."""


async def pass_answer(
    connection: UpstreamConnection, job: Job, own: Headers, read: Callable[[], Awaitable[None]]
) -> None:
    """Hand on an answer whose head has come, piece by piece. `own`: headers of this node; `read`: one read.

    Raises ClientGone, and whatever `read` raises.
    """
    response, sink, outcome, ask = connection.response, job.sink, job.outcome, job.ask
    status = response.status
    if sink.started and status != 200:
        # The client has its 200 already, for the comments: the error travels as an event.
        await _pass_late_error(connection, job, read)
        return
    outcome.status = status
    outcome.first_byte_seconds = trio.current_time() - job.inbound.started
    if not sink.started:
        headers = pass_back(response.headers)
        headers += own
        if ask.streams:
            headers.append((b"x-accel-buffering", b"no"))
        sink.start(status, headers, length=response.length)
    scan: UsageScan
    if ask.streams:
        scan = outcome.scan = StreamScan(outcome.first_byte_seconds)
    else:
        scan = UsageScan()
    outcome.record.count = scan
    outcome.record.phase = "decode"
    feed, take = scan.feed, response.take
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
            await read()
        await sink.finish(data)
    except OSError as error:
        raise ClientGone(str(error)) from error
    finally:
        outcome.usage = scan.result()


async def _pass_late_error(
    connection: UpstreamConnection, job: Job, read: Callable[[], Awaitable[None]]
) -> None:
    response, outcome = connection.response, job.outcome
    body = response.take()
    while not response.complete and len(body) < _LATE_ERROR_BYTES:
        await read()
        body += response.take()
    outcome.status = response.status
    outcome.error = "upstream_error"
    try:
        error = msgspec.json.decode(body)["error"]
    except (msgspec.MsgspecError, UnicodeDecodeError, KeyError, TypeError):
        message = f"{job.ask.profile.key} on {outcome.instance} answered with status {response.status}"
        error = UpstreamError(message).document()["error"]
    await finish_with_event(job.sink, job.route, {"error": error})


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


async def write(sink: Sink, data: bytes) -> None:
    """A piece of a stream. Raises ClientGone."""
    try:
        await sink.write(data)
    except OSError as error:
        raise ClientGone(str(error)) from error


def keepalive(route: Route, waiting_for: str) -> bytes:
    """A sign of life in a stream that hasn't begun, in the route's dialect."""
    if route.dialect == "anthropic":
        return b'event: ping\ndata: {"type": "ping"}\n\n'
    return b": " + waiting_for.replace("\n", " ").replace("\r", " ").encode() + b"\n\n"


def note_place(record: Record, lease: AnyLease) -> None:
    """For people: where the request is now."""
    if isinstance(lease, Lease):
        record.phase, record.instance, record.peer = "prefill", lease.instance.id, ""
    else:
        record.phase, record.instance, record.peer = "forwarded", "", lease.node
