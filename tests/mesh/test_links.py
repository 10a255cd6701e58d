"""The connections to one peer: dialled or parked, kept, worn out, broken; over real encrypted streams."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.mesh.links import FIRST_PAUSE, KEPT, LONGEST_PAUSE, Links, pause_after
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.net.exchange import UpstreamBroken, UpstreamConnection
from tests.mesh.noise_pairs import open_pair

ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@dataclass
class Line:
    """Links whose other ends the test holds. `problem`: why a dial fails; `waits`: how long it takes."""

    seconds: float = 3600.0
    problem: str = ""
    waits: float = 0.0
    far: list[NoiseTransport] = field(default_factory=list)
    dials: int = 0

    def __post_init__(self) -> None:
        self.links = Links("b", self.dial, self.seconds)

    async def dial(self) -> NoiseTransport:
        self.dials += 1
        await trio.sleep(self.waits)
        if self.problem:
            raise ConnectionRefusedError(self.problem)
        return await self.pair()

    async def pair(self) -> NoiseTransport:
        with trio.CancelScope(shield=True):  # sockets have an owner only when it is done
            ours, theirs = await open_pair()
        self.far.append(theirs)
        return ours

    async def park(self) -> None:
        self.links.add(await self.pair(), parked=True)

    async def answer(self, connection: UpstreamConnection, answer: bytes = ANSWER) -> None:
        """A request and its answer, by the newest stream of the other side."""
        await connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        for far in self.far:
            if not far.closed:
                with trio.move_on_after(0.05):
                    await far.receive()
                    await far.send(answer)
                    break
        while not connection.response.complete:
            await connection.read()

    def close(self) -> None:
        self.links.close_all()
        for far in self.far:
            far.close()


@pytest.fixture
def line() -> Line:
    return Line()


async def test_one_is_used_again_and_again(line: Line) -> None:
    first = await line.links.take()
    await line.answer(first)
    line.links.keep(first)
    assert (line.links.idle, len(line.links)) == (1, 1)
    second = await line.links.take()
    assert second is first
    assert (line.links.idle, line.dials) == (0, 1)
    another = await line.links.take()
    assert another is not first
    line.links.close(another)
    line.links.close(second)
    assert len(line.links) == 0
    line.close()


async def test_what_isnt_whole_isnt_kept(line: Line) -> None:
    for answer in (ANSWER.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), b""):
        connection = await line.links.take()
        if answer:
            await line.answer(connection, answer)
        line.links.keep(connection)
        assert len(line.links) == 0
        assert connection._transport.closed
        for far in line.far:
            far.close()
    line.close()


async def test_what_the_peer_closed_or_said_unasked_isnt_used(line: Line) -> None:
    for what in ("closes", "ends", "talks"):
        connection = await line.links.take()
        await line.answer(connection)
        line.links.keep(connection)
        far = line.far[-1]
        if what == "closes":
            far.close()
        elif what == "ends":
            await far.send_end()
        else:
            await far.send(b"surprise")
        await trio.lowlevel.wait_readable(connection._transport.sock)  # type: ignore[attr-defined]
        again = await line.links.take()
        assert again is not connection
        assert len(line.links) == 1
        line.links.close(again)
        for one in line.far:
            one.close()
    line.close()


async def test_a_fresh_one_means_none_of_the_old_ones(line: Line) -> None:
    several = [await line.links.take() for _ in range(3)]
    for one in several:
        line.links.keep_unused(one)
    # Its user closed it without a word, as after a request that found it closed.
    gone = await line.links.take()
    gone.close()
    fresh = await line.links.take(fresh=True)
    assert fresh not in several
    assert len(line.links) == 1
    line.links.close(fresh)
    line.close()


async def test_sessions_end(line: Line, autojump_clock: MockClock) -> None:
    line = Line(seconds=100.0)
    one, two = await line.links.take(), await line.links.take()
    await trio.sleep(99)
    line.links.keep_unused(one)
    line.links.keep_unused(two)
    await trio.sleep(2)
    line.links.sweep()
    assert len(line.links) == 0
    third = await line.links.take()
    await trio.sleep(101)
    # In use it stays, and isn't kept afterwards.
    line.links.sweep()
    assert len(line.links) == 1
    line.links.keep(third)
    assert len(line.links) == 0
    line.close()


async def test_spare_ones_go_after_a_while(line: Line, autojump_clock: MockClock) -> None:
    several = [await line.links.take() for _ in range(KEPT + 3)]
    for one in several:
        line.links.keep_unused(one)
    line.links.sweep()
    assert line.links.idle == KEPT + 3
    await trio.sleep(61)
    line.links.sweep()
    assert (line.links.idle, len(line.links)) == (KEPT, KEPT)
    line.close()


async def test_a_failed_dial_rests_and_is_tried_again(autojump_clock: MockClock) -> None:
    line = Line(problem="nobody there")
    with pytest.raises(UpstreamBroken, match="nobody there"):
        await line.links.take()
    assert line.links.can_dial is False
    assert not line.links.reachable
    for _ in range(40):
        with pytest.raises(UpstreamBroken, match="b"):
            await line.links.take()
        await trio.sleep(5)
    assert 2 < line.dials < 40
    before = line.dials
    line.links.try_again()
    assert line.links.reachable
    line.problem = ""
    connection = await line.links.take()
    assert (line.dials, line.links.can_dial, line.links.problem) == (before + 1, True, "")
    line.links.close(connection)
    line.close()


def test_pauses() -> None:
    for failures in range(1, 3000, 7):
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(failures - 1, 60))
        assert longest / 2 <= pause_after(failures) <= longest


# Parked connections.


async def test_parked_ones_serve_who_cant_dial() -> None:
    line = Line(problem="behind a router")
    await line.park()
    first = await line.links.take()
    assert line.dials == 0
    assert line.links.reachable
    results: list[UpstreamConnection] = []

    async def want() -> None:
        results.append(await line.links.take())

    # All who wait are told: each parked one goes to one of them, in whatever order.
    with trio.fail_after(1.8):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(want)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(3):
                await line.park()
    assert len(set(results)) == 3
    for one in (first, *results):
        line.links.close(one)
    line.close()


async def test_a_parked_one_is_taken_while_a_dial_hangs(autojump_clock: MockClock) -> None:
    line = Line(problem="no answer")
    with pytest.raises(UpstreamBroken):
        await line.links.take()
    await line.park()
    busy = await line.links.take()
    await trio.sleep(60)
    line.waits = 3.0
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def park_later() -> None:
            await trio.sleep(0.5)
            await line.park()

        nursery.start_soon(park_later)
        connection = await line.links.take()
        assert trio.current_time() - begun < 1
    # And the other way round: what could be dialled again is found out.
    await trio.sleep(60)
    line.problem = ""
    dialled = await line.links.take()
    assert line.links.can_dial is True
    for one in (busy, connection, dialled):
        line.links.close(one)
    assert len(line.links) == 0
    line.close()


async def test_nothing_parked_in_time(autojump_clock: MockClock) -> None:
    line = Line(problem="behind a router")
    await line.park()
    busy = await line.links.take()
    for _ in range(2):
        with pytest.raises(UpstreamBroken, match="too few connections"):
            await line.links.take()
    line.links.close(busy)
    line.close()


@pytest.mark.parametrize("moment", [0.0, 0.5, 1.0, 1.5])
async def test_who_leaves_while_waiting_leaves_nothing(moment: float, autojump_clock: MockClock) -> None:
    line = Line(problem="no answer")
    with pytest.raises(UpstreamBroken):
        await line.links.take()
    await line.park()
    busy = await line.links.take()
    await trio.sleep(60)
    line.problem, line.waits = "", 1.0
    with trio.move_on_after(moment):
        async with trio.open_nursery() as nursery:

            async def park_later() -> None:
                await trio.sleep(0.5)
                await line.park()

            nursery.start_soon(park_later)
            taken = await line.links.take()
            line.links.keep_unused(taken)
    assert len(line.links) == line.links.idle + 1
    line.links.close(busy)
    line.close()


async def test_a_flood_of_parked_connections_is_cut() -> None:
    line = Line()
    streams: list[Stub] = []
    for _ in range(200):
        streams.append(Stub())
        line.links.add(streams[-1], parked=True)  # type: ignore[arg-type]
    assert line.links.idle == len(line.links) == 128
    assert sum(stream.closed for stream in streams) == 72
    line.close()


class Stub:
    """As much of a stream as being kept takes."""

    def __init__(self) -> None:
        self.closed = False
        self.opened_at = 0.0

    def close(self) -> None:
        self.closed = True


async def test_when_the_peer_is_gone_everybody_is_told(line: Line) -> None:
    connection = await line.links.take()
    idle = await line.links.take()
    line.links.keep_unused(idle)
    await connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    failed: list[UpstreamBroken] = []

    async def read() -> None:
        try:
            await connection.read()
        except UpstreamBroken as error:
            failed.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked(0.01)
        line.links.close_all()
    assert len(failed) == 1
    assert (len(line.links), line.links.idle) == (0, 0)
    # Coming back afterwards they aren't taken in.
    line.links.keep(connection)
    line.links.keep_unused(idle)
    assert (len(line.links), line.links.idle) == (0, 0)
    line.close()
