"""The server of peers' connections: two whole nodes in one process, one asks the other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.core.offers import Situation
from llamesh.errors import InvalidRequest
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.net.exchange import UpstreamBroken, UpstreamConnection
from llamesh.web.peer_connection import MeshRoutes, PeerConnection
from tests.mesh.noise_pairs import open_pair
from tests.support.neighbours import (
    Answer,
    Far,
    Neighbourhood,
    Part,
    ServePeers,
    Talk,
    answers,
    chat,
    is_silent,
    neighbourhood,
)
from tests.support.scripted import Play, profile

KEY = "m:default"
M = profile()


@asynccontextmanager
async def two(
    part: Part = answers, play: Play | None = None, **settings: Any
) -> AsyncIterator[tuple[Neighbourhood, Neighbourhood, ServePeers]]:
    """a, which has no models, and b, which has "m", whose instances act `part`."""
    async with (
        neighbourhood({"m": [play or Play(load=0)]}, [M], node="b", **settings) as b,
        neighbourhood(**settings) as a,
    ):
        b.parts[KEY] = part
        a.peer("b", KEY)
        serving = ServePeers(b, "node-a")
        a.far["b"] = Far("b", cast(Part, serving))
        try:
            yield a, b, serving
        finally:
            for peer in a.peers:
                peer.links.close_all()


async def test_an_answer_from_afar(autojump_clock: MockClock) -> None:
    async def listens(talk: Talk) -> None:
        await talk.request()
        assert not [name for name in talk.headers if name.startswith(("x-llamesh", "x-llama-mesh"))]
        await talk.answer(200, b'{"far":1}', "x-custom: 1")

    async with two(listens) as (a, b, serving):
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.body) == (200, b'{"far":1}')
        assert answer.headers["x-llamesh-node"] == "b"
        assert answer.headers["x-llamesh-profile"] == KEY
        assert answer.headers["x-request-id"] == "the-id"
        assert answer.headers["x-custom"] == "1"
        assert "x-llamesh-load" not in answer.headers
        # The reply said how busy it is, without ourselves.
        assert a.peers.of("b").situation(KEY) == Situation(slots=1, room_ms=None)
        assert not b.router.requests
        assert serving.open == 1


async def test_the_entrys_name_for_it_travels(autojump_clock: MockClock) -> None:
    async with two(default_model="m") as (a, _, _serving):
        for body in ({"messages": []}, chat("M:DEFAULT")):
            answer = await a.ask(body)
            assert (answer.status, answer.headers["x-llamesh-node"]) == (200, "b")


async def test_waiting_is_told_each_second(autojump_clock: MockClock) -> None:
    """The peer says what for, the client's node tells its client, and nobody takes it for silence."""
    async with two(
        play=Play(load=30), upstream_read_timeout_ms=5000, http={"stream_keepalive_seconds": 8}
    ) as (a, _, _serving):
        answer = await a.ask(chat("m", stream=True))
        comments = answer.body.split(b"\n\n")
        assert comments[-1] == b'{"ok":true}'
        assert all(b": loading m:default for" in one for one in comments[1:-1])
        assert len(comments) >= 4
        assert answer.headers["x-llamesh-node"] == "node-a"  # said before anybody served


async def test_a_taken_request_is_said_to_be_worked_on(autojump_clock: MockClock) -> None:
    async def thinks(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(25)
        await talk.answer()

    async with two(thinks, play=Play(load=2), http={"stream_keepalive_seconds": 10}) as (a, _, _serving):
        answer = await a.ask(chat("m", stream=True))
        assert b": working\n\n" in answer.body
        assert b"ahead" not in answer.body


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["loading", "before the head", "streaming"])
async def test_a_client_that_leaves_frees_the_far_node(
    phase: str, stream: bool, autojump_clock: MockClock
) -> None:
    async def streams(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        await talk.chunk(b"data: 1\n\n")
        await talk.gone()

    part = streams if phase == "streaming" else is_silent
    async with two(part, Play(load=1000 if phase == "loading" else 0, work=0)) as (a, b, serving):
        answer = Answer()
        with trio.CancelScope() as scope:
            a.nursery.start_soon(_leave_after, 5, scope)
            await a.ask(chat("m", stream=stream), answer)
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        await trio.sleep(0.5)
        assert (serving.open, b.here.dispatch.queue_length()) == (0, 0)
        assert not b.router.requests
        b.assert_nothing_left()
        if stream:
            assert all(one.busy_slots == 0 for one in b.here.pool.all())
        await trio.sleep(10)
        assert all(one.busy_slots == 0 for one in b.here.pool.all())


async def _leave_after(seconds: float, scope: trio.CancelScope) -> None:
    await trio.sleep(seconds)
    scope.cancel()


async def test_the_deadline_travels(autojump_clock: MockClock) -> None:
    async with two(is_silent) as (a, b, _serving):
        a.here.current.settings = a.here.current.settings.model_copy(
            update={"model_defaults": a.here.current.settings.model_defaults.model_copy(
                update={"max_request_duration_ms": 7000}
            )}
        )  # fmt: skip
        a.gateway.apply_settings()
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.error["type"]) == (504, "request_timeout")
        assert trio.current_time() == pytest.approx(7, abs=0.2)
        await trio.sleep(0.5)
        b.assert_nothing_left()


async def test_two_instances_in_the_whole_mesh(autojump_clock: MockClock) -> None:
    """The far node breaks one, and what it would start next never comes up: the entry hears of the one."""
    async with two() as (a, b, _serving):
        kills = {"count": 0}

        async def dies(talk: Talk) -> None:
            await talk.request()
            kills["count"] += 1
            b.here.instance(M).crash.set()

        b.parts[KEY] = dies
        a.peer("c", KEY, others=90)
        heard: list[dict[str, str]] = []

        async def listens(talk: Talk) -> None:
            await talk.request()
            heard.append(talk.headers)
            await talk.answer()

        a.far["c"].part = listens
        b.here.stage.plays[KEY] = [Play(load=0), Play(load=0, fails=True)]
        answer = await a.ask(chat("m"))
        assert answer.status == 200
        assert kills["count"] == 1
        assert heard[0]["x-llamesh-attempt"] == "1"


async def test_embeddings_that_are_others_by_now(autojump_clock: MockClock) -> None:
    """Its cookbook was changed, and the news of it is on the way."""
    embed = profile("e", kind="embedding")
    async with neighbourhood({}, [embed], node="b") as b, neighbourhood() as a:
        a.peer("b", "e:default", kind="embedding", fingerprint="as it was")
        a.far["b"].part = cast(Part, ServePeers(b, "node-a"))
        answer = await a.ask({"model": "e", "input": "x"}, path=b"/v1/embeddings")
        assert (answer.status, answer.error["type"]) == (404, "model_not_found")
        a.peer("b", "e:default", kind="embedding", fingerprint=b.router.fingerprint(embed))
        a.far["b"].part = cast(Part, ServePeers(b, "node-a"))
        answer = await a.ask({"model": "e", "input": "x"}, path=b"/v1/embeddings")
        assert answer.status == 200
        for peer in a.peers:
            peer.links.close_all()


# The connection itself, over a real encrypted stream.


class Served:
    """A connection of "node-a" at a node, and its other end."""

    def __init__(self, ours: NoiseTransport, connection: PeerConnection) -> None:
        self.ours = ours
        self.up = UpstreamConnection(ours)
        self.connection = connection
        self.ended = trio.Event()

    async def run(self) -> None:
        await self.connection.run()
        self.ended.set()

    async def ask(self, data: bytes) -> tuple[int, bytes]:
        await self.up.send(data)
        await self.up.read()
        while not self.up.response.complete:
            await self.up.read()
        return self.up.response.status, self.up.response.take()


@asynccontextmanager
async def served(routes: MeshRoutes, **more: Any) -> AsyncIterator[Served]:
    async with neighbourhood({}, [M]) as b:
        ours, theirs = await open_pair()
        connection = PeerConnection(theirs, b.lane, "node-a", routes, **{"idle_seconds": 60.0, **more})
        found = Served(ours, connection)
        b.nursery.start_soon(found.run)
        try:
            yield found
        finally:
            ours.close()
            with trio.fail_after(20):
                await found.ended.wait()


async def echo(peer: str, method: bytes, path: bytes, body: bytes) -> tuple[int, bytes] | None:
    if path == b"/mesh/nothing":
        return None
    if path == b"/mesh/wrong":
        raise InvalidRequest("that is wrong")
    return 200, b"%b %b %b %d" % (peer.encode(), method, path, len(body))


def request(path: str, body: bytes = b"", method: str = "POST", *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def test_the_meshs_own_routes() -> None:
    async with served(echo) as one:
        assert await one.ask(request("/mesh/probe", method="GET")) == (200, b"node-a GET /mesh/probe 0")
        assert await one.ask(request("/mesh/gossip", b"x" * 99_999)) == (
            200,
            b"node-a POST /mesh/gossip 99999",
        )
        status, body = await one.ask(request("/mesh/nothing"))
        assert (status, b"not_found" in body) == (404, True)
        status, body = await one.ask(request("/mesh/wrong"))
        assert (status, b"that is wrong" in body) == (400, True)
        assert one.up.reusable


async def test_first_requests_are_told() -> None:
    told: list[bool] = []
    async with served(echo, on_request=lambda: told.append(True)) as one:
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert told == []
        for _ in range(2):
            assert (await one.ask(request("/mesh/probe", method="GET")))[0] == 200
        assert told == [True]


@pytest.mark.parametrize(
    "data",
    [
        request("/mesh/gossip", method="POST").replace(b"content-length: 0", b"content-length: 99999999"),
        request("/mesh/gossip").replace(b"content-length: 0", b"transfer-encoding: chunked")
        + b"5\r\nabcde\r\n",
    ],
    ids=["long", "chunked"],
)
async def test_a_message_has_a_length_and_a_limit(data: bytes) -> None:
    async with served(echo) as one:
        status, body = await one.ask(data)
        assert (status, b"request_too_large" in body) == (413, True)
        await one.ended.wait()


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\0llamesh",
    ],
)
async def test_what_is_no_request(data: bytes) -> None:
    async with served(echo) as one:
        status, _ = await one.ask(data)
        assert status in (400, 404)
        await one.ended.wait()


@pytest.mark.parametrize(
    "header",
    ["x-llamesh-via: a b", "x-llamesh-deadline-ms: soon", "x-llama-mesh-hops: 999", "x-llamesh-attempt: -1"],
)
async def test_routing_headers_are_read_strictly(header: str) -> None:
    async with served(echo) as one:
        status, body = await one.ask(request("/v1/chat/completions", b"{}", "POST", header))
        assert (status, b"invalid_request_error" in body) == (400, True)


async def test_no_key_is_asked_of_peers(autojump_clock: MockClock) -> None:
    async with neighbourhood({}, [M], auth={"enabled": True, "allowed_keys": ["k"]}) as b:
        ours, theirs = await open_pair()
        one = Served(ours, PeerConnection(theirs, b.lane, "node-a", echo, idle_seconds=60.0))
        b.nursery.start_soon(one.run)
        status, _ = await one.ask(request("/v1/chat/completions", b'{"model":"m"}'))
        assert status == 200
        ours.close()
        await one.ended.wait()


async def test_an_idle_connection_is_closed(autojump_clock: MockClock) -> None:
    async with served(echo) as one:
        await one.ask(request("/mesh/probe", method="GET"))
        begun = trio.current_time()
        with pytest.raises(UpstreamBroken):
            await one.up.read()
        assert 60 <= trio.current_time() - begun < 63


async def test_a_long_answer_of_the_mesh_isnt_cut(autojump_clock: MockClock) -> None:
    """As of a prewarm, which takes as long as a model takes to load; unless its asker leaves."""
    left = trio.Event()

    async def slow(peer: str, method: bytes, path: bytes, body: bytes) -> tuple[int, bytes]:
        try:
            await trio.sleep(500)
        finally:
            left.set()
        return 200, b"{}"

    async with served(slow) as one:
        # The body comes on its own, so its reading had a limit.
        await one.ours.send(
            request("/mesh/prewarm", b"")[:-4].replace(b"length: 0", b"length: 5") + b"\r\n\r\n"
        )
        await trio.sleep(1)
        assert (await one.ask(b"12345"))[0] == 200
        assert trio.current_time() > 500
        left = trio.Event()
        await one.up.send(request("/mesh/prewarm"))
        await trio.sleep(1)
        one.ours.close()
        with trio.fail_after(5):
            await left.wait()


async def test_what_it_waits_for_is_printable(autojump_clock: MockClock) -> None:
    """Anything else in a header would look like a breakdown."""
    async with neighbourhood({"m": [Play(load=5)]}, [M]) as b:
        ours, theirs = await open_pair()
        connection = PeerConnection(theirs, b.lane, "node-a", echo, idle_seconds=60.0)
        one = Served(ours, connection)
        b.nursery.start_soon(one.run)
        heard: list[bytes] = []
        one.up.on_interim = lambda status, headers: heard.extend(value for _, value in headers)
        await one.up.send(request("/v1/chat/completions", b'{"model":"m"}'))
        while (inbound := connection._inbound) is None or "loading" not in inbound.waiting_for():
            await trio.sleep(0.01)
        inbound.waiting_for = lambda: "\x00a\r\nb\x7f\tö" + "x" * 500
        while not one.up.response.complete:
            await one.up.read()
        # The last one may be of the moment between the load and the answer.
        assert any(value.startswith(b"a  b  ?xxx") for value in heard)
        ours.close()
        await one.ended.wait()
