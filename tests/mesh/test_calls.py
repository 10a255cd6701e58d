"""Small requests between nodes: answered, replaced, bounded in time and size; nothing is left open."""

from __future__ import annotations

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.mesh.calls import call
from llamesh.net.exchange import UpstreamBroken
from tests.support.neighbours import Neighbourhood, Talk, is_silent, neighbourhood


async def asks(a: Neighbourhood, seconds: float = 5.0, body: bytes = b"") -> tuple[int, bytes]:
    return await call(a.peers.of("b").links, "POST", "/mesh/gossip", body, seconds=seconds)


async def test_an_answer(autojump_clock: MockClock) -> None:
    heard: list[Talk] = []

    async def part(talk: Talk) -> None:
        while True:
            await talk.request()
            heard.append(talk)
            await talk.answer(203, b"reply to " + talk.body)

    async with neighbourhood() as a:
        b = a.peer("b", part=part)
        assert await asks(a, body=b"one") == (203, b"reply to one")
        assert await asks(a, body=b"x" * 200_000) == (203, b"reply to " + b"x" * 200_000)
        assert heard[0].head.startswith(b"POST /mesh/gossip HTTP/1.1\r\n")
        assert (a.far["b"].dials, b.links.idle) == (1, 1)


async def test_a_kept_connection_that_was_closed(autojump_clock: MockClock) -> None:
    async def part(talk: Talk) -> None:
        await talk.request()
        await talk.answer()
        await talk.request()  # takes the next one, and says nothing

    async with neighbourhood() as a:
        b = a.peer("b", part=part)
        for _ in range(3):
            assert await asks(a) == (200, b"{}")
        assert (a.far["b"].dials, len(b.links)) == (3, 1)


async def test_silence(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        b = a.peer("b", part=is_silent)
        with pytest.raises(UpstreamBroken, match="didn't answer /mesh/gossip within 5 s"):
            await asks(a)
        assert trio.current_time() == pytest.approx(5, abs=0.1)
        assert len(b.links) == 0


async def test_answers_without_end(autojump_clock: MockClock) -> None:
    async def floods(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        while True:
            await talk.chunk(b"x" * 60_000)

    async def trickles(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        while True:
            await talk.chunk(b"x")
            await trio.sleep(0.5)

    async def waits(talk: Talk) -> None:
        await talk.request()
        while True:
            await talk.progress("this and that")
            await trio.sleep(0.5)

    for part, why in ((floods, "without end"), (trickles, "didn't answer"), (waits, "didn't answer")):
        async with neighbourhood() as a:
            b = a.peer("b", part=part)
            with pytest.raises(UpstreamBroken, match=why):
                await asks(a)
            assert len(b.links) == 0


@pytest.mark.parametrize(
    "answer", [b"", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabc"]
)
async def test_broken_answers(answer: bytes, autojump_clock: MockClock) -> None:
    async def part(talk: Talk) -> None:
        await talk.request()
        await talk.send(answer)

    async with neighbourhood() as a:
        b = a.peer("b", part=part)
        with pytest.raises(UpstreamBroken):
            await asks(a)
        assert len(b.links) == 0


async def test_who_cant_be_dialled(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        a.peer("b")
        a.far["b"].unreachable = True
        with pytest.raises(UpstreamBroken, match="refuses connections"):
            await asks(a)
        a.peers.of("b").links.try_again()
        a.far["b"].dial_seconds = 60.0
        with pytest.raises(UpstreamBroken, match="within 5 s"):
            await asks(a)


async def test_leaving_closes_the_connection(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        b = a.peer("b", part=is_silent)
        with trio.move_on_after(1):
            await asks(a)
        assert len(b.links) == 0
        await trio.testing.wait_all_tasks_blocked()
        assert a.far["b"].open == 0
