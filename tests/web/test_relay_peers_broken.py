"""Peers that break, stall and babble, and clients that leave, in every phase of a forward."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.config.sections import CircuitBreaker
from llamesh.core.breaker import State
from tests.support.neighbours import (
    Answer,
    Talk,
    answers,
    chat,
    cut_at_once,
    is_silent,
    neighbourhood,
    say,
)
from tests.support.scripted import profile

KEY = "m:default"
M = profile()
COMMENTS = {"http": {"stream_keepalive_seconds": 10}}


# Peers that break.


async def cut_after_progress(talk: Talk) -> None:
    await talk.request()
    await talk.progress("loading")


async def garbage(talk: Talk) -> None:
    await talk.request()
    await talk.send(b"\x16\x03\x01 what is this\r\n\r\n")
    await talk.gone()


async def huge_head(talk: Talk) -> None:
    await talk.request()
    await talk.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await talk.send(b"x-more: " + b"y" * 1000 + b"\r\n")


async def switches(talk: Talk) -> None:
    await talk.request()
    await talk.send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n")
    await talk.gone()


BREAKING = [cut_at_once, cut_after_progress, garbage, huge_head, switches]


@pytest.mark.parametrize("part", BREAKING)
@pytest.mark.parametrize("stream", [True, False])
async def test_who_breaks_before_the_head_is_passed_over(
    part: Any, stream: bool, autojump_clock: MockClock
) -> None:
    async with neighbourhood() as a:
        b = a.peer("b", KEY, part=part)
        a.peer("c", KEY, part=say("x-llamesh-node: c"), others=3)
        answer = await a.ask(chat("m", stream=stream))
        assert (answer.status, answer.headers["x-llamesh-node"]) == (200, "c")
        assert (b.lost, len(b.links)) == (1, 0)
        await trio.testing.wait_all_tasks_blocked()
        assert a.far["b"].open == 0


async def test_unreachable_peers_cost_no_attempts(autojump_clock: MockClock) -> None:
    """Nothing was in their hands, so it is nothing that they die of."""
    async with neighbourhood() as a:
        for name in "bcdef":
            a.peer(name, KEY)
            a.far[name].unreachable = True
        a.peer("z", KEY, others=90)
        assert (await a.ask(chat("m"))).status == 200


async def test_a_request_that_peers_die_of_ends(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        for name in "bcdefg":
            a.peer(name, KEY, part=cut_at_once)
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.error["type"]) == (502, "upstream_error")
        assert sum(far.dials for far in a.far.values()) == 3


async def test_a_kept_connection_that_was_closed_meanwhile(autojump_clock: MockClock) -> None:
    """It is replaced without a word, and it isn't kept in any book."""

    async def one_each(talk: Talk) -> None:
        await talk.request()
        await talk.answer()
        await talk.request()

    async with neighbourhood() as a:
        b = a.peer("b", KEY, part=one_each)
        for _ in range(4):
            assert (await a.ask(chat("m"))).status == 200
        assert (b.lost, a.far["b"].dials, len(b.links)) == (0, 4, 1)


async def test_after_the_first_byte_the_answer_is_cut(autojump_clock: MockClock) -> None:
    async def dies(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        await talk.chunk(b"data: 1\n\n")

    async def promises(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")

    async def head_alone(talk: Talk) -> None:
        await talk.request()
        await talk.begin()

    async def ends_with_the_connection(talk: Talk) -> None:
        await talk.request()
        await talk.send(b"HTTP/1.1 200 OK\r\n\r\nabc")

    for part in (dies, promises, head_alone, ends_with_the_connection):
        async with neighbourhood() as a:
            b = a.peer("b", KEY, part=part)
            a.peer("c", KEY, others=3)
            answer = await a.ask(chat("m", stream=True))
            assert answer.aborted
            assert not answer.finished
            assert a.far["c"].dials == 0
            assert b.lost == 1


async def test_a_breaker_opens_and_closes(autojump_clock: MockClock) -> None:
    async with neighbourhood(breaker=CircuitBreaker(failure_threshold=2, success_threshold=1)) as a:
        b = a.peer("b", KEY, part=cut_at_once)
        a.peer("c", KEY, others=9)
        for _ in range(4):
            assert (await a.ask(chat("m"))).status == 200
        assert (b.forwards, b.breaker.state) == (2, State.OPEN)
        a.far["b"].part = answers
        await trio.sleep(6)
        a.peer("b", KEY)
        assert (await a.ask(chat("m"))).status == 200
        assert (b.forwards, b.breaker.state) == (3, State.CLOSED)


# Silence, and signs of life.


async def test_a_silent_peer_is_given_up_before_its_first_byte(autojump_clock: MockClock) -> None:
    """However often the client hears a comment meanwhile, and whether it streams or not."""
    for stream in (True, False):
        for keepalive in (1, 10):
            async with neighbourhood(
                upstream_read_timeout_ms=4000, http={"stream_keepalive_seconds": keepalive}
            ) as a:
                begun = trio.current_time()
                a.peer("b", KEY, part=is_silent)
                a.peer("c", KEY, others=3)
                answer = await a.ask(chat("m", stream=stream))
                assert answer.finished
                assert answer.body.endswith(b'{"ok":true}')
                assert 4 <= trio.current_time() - begun < 5
                comments = answer.body.count(b": waiting for node b\n\n")
                assert comments == (3 if stream and keepalive == 1 else 0)


async def test_progress_is_no_silence(autojump_clock: MockClock) -> None:
    async def slow(talk: Talk) -> None:
        while True:
            await talk.request()
            for _ in range(25):
                await talk.progress("loading m:default for 3 s")
                await trio.sleep(1)
            await talk.answer()

    async with neighbourhood(upstream_read_timeout_ms=4000, **COMMENTS) as a:
        a.peer("b", KEY, part=slow)
        answer = await a.ask(chat("m", stream=True))
        assert answer.body == b": loading m:default for 3 s\n\n" * 2 + b"{}"
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["x-llamesh-queue-ms"] == "0"
        quiet = await a.ask(chat("m"))
        assert quiet.body == b"{}"


async def test_silence_in_the_middle_is_a_cut(autojump_clock: MockClock) -> None:
    async def stops(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        await talk.chunk(b"data: 1\n\n")
        await talk.gone()

    async with neighbourhood(upstream_read_timeout_ms=4000) as a:
        a.peer("b", KEY, part=stops)
        answer = await a.ask(chat("m", stream=True))
        assert answer.aborted
        assert 4 <= trio.current_time() < 6


async def test_an_endless_wait_ends_with_the_deadline(autojump_clock: MockClock) -> None:
    """A peer may say for ever that it makes progress; nothing of that is kept."""

    async def forever(talk: Talk) -> None:
        await talk.request()
        while True:
            for _ in range(50):
                await talk.progress("this and that " * 10)
            await trio.sleep(0.1)

    async with neighbourhood(model_defaults={"max_request_duration_ms": 20_000}) as a:
        a.peer("b", KEY, part=forever)
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.error["type"]) == (504, "request_timeout")
        assert trio.current_time() == pytest.approx(20, abs=0.2)


async def test_pings_for_those_who_ignore_comments(autojump_clock: MockClock) -> None:
    async def slow(talk: Talk) -> None:
        await talk.request()
        for _ in range(25):
            await talk.progress("loading")
            await trio.sleep(1)
        await talk.refuse("queue_timeout", message="too long")
        await talk.gone()

    async with neighbourhood(**COMMENTS) as a:
        a.peer("b", KEY, part=slow)
        answer = await a.ask(chat("m", stream=True), path=b"/v1/messages")
        *pings, last, rest = answer.body.split(b"\n\n")
        assert pings == [b'event: ping\ndata: {"type": "ping"}'] * 2
        assert last.startswith(b'event: error\ndata: {"type":"error","error":{"message":"too long"')
        assert (rest, answer.finished) == (b"", True)


async def test_a_peer_that_says_nothing_at_all_is_left(autojump_clock: MockClock) -> None:
    """A waiting peer speaks each second; a link that silently died must not hold a request for ever."""

    async def mute(talk: Talk) -> None:
        await talk.request()
        await talk.gone()

    async with neighbourhood() as a:
        a.peer("b", KEY, part=mute)
        answer = await a.ask(chat("m"))
        assert trio.current_time() == pytest.approx(15, abs=1.5)
        assert answer.status >= 500


async def test_a_late_error_is_an_event(autojump_clock: MockClock) -> None:
    async def slow(talk: Talk) -> None:
        await talk.request()
        await trio.sleep(14)
        await talk.answer(500, b'{"error":{"message":"the far model broke","type":"server_error"}}')
        await talk.gone()

    async with neighbourhood(**COMMENTS) as a:
        a.peer("b", KEY, part=slow)
        answer = await a.ask(chat("m", stream=True))
        comment, event, rest = answer.body.split(b"\n\n")
        assert comment == b": waiting for node b"
        assert event == b'data: {"error":{"message":"the far model broke","type":"server_error"}}'
        assert (rest, answer.finished) == (b"", True)


async def test_a_machine_is_woken_and_the_client_hears_so(autojump_clock: MockClock) -> None:
    async with neighbourhood(**COMMENTS) as a:
        b = a.peer("b", KEY)
        b.wake_mac = "02:00:00:00:00:01"
        a.peers.forget("b")
        answer = Answer()
        a.nursery.start_soon(a.ask, chat("m", stream=True), answer)
        await answer.until(b": waking node b\n\n: waking node b\n\n")
        a.peers.set_alive("b", alive=True)
        await answer.until(b'{"ok":true}')
        # One that never wakes is given up.
        a.peers.forget("b")
        answer = await a.ask(chat("m"))
        assert (answer.status, answer.error["type"]) == (503, "no_capacity")


# Clients that leave.


@pytest.mark.parametrize("phase", ["dialling", "before the head", "loading", "streaming", "refused"])
async def test_who_leaves_closes_the_connection_at_once(phase: str, autojump_clock: MockClock) -> None:
    async def part(talk: Talk) -> None:
        await talk.request()
        if phase == "loading":
            await talk.progress("loading")
        if phase == "streaming":
            await talk.begin()
            await talk.chunk(b"data: 1\n\n")
        if phase == "refused":
            await talk.send(b"HTTP/1.1 503 X\r\nx-llamesh-error: draining\r\ncontent-length: 9\r\n\r\n{")
        await talk.gone()

    async with neighbourhood() as a:
        b = a.peer("b", KEY, part=part)
        a.far["b"].dial_seconds = 5.0 if phase == "dialling" else 0.0
        with trio.CancelScope() as scope:
            a.nursery.start_soon(_cancel_when, lambda: sum(b.in_flight.values()) == 1, scope)
            await a.ask(chat("m", stream=True))
        assert scope.cancelled_caught
        await trio.testing.wait_all_tasks_blocked()
        assert (a.far["b"].open, len(b.links), b.lost) == (0, 0, 0)
        assert not b.in_flight


async def _cancel_when(condition: Any, scope: trio.CancelScope) -> None:
    while not condition():
        await trio.sleep(0.01)
    await trio.sleep(1)
    scope.cancel()


async def test_a_client_that_cant_be_written_to(autojump_clock: MockClock) -> None:
    async def streams(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        while True:
            await talk.chunk(b"data: 1\n\n")
            await trio.sleep(1)

    async with neighbourhood(**COMMENTS) as a:
        b = a.peer("b", KEY, part=streams)
        answer = Answer()
        a.nursery.start_soon(a.ask, chat("m", stream=True), answer)
        await answer.until(b"data: 1")
        answer.breaks = True
        await trio.sleep(3)
        assert answer.aborted
        assert (a.far["b"].open, len(b.links), b.lost) == (0, 0, 0)
        # While it waits for the head, comments find out.
        a.far["b"].part = is_silent
        answer = Answer()
        answer.breaks = True
        await a.ask(chat("m", stream=True), answer)
        assert answer.aborted
        assert trio.current_time() < 20
