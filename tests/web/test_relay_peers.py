"""Requests that go to a peer: what travels, what comes back, and everything that a peer can do wrong."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.config.cookbook import Profile
from llamesh.core.breaker import State
from llamesh.core.offers import Situation, encode
from llamesh.dispatch.lease import Travel
from tests.support.neighbours import (
    Answer,
    Talk,
    answers,
    chat,
    cut_at_once,
    neighbourhood,
    refuse,
    say,
)
from tests.support.scripted import Play, profile

KEY = "m:default"
M = profile()
COMMENTS = {"http": {"stream_keepalive_seconds": 10}}


# What travels.


async def test_what_a_peer_is_told(autojump_clock: MockClock) -> None:
    """The request as it came, without the client's keys and whatever the client made up about routing."""
    heard: list[Talk] = []

    async def listens(talk: Talk) -> None:
        await talk.request()
        heard.append(talk)
        await talk.answer()
        await talk.gone()

    limits = {"model_defaults": {"max_request_duration_ms": 9000}, "auth": {"required_header": "x-node-key"}}
    async with neighbourhood(**limits) as a:
        a.peer("b", "M:Default", part=listens)
        body = msgspec.json.encode(chat("M", words="ä"))
        answer = await a.ask(
            body,
            headers=[
                (b"authorization", b"Bearer secret-1"),
                (b"x-api-key", b"secret-2"),
                (b"x-node-key", b"secret-3"),
                (b"cookie", b"secret-4"),
                (b"x-llamesh-via", b"b"),
                (b"x-llamesh-attempt", b"7"),
                (b"x-llamesh-deadline-ms", b"1"),
                (b"x-llamesh-max-wait-ms", b"1"),
                (b"x-llamesh-model", b"other"),
                (b"x-llamesh-fingerprint", b"other"),
                (b"x-llama-mesh-hops", b"3"),
                (b"x-session-id", b"s1"),
            ],
        )
        assert answer.status == 200
        [talk] = heard
        assert talk.body == body
        assert b"secret" not in talk.head
        assert talk.head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
        told = talk.headers
        assert (told["x-request-id"], told["x-session-id"]) == ("the-id", "s1")
        assert told["content-length"] == str(len(body))
        assert {
            name: value for name, value in told.items() if name.startswith(("x-llamesh", "x-llama-m"))
        } == {
            "x-llama-mesh-hops": "1",
            "x-llamesh-via": "node-a",
            "x-llamesh-deadline-ms": "9000",
            "x-llamesh-model": "M:Default",
        }


async def test_what_is_told_of_other_choices(autojump_clock: MockClock) -> None:
    """How long it may wait there, where another place would then be better; never the body's model alone."""
    heard: list[dict[str, str]] = []

    async def listens(talk: Talk) -> None:
        while True:
            await talk.request()
            heard.append(talk.headers)
            await talk.answer()

    async with neighbourhood(default_model="m") as a:
        a.peer("b", KEY, part=listens)
        a.peer("c", KEY, part=listens, others=5)
        await a.ask({"messages": []})
        travel = Travel("z", hops=2, via=("y", "z"), attempt=1, deadline_ms=5000.0)
        await a.ask(chat("alias of y"), travel=replace(travel, model="m:default"))
        assert 100 <= int(heard[0]["x-llamesh-max-wait-ms"]) < 20_000
        assert heard[0]["x-llamesh-model"] == heard[1]["x-llamesh-model"] == KEY
        assert heard[1]["x-llama-mesh-hops"] == "3"
        assert heard[1]["x-llamesh-via"] == "y,z,node-a"
        assert heard[1]["x-llamesh-attempt"] == "1"
        assert int(heard[1]["x-llamesh-deadline-ms"]) <= 5000


# What comes back.


@pytest.mark.parametrize("status", [200, 400, 404, 413, 422, 429, 500, 501, 503])
async def test_the_far_llama_servers_answers_pass_untouched(status: int, autojump_clock: MockClock) -> None:
    """Its errors, too; and of the peer's headers only those that are its to say."""
    body = b'{"error": "as it came"}'
    told = (
        "retry-after: 7",
        "x-custom: 1",
        "x-llamesh-node: b",
        "x-llamesh-profile: nonsense:x",
        "x-llamesh-queue-ms: 40",
        "x-llamesh-affinity: hit",
        "x-llamesh-load: {}",
        "x-llamesh-secret: 1",
        "x-llama-mesh-hops: 4",
        "server: llama.cpp",
        "access-control-allow-origin: *",
    )
    async with neighbourhood() as a:
        a.peer("b", KEY, part=say(*told, status=status, body=body))
        a.peer("c", KEY, part=answers, others=50)
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.body, answer.finished) == (status, body, True)
        assert answer.headers == {
            "retry-after": "7",
            "x-custom": "1",
            "x-request-id": "the-id",
            "x-llamesh-node": "b",
            "x-llamesh-profile": KEY,
            "x-llamesh-queue-ms": "40",
            "x-llamesh-affinity": "hit",
        }
        assert a.far["c"].dials == 0
        peer = a.peers.get("b")
        assert peer is not None
        assert (peer.lost, peer.breaker.state, len(peer.links)) == (0, State.CLOSED, 1)


async def test_a_stream_passes_as_it_comes(autojump_clock: MockClock) -> None:
    async def streams(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        for number in range(3):
            await trio.sleep(1)
            await talk.chunk(b"data: %d\n\n" % number)
        await talk.send(b"0\r\n\r\n")
        await talk.gone()

    async with neighbourhood() as a:
        a.peer("b", KEY, part=streams)
        answer = Answer()
        a.nursery.start_soon(a.ask, chat("m", stream=True), answer)
        await answer.until(b"data: 0")
        assert trio.current_time() == pytest.approx(1, abs=0.1)
        assert answer.body == b"data: 0\n\n"
        await answer.until(b"data: 2")
        await trio.testing.wait_all_tasks_blocked()
        assert answer.finished
        assert answer.headers["x-accel-buffering"] == "no"


# Refusals.


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("queue_full", 503), ("queue_timeout", 503), ("no_capacity", 503), ("draining", 503),
        ("spawn_failures_exhausted", 503), ("model_not_found", 404),
    ],
)  # fmt: skip
async def test_who_refuses_before_it_began_is_passed_over(
    kind: str, status: int, autojump_clock: MockClock
) -> None:
    bodies: list[bytes] = []

    async def listens(talk: Talk) -> None:
        await talk.request()
        bodies.append(talk.body)
        await talk.answer()
        await talk.gone()

    sent = chat("m", words="x" * 200_000)
    async with neighbourhood() as a:
        b = a.peer("b", KEY, part=refuse(kind, status=status))
        a.peer("c", KEY, part=listens, others=3)
        answer = await a.ask(sent)
        assert answer.status == 200
        assert bodies == [msgspec.json.encode(sent)]
        # It did its part: the connection is kept, and no breaker counts that.
        assert (b.lost, b.links.idle) == (0, 1)


async def test_the_last_refusal_is_the_answer(autojump_clock: MockClock) -> None:
    """The peer's own word, with its status: it is nearer to the cause than that nobody else is left."""
    async with neighbourhood() as a:
        a.peer("b", KEY, part=refuse("queue_full", message="b is full"))
        a.peer("c", KEY, part=refuse("model_not_found", message="c has it no more", status=404), others=3)
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.error["type"]) == (404, "model_not_found")
        assert answer.error["message"] == "c has it no more"
        assert answer.headers["x-llamesh-node"] == "node-a"


async def test_what_a_node_says_for_others_reasons_is_an_answer(autojump_clock: MockClock) -> None:
    """A wrong request is as wrong at the next peer, and so is one that killed two instances."""
    for kind, status in (("invalid_request_error", 400), ("upstream_error", 502), ("request_timeout", 504)):
        async with neighbourhood() as a:
            a.peer("b", KEY, part=refuse(kind, status=status))
            a.peer("c", KEY, others=5)
            answer = await a.ask(chat("m"))
            assert (answer.status, answer.error["type"]) == (status, kind)
            assert a.far["c"].dials == 0


async def test_a_refusal_says_how_busy_it_is(autojump_clock: MockClock) -> None:
    busy = Situation(slots=1, others=30)
    async with neighbourhood() as a:
        b = a.peer("b", KEY, part=refuse("queue_full", f"x-llamesh-load: {encode(busy).decode()}"))
        a.peer("c", KEY, others=2)
        assert (await a.ask(chat("m"))).status == 200
        assert b.situation(KEY) == busy
        assert (await a.ask(chat("m"))).status == 200
        assert (a.far["b"].dials, b.forwards) == (1, 1)


@pytest.mark.parametrize("ending", ["stalls", "flows", "is cut"])
async def test_a_refusal_without_end(ending: str, autojump_clock: MockClock) -> None:
    async def part(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 503 X\r\nx-llamesh-error: queue_full\r\ncontent-length: 99999999\r\n\r\n{")
        if ending == "stalls":
            await talk.gone()
        while ending == "flows":
            await talk.send(b" " * 30_000)

    async with neighbourhood() as a:
        b = a.peer("b", KEY, part=part)
        a.peer("c", KEY, others=3)
        answer = await a.ask(chat("m"))
        assert answer.status == 200
        assert trio.current_time() < 10
        assert (b.lost, len(b.links)) == (1, 0)


async def test_a_refusal_that_is_no_json(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        a.peer("b", KEY, part=say("x-llamesh-error: draining", status=503, body=b"\xff[" * 1000))
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.error["type"]) == (503, "draining")
        assert "node b refused it" in answer.error["message"]


# Instances that break.


async def test_one_more_instance_in_the_whole_mesh(autojump_clock: MockClock) -> None:
    """The first here, the second at a peer, which is told; a third isn't tried."""
    heard: list[dict[str, str]] = []

    async def listens(talk: Talk) -> None:
        await talk.request()
        heard.append(talk.headers)
        await talk.answer(502, b"{}", "x-llamesh-error: upstream_error")
        await talk.gone()

    async with neighbourhood({"m": [Play(load=0)]}, cookbook=[M]) as a:
        a.peer("b", KEY, part=listens, others=5)

        async def dies(talk: Talk) -> None:
            await talk.request()
            a.here.instance(M).crash.set()

        a.parts[KEY] = dies
        answer = await a.ask(chat("m"))
        assert answer.status == 502
        assert len(a.here.stage.started) + len(heard) == 2


async def test_instances_that_broke_at_a_peer_count_here(autojump_clock: MockClock) -> None:
    """It broke one there, and no second one could be had: the next peer hears that, and tries but once."""
    heard: list[dict[str, str]] = []

    async def listens(talk: Talk) -> None:
        await talk.request()
        heard.append(talk.headers)
        await talk.answer()
        await talk.gone()

    async with neighbourhood() as a:
        a.peer("b", KEY, part=refuse("spawn_failures_exhausted", "x-llamesh-attempt: 1"))
        a.peer("c", KEY, part=listens, others=3)
        assert (await a.ask(chat("m"))).status == 200
        assert heard[0]["x-llamesh-attempt"] == "1"


async def test_what_is_answered_with_an_error_teaches_nothing(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0)]}, cookbook=[M]) as a:
        a.parts[KEY] = say(status=400)
        assert (await a.ask(chat("m"))).status == 400
        assert a.router.speeds(KEY).requests == 0
        a.parts[KEY] = say()
        a.here.instance(M)._idle.close()
        await trio.sleep(1)
        assert (await a.ask(chat("m"))).status == 200


# Several ways.


async def test_a_connecting_node_that_breaks_is_gone_round(autojump_clock: MockClock) -> None:
    """The target can't be reached but by others: when one of those breaks, the next one leads there."""
    async with neighbourhood() as a:
        target = a.peer("t", KEY)
        target.direct = False
        v = a.peer("v", part=cut_at_once)
        w = a.peer("w", part=say("x-llamesh-node: t"))
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.headers["x-llamesh-node"]) == (200, "t")
        assert (a.far["t"].dials, a.far["v"].dials, a.far["w"].dials) == (0, 1, 1)
        # That says nothing against the target.
        assert target.lost == 0
        assert target.breaker.state is State.CLOSED
        assert (len(v.links), len(w.links)) == (0, 1)


@pytest.mark.parametrize("model", ["m", "late"])
async def test_hops_and_loops(model: str, autojump_clock: MockClock) -> None:
    """A request that has been everywhere goes nowhere, and one that has come too far neither."""
    async with neighbourhood(max_hops=3) as a:
        a.peer("b", f"{model}:default")
        a.peer("c", f"{model}:default")
        travelled = Travel("b", hops=1, via=("c", "b"))
        answer = await a.ask(chat(model), travel=travelled)
        assert (answer.status, answer.error["type"]) == (503, "no_capacity")
        answer = await a.ask(chat(model), travel=Travel("z", hops=3, via=("z",)))
        assert (answer.status, answer.error["type"]) == (503, "no_capacity")
        assert a.far["b"].dials == a.far["c"].dials == 0
        answer = await a.ask(chat(model), travel=Travel("z", hops=2, via=("z",)))
        assert answer.status == 200


async def test_served_here_when_nobody_else_is_left(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=1000, progress=True)]}, cookbook=[M]) as a:
        a.parts[KEY] = say("x-custom: here")
        a.peer("b", KEY, part=cut_at_once)
        a.peer("c", KEY, part=refuse("queue_full"))
        a.far["b"].unreachable = True
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.headers["x-custom"]) == (200, "here")
        assert trio.current_time() == pytest.approx(1000, abs=2)
        assert isinstance(M, Profile)
