"""The routes of the state API, and what peers ask about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import trio
from quart import Response, request
from quart_trio import QuartTrio

from llamesh.errors import CancelledByOperator, Forbidden, InvalidRequest, NotFound
from llamesh.telemetry.logs import get_logger
from llamesh.web.access import Access
from llamesh.web.direct import Call, only_get
from llamesh.web.history import Sample, sum_up
from llamesh.web.mesh_state import (
    CANCEL,
    HISTORY,
    REQUEST,
    STATE,
    MeshRoute,
    PeerStates,
    Samples,
    Told,
    Wanted,
)
from llamesh.web.requests import unix_offset
from llamesh.web.state import OwnState
from llamesh.web.state_merge import Other, joined, merge
from llamesh.web.state_schema import Document, Request
from llamesh.web.state_stream import StateStream

log = get_logger("state")

_MOST_LISTED = 10_000
_LISTED = 100


class StateApi:
    """The state of the node and, where there is a mesh, of all nodes. `peers` is set by it."""

    def __init__(self, own: OwnState, access: Access) -> None:
        self.own = own
        self.peers: PeerStates | None = None
        self.stream = StateStream(self.document)
        self._access = access

    async def run(self) -> None:
        """What goes on all the time."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.own.ring.run)
            nursery.start_soon(self.stream.run)

    def join(self, peers: PeerStates) -> None:
        """There is a mesh: what its nodes say of themselves belongs to the state."""
        self.peers = peers
        self.own.findings = peers.findings

    # Questions.

    async def document(self) -> Document:
        """`GET /api/v1/state`."""
        await self.own.look()
        rings: list[Iterable[Sample]] = [self.own.ring.samples]
        others: list[Other] = []
        if self.peers is not None:
            await self.peers.refresh()
            others = list(self.peers.others())
            rings += self.peers.rings()
        now = time.time()
        return merge(self.own.part(), others, sum_up(rings, now), now)

    def requests(self, most: int, *, model: str = "", failed: bool = False) -> list[Request]:
        """Requests of this node: those under way, then those that ended, the newest first."""
        offset, found = unix_offset(), list[Request]()
        recorder = self.own.recorder
        for record in (*reversed(recorder.live.values()), *recorder.ended()):
            if len(found) >= most:
                break
            if (model and record.model != model) or (failed and not record.error and record.status < 400):
                continue
            found.append(self.own.request(record, offset))
        return found

    async def request(self, id: str) -> dict[str, Any]:  # noqa: A002
        """One request: what all nodes know of it, and the record of each. Raises NotFound."""
        records = self._records(id)
        if self.peers is not None:
            # Where it went to or came from, or anybody, when this node never saw it.
            nodes = frozenset(node for one in records for node in one.via) if records else None
            if nodes is None or nodes - {self.own.node_id}:
                records += await self.peers.records(id, nodes)
        if not records:
            raise NotFound(
                f"no node knows a request {id[:128]!r}: the last {_MOST_LISTED:,} of each are kept, see "
                "GET /api/v1/requests"
            )
        document: dict[str, Any] = msgspec.to_builtins(joined(records))
        return {**document, "records": [msgspec.to_builtins(one) for one in records]}

    def _records(self, id: str) -> list[Request]:  # noqa: A002
        record = self.own.recorder.find(id)
        return [] if record is None else [self.own.request(record, unix_offset())]

    # Acts.

    async def cancel(self, document: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """`POST /admin/cancel {"request_id"}`: the client gets an error or a cut, the slot is free."""
        id = document.get("request_id")  # noqa: A001
        if not isinstance(id, str) or not id:
            raise InvalidRequest("`request_id` must be the id of a running request", param="request_id")
        node = self.own.node_id if self._cancel(id, "an operator") else ""
        if not node and self.peers is not None:
            node = await self.peers.cancel(id)
        if not node:
            raise NotFound(f"no request {id[:128]!r} is under way", param="request_id")
        return 200, {"cancelled": id, "node": node}

    def _cancel(self, id: str, who: str) -> bool:  # noqa: A002
        done = self.own.recorder.cancel(
            id, CancelledByOperator(f"{who} of node {self.own.node_id} cancelled this request")
        )
        if done:
            log.info("cancelled on request", request_id=id)
        return done

    # For peers.

    def mesh_routes(self) -> Mapping[str, MeshRoute]:
        """What peers may ask. They are nodes of the same mesh, and their operators were let in there."""

        async def state(peer: str, body: bytes) -> tuple[int, bytes]:
            await self.own.look()
            return 200, msgspec.json.encode(self.own.part())

        async def history(peer: str, body: bytes) -> tuple[int, bytes]:
            return 200, msgspec.json.encode(Samples(list(self.own.ring.samples)))

        async def cancel(peer: str, body: bytes) -> tuple[int, bytes]:
            id = _wanted(body)  # noqa: A001
            record = self.own.recorder.live.get(id)
            if record is not None and record.origin != peer and not self.own.accepts_administration:
                raise Forbidden(
                    f"node {self.own.node_id} takes no administration from other nodes "
                    "(cluster.accept_administration is false there); ask that node itself"
                )
            done = self._cancel(id, f"an operator at node {peer}, by way")
            return (200 if done else 404), b"{}"

        async def request(peer: str, body: bytes) -> tuple[int, bytes]:
            return 200, msgspec.json.encode(Told(self._records(_wanted(body))))

        return {STATE: state, HISTORY: history, CANCEL: cancel, REQUEST: request}


class StreamHandler:
    """`GET /api/v1/state/stream`, see `web.direct`."""

    def __init__(self, stream: StateStream, access: Access) -> None:
        self._stream = stream
        self._access = access

    def admit(self, call: Call) -> None:
        """A key, as for the state."""
        only_get(call)
        self._access.check_private(call.headers)

    async def run(self, call: Call) -> None:
        """Until the viewer leaves."""
        last = call.header(b"last-event-id") or call.arguments().get("last_event_id", "")
        await self._stream.serve(call.sink, last, call.sink.abort, [])


def add_state_routes(app: QuartTrio, api: StateApi, check: Callable[[], object]) -> None:
    """`check` raises LlameshError unless the caller of the present request may see the state."""

    @app.get("/api/v1/state")
    async def state() -> Response:
        check()
        return _answer(await api.document())

    @app.get("/api/v1/requests")
    async def requests() -> Response:
        check()
        found = api.requests(
            _number("limit", _LISTED, _MOST_LISTED),
            model=request.args.get("model", ""),
            failed=request.args.get("failed", "") in ("1", "true"),
        )
        return _answer({"requests": found})

    @app.get("/api/v1/requests/<path:id>")
    async def one_request(id: str) -> Response:  # noqa: A002
        check()
        return _answer(await api.request(id))

    @app.get("/api/v1/events")
    async def events() -> Response:
        check()
        return _answer(
            {"events": api.own.events(_number("limit", _LISTED, 1000), after=_number("after", 0, 1 << 53))}
        )


def _number(name: str, default: int, most: int) -> int:
    text = request.args.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 16:
        raise InvalidRequest(f"`{name}` must be a number, at most {most}", param=name)
    return min(int(text), most)


def _answer(document: Any) -> Response:
    return Response(msgspec.json.encode(document), content_type="application/json")


def _wanted(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=Wanted).request_id
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"not a question about a request: {error}") from None
