"""Whole lives of a node with peers, made up by hypothesis: whatever is cancelled when, nothing is left over.

Clients go through the gateway, as they do on a socket, and leave at any moment; peers answer, load, refuse,
stall, break, freeze, die and come back; instances crash. After all of it no seat, slot, place in a queue,
connection, probe of a breaker or count of a peer's requests remains, and everybody who stayed was answered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamesh.config.sections import CircuitBreaker
from llamesh.core.breaker import State
from llamesh.core.offers import News, Situation
from llamesh.dispatch.lease import AT_HOME, Travel
from tests.support.neighbours import Answer, Neighbourhood, Talk, answers, chat, neighbourhood
from tests.support.scripted import Play, profile

STEP = 0.25
HERE, FAR = "m:default", "far:default"
PEERS = ("b", "c", "d")
WAYS = (
    "answers", "loads", "streams", "refuses", "is missing", "refuses for ever", "stalls", "stalls mid-stream",
    "cuts", "cuts mid-stream", "talks nonsense", "fails", "closes after it",
)  # fmt: skip


def moments(most: int) -> st.SearchStrategy[float]:
    return st.integers(0, most).map(lambda number: number * STEP)


@dataclass(frozen=True)
class Visit:
    """One client, which leaves after `patience` if it wasn't answered. `origin`: it is a peer's request."""

    comes: float
    model: str
    patience: float
    stream: bool
    origin: bool


@dataclass
class Moods:
    """How a peer behaves, request by request; the last one stays."""

    ways: list[tuple[str, float]]
    asked: int = 0
    lives: list[tuple[float, str]] = field(default_factory=list)

    async def __call__(self, talk: Talk) -> None:
        while True:
            await talk.request()
            way, pause = self.ways[min(self.asked, len(self.ways) - 1)]
            self.asked += 1
            await self.act(talk, way, pause)

    async def act(self, talk: Talk, way: str, pause: float) -> None:
        if way == "loads":
            for _ in range(3):
                await talk.progress("loading")
                await trio.sleep(pause)
        else:
            await trio.sleep(pause)
        match way:
            case "refuses":
                await talk.refuse("queue_full")
            case "is missing":
                await talk.refuse("model_not_found", status=404)
            case "refuses for ever":
                await talk.send(b"HTTP/1.1 503 X\r\nx-llamesh-error: draining\r\ncontent-length: 9\r\n\r\n")
                await talk.gone()
            case "stalls":
                await talk.gone()
            case "streams" | "stalls mid-stream" | "cuts mid-stream":
                await talk.begin()
                await talk.chunk(b"data: 1\n\n")
                await trio.sleep(pause)
                if way == "stalls mid-stream":
                    await talk.gone()
                if way == "cuts mid-stream":
                    raise ConnectionError("cut")
                await talk.send(b"0\r\n\r\n")
            case "cuts":
                raise ConnectionError("cut")
            case "talks nonsense":
                await talk.send(b"\x00\x01 nonsense \r\n\r\n")
                await talk.gone()
            case "fails":
                await talk.answer(500)
            case "closes after it":
                await talk.answer()
                raise ConnectionError("closed")
            case _:
                await talk.answer()


visits = st.lists(
    st.builds(
        Visit,
        comes=moments(40),
        model=st.sampled_from(["m", "far", "both"]),
        patience=st.one_of(st.just(1e6), moments(20)),
        stream=st.booleans(),
        origin=st.sampled_from([False, False, True]),
    ),
    min_size=1,
    max_size=10,
)
moods = st.lists(st.tuples(st.sampled_from(WAYS), moments(6)), min_size=1, max_size=5)
events = st.lists(
    st.tuples(
        moments(50),
        st.sampled_from(PEERS),
        st.sampled_from(["suspected", "dead", "cut", "unreachable", "busy", "closed", "crash"]),
        moments(12),
    ),
    max_size=5,
)


class Life:
    def __init__(self, a: Neighbourhood) -> None:
        self.a = a
        self.answered = self.left = 0

    def revive(self, node: str) -> None:
        far = self.a.far.get(node)
        peer = self.a.peer(node, HERE, FAR, "both:default", slots=2)
        if far is not None:
            self.a.far[node] = far
            far.unreachable = False
        peer.links.try_again()
        self.a.peers.on_change()

    async def event(self, when: float, node: str, what: str, lasts: float) -> None:
        await trio.sleep(when)
        a = self.a
        peer = a.peers.of(node)
        match what:
            case "suspected":
                a.peers.set_alive(node, alive=False)
            case "dead":
                a.peers.forget(node)
            case "cut":
                peer.links.close_all()
            case "unreachable":
                a.far[node].unreachable = True
                peer.links.close_all()
            case "busy":
                peer.note_news(News(profiles={HERE: Situation(slots=2, others=50)}))
            case "closed":
                peer.note_news(News(closed="is draining"))
            case _:
                for instance in a.here.stage.started:
                    instance.crash.set()
        a.peers.on_change()
        await trio.sleep(lasts)
        self.revive(node)

    async def visit(self, visit: Visit) -> None:
        await trio.sleep(visit.comes)
        travel = Travel("z", hops=1, via=("z",), max_wait_ms=5000.0) if visit.origin else AT_HOME
        answer = Answer()
        with trio.move_on_after(visit.patience):
            await self.a.ask(chat(visit.model, stream=visit.stream), answer, travel=travel)
            assert answer.finished or answer.aborted, answer
            assert b"internal_error" not in answer.body, answer
            self.answered += 1
            return
        self.left += 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    visits=visits,
    ways=st.lists(moods, min_size=3, max_size=3),
    mine=st.lists(
        st.tuples(st.sampled_from(["answers", "cuts", "streams"]), moments(6)), min_size=1, max_size=4
    ),
    plays=st.lists(st.builds(Play, load=moments(8), slots=st.integers(1, 2)), min_size=1, max_size=2),
    events=events,
    keepalive=st.sampled_from([0, 1]),
    silence=st.sampled_from([2000, 5000]),
)
def test_whatever_happens(
    visits: list[Visit],
    ways: list[list[tuple[str, float]]],
    mine: list[tuple[str, float]],
    plays: list[Play],
    events: list[tuple[float, str, str, float]],
    keepalive: int,
    silence: int,
) -> None:
    async def main() -> None:
        cookbook = [profile(), profile("both")]
        more: dict[str, Any] = {
            "http": {"stream_keepalive_seconds": keepalive},
            "upstream_read_timeout_ms": silence,
            "model_defaults": {"max_wait_in_queue_ms": 20_000},
        }
        breaker = CircuitBreaker(failure_threshold=2, open_duration_base_ms=2000, success_threshold=1)
        async with neighbourhood({"m": plays, "both": plays}, cookbook, breaker=breaker, **more) as a:
            life = Life(a)
            for node, moods in zip(PEERS, ways, strict=True):
                life.revive(node)
                a.far[node].part = Moods(moods)
            a.parts.update({key: Moods(mine) for key in (HERE, "both:default")})
            # Everything has an end, or a wake-up was lost.
            with trio.fail_after(1000):
                async with trio.open_nursery() as nursery:
                    for visit in visits:
                        nursery.start_soon(life.visit, visit)
                    for event in events:
                        nursery.start_soon(life.event, *event)
                while any(one.busy_slots for one in a.here.pool.all()):
                    await trio.sleep(STEP)
            assert life.answered + life.left == len(visits)
            await trio.sleep(120)
            for node in PEERS:
                peer = a.peers.of(node)
                peer.links.close_all()
                a.far[node].part = answers
                # Whatever became of its probes: it is tried again in the end, and is well.
                for _ in range(3):
                    life.revive(node)
                    seat = a.peers.seat(node, FAR)
                    assert seat is not None
                    seat.leave(None, complete=True, failed=False)
                    await trio.sleep(2)
                assert peer.breaker.state is State.CLOSED
            assert (await a.ask(chat("far"))).status == 200

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
