"""Queues of a node that has peers: who waits here, who is sent on and when, and what the others are told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.config.cookbook import Profile
from llamesh.core.cost import Features
from llamesh.core.offers import News, Situation
from llamesh.dispatch.lease import AnyLease, Ask, Forward, Lease, Travel
from llamesh.errors import Draining, LlameshError, NoCapacity, QueueFull, QueueTimeout
from tests.support.neighbours import Neighbourhood, elsewhere, neighbourhood
from tests.support.scripted import Play, profile

M = profile()
FAR = elsewhere()
KEY = "m:default"
FROM_PEER = Travel("z", hops=1, via=("z",))


class Waiting:
    """Somebody who wants a place, and holds it until told."""

    def __init__(self, a: Neighbourhood, wish: Profile | Ask, *, admitted: bool = False) -> None:
        self.lease: AnyLease | None = None
        self.error: LlameshError | None = None
        self.scope = trio.CancelScope()
        ask = wish if isinstance(wish, Ask) else Ask(wish, "id", True)
        a.nursery.start_soon(self._run, a, ask, admitted)

    async def _run(self, a: Neighbourhood, ask: Ask, admitted: bool) -> None:
        with self.scope:
            try:
                self.lease = a.here.dispatch.take(ask)
                if self.lease is None:
                    with a.here.dispatch.join(ask, admitted=admitted) as ticket:
                        self.lease = await ticket.wait()
            except LlameshError as error:
                self.error = error

    @property
    def waits(self) -> bool:
        return self.lease is None and self.error is None

    @property
    def node(self) -> str:
        """Where it is served: "" = here."""
        assert self.lease is not None, self.error
        return self.lease.node if isinstance(self.lease, Forward) else ""

    def leave(self) -> None:
        if self.lease is not None:
            self.lease.release(complete=True)
        self.scope.cancel()


async def several(a: Neighbourhood, count: int, wish: Profile | Ask) -> list[Waiting]:
    made = []
    for _ in range(count):
        made.append(Waiting(a, wish))
        await trio.testing.wait_all_tasks_blocked()
    return made


async def one(a: Neighbourhood, wish: Profile | Ask, **more: Any) -> Waiting:
    made = Waiting(a, wish, **more)
    await trio.testing.wait_all_tasks_blocked()
    return made


async def test_ties_are_served_here(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0, slots=1)]}, [M]) as a:
        first = await one(a, M)
        await trio.sleep(1)
        first.leave()
        a.peer("b", KEY)
        for _ in range(5):
            here = await one(a, M)
            assert here.node == ""
            here.leave()


async def test_a_burst_spreads(autojump_clock: MockClock) -> None:
    """Own forwards count at once: what nobody has told us yet, we know ourselves."""
    async with neighbourhood({"m": [Play(load=0, slots=2)]}, [M]) as a:
        (await one(a, M)).leave()
        await trio.sleep(1)
        for name in "bc":
            a.peer(name, KEY, slots=2)
        crowd = await several(a, 6, M)
        assert sorted(each.node for each in crowd) == ["", "", "b", "b", "c", "c"]
        for each in crowd:
            each.leave()


async def test_who_waits_here_goes_when_a_peer_has_news(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0, slots=1)]}, [M]) as a:
        holder = await one(a, M)
        await trio.sleep(1)
        b = a.peer("b", KEY, others=40)
        waiting = await several(a, 2, M)
        assert [each.waits for each in waiting] == [True, True]
        b.note_news(News(profiles={KEY: Situation(slots=1)}))
        a.peers.on_change()
        await trio.testing.wait_all_tasks_blocked()
        assert waiting[0].node == "b"
        assert waiting[1].waits
        waiting[0].leave()  # a seat that is given back is news, too
        await trio.testing.wait_all_tasks_blocked()
        assert waiting[1].node == "b"
        waiting[1].leave()
        holder.leave()


async def test_who_has_to_stay_holds_up_nobody(autojump_clock: MockClock) -> None:
    """A peer's request, one that no peer is left for, and one that is too long for them are passed by."""
    async with neighbourhood({"m": [Play(load=0, slots=1)]}, [M]) as a:
        holder = await one(a, M)
        await trio.sleep(1)
        b = a.peer("b", KEY, others=90, context_length=1000)
        plain = Ask(M, "id", True)
        stuck = [
            await one(a, replace(plain, travel=FROM_PEER)),
            await one(a, replace(plain, excluded=frozenset("b"))),
            await one(a, replace(plain, features=Features(prompt_tokens=2000))),
        ]
        free = await one(a, plain)
        assert free.waits
        b.note_news(News(profiles={KEY: Situation(slots=1)}))
        a.peers.on_change()
        await trio.testing.wait_all_tasks_blocked()
        assert free.node == "b"
        assert [each.waits for each in stuck] == [True] * 3
        free.leave()
        holder.leave()
        for each in stuck:
            await trio.testing.wait_all_tasks_blocked()
            assert each.node == ""
            each.leave()


async def test_a_draining_node_sends_its_clients_to_a_peer(autojump_clock: MockClock) -> None:
    for how in ("drained", "shutting_down"):
        async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
            (await one(a, M)).leave()
            await trio.sleep(1)
            setattr(a.here.dispatch, how, True)
            alone = await one(a, M)
            assert isinstance(alone.error, Draining)
            a.peer("b", KEY, others=7)
            sent = await one(a, M)
            assert sent.node == "b"
            # A peer's request goes back, and the peer asks others.
            refused = await one(a, replace(Ask(M, "id"), travel=FROM_PEER))
            assert isinstance(refused.error, Draining)
            sent.leave()


async def test_who_does_nothing_for_others_refuses_them_at_once(
    autojump_clock: MockClock,
) -> None:
    async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
        (await one(a, M)).leave()
        await trio.sleep(1)
        a.here.dispatch.unwilling = lambda: "it is on battery"
        refused = await one(a, replace(Ask(M, "id"), travel=FROM_PEER))
        assert isinstance(refused.error, Draining)
        assert "on battery" in str(refused.error)
        own = await one(a, M)
        assert own.node == ""
        own.leave()


async def test_a_full_queue_overflows_to_peers(autojump_clock: MockClock) -> None:
    narrow = profile(max_queue_size=1)
    async with neighbourhood({"m": [Play(load=0)]}, [narrow]) as a:
        crowd = await several(a, 2, narrow)
        await trio.sleep(1)
        assert (crowd[0].node, crowd[1].waits) == ("", True)
        b = a.peer("b", KEY, others=90)
        over = await one(a, narrow)
        assert over.node == "b"
        b.links.close_all()
        a.peers.forget("b")
        assert isinstance((await one(a, narrow)).error, QueueFull)
        for each in (*crowd, over):
            each.leave()
            await trio.testing.wait_all_tasks_blocked()


async def test_a_model_that_fails_here_is_served_there(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0, fails=True)]}, [M]) as a:
        waiting = await one(a, M)
        await trio.sleep(60)
        assert waiting.error is not None
        assert waiting.error.type == "spawn_failures_exhausted"
        a.peer("b", KEY, others=40)
        sent = await one(a, M)
        assert sent.node == "b"
        sent.leave()


# How long a peer lets its requests wait.


async def test_a_wait_that_is_too_long_is_refused_at_once(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
        holder = await one(a, M)
        await trio.sleep(1)
        hurried = replace(Ask(M, "id"), travel=replace(FROM_PEER, max_wait_ms=100.0))
        refused = await one(a, hurried)
        assert isinstance(refused.error, QueueFull)
        assert "node z" in str(refused.error)
        patient = await one(a, replace(hurried, travel=replace(FROM_PEER, max_wait_ms=1e9)))
        assert patient.waits
        # What was taken on before is seen through: its first instance broke, and it waits for the next.
        admitted = await one(a, hurried, admitted=True)
        assert admitted.waits
        holder.leave()
        await trio.testing.wait_all_tasks_blocked()
        for each in (patient, admitted):
            assert each.node == ""
            each.leave()
            await trio.testing.wait_all_tasks_blocked()
        # With a slot free there is nothing to wait for.
        at_once = await one(a, replace(hurried, travel=replace(FROM_PEER, max_wait_ms=0.0)))
        assert isinstance(at_once.lease, Lease)
        at_once.leave()


# Models that only peers have.


async def test_a_model_of_peers_waits_for_who_comes_back(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        b = a.peer("b", KEY)
        assert a.here.dispatch.find("M") is not None
        a.peers.set_alive("b", alive=False)  # suspected
        waiting = await several(a, 2, FAR)
        assert [each.waits for each in waiting] == [True, True]
        await trio.sleep(20)
        a.peers.set_alive("b", alive=True)
        await trio.testing.wait_all_tasks_blocked()
        assert [each.node for each in waiting] == ["b", "b"]
        for each in waiting:
            each.leave()
        # Its death, too, may be undone in time.
        a.peers.set_alive("b", alive=False)
        [late] = await several(a, 1, FAR)
        a.peers.forget("b")
        await trio.sleep(20)
        assert late.waits
        assert a.here.dispatch.find("m") is None  # new ones are told at once
        a.peer("b", KEY)
        await trio.testing.wait_all_tasks_blocked()
        assert late.node == "b"
        late.leave()
        assert not b.in_flight


async def test_its_patience_is_that_of_any_queue(autojump_clock: MockClock) -> None:
    async with neighbourhood(model_defaults={"max_wait_in_queue_ms": 5000}) as a:
        a.peer("b", KEY, closed="is draining")
        waiting = await one(a, FAR)
        await trio.sleep(4)
        assert waiting.waits
        await trio.sleep(2)
        assert isinstance(waiting.error, QueueTimeout)
        assert "node b is draining" in str(waiting.error)


async def test_who_lost_all_that_have_it_is_told_at_once(autojump_clock: MockClock) -> None:
    """Nobody is left whom it may ask again; with another one that may come back, it waits."""
    async with neighbourhood() as a:
        a.peer("b", KEY)
        tried = replace(Ask(FAR, "id", True), excluded=frozenset("b"))
        told = await one(a, tried)
        assert isinstance(told.error, NoCapacity)
        assert "no other node" in str(told.error)
        a.peer("c", KEY)
        a.peers.set_alive("c", alive=False)
        waiting = await one(a, tried)
        assert waiting.waits
        # Who has nobody to wait for isn't held up by those who have, nor does it wait behind them.
        other = await one(a, Ask(FAR, "id", True))
        assert other.node == "b"
        other.leave()
        # Who sent it to us knows better where else it may go.
        passing = await one(a, replace(tried, travel=FROM_PEER))
        assert isinstance(passing.error, NoCapacity)
        a.peers.set_alive("c", alive=True)
        await trio.testing.wait_all_tasks_blocked()
        assert waiting.node == "c"
        waiting.leave()


async def test_a_prompt_that_is_too_long_for_everybody_goes_to_the_largest(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        a.peer("b", KEY, context_length=1000)
        a.peer("c", KEY, context_length=2000, others=9)
        short, middle, long = [
            await one(a, replace(Ask(FAR, "id", True), features=Features(prompt_tokens=tokens)))
            for tokens in (500, 1500, 9000)
        ]
        assert [short.node, middle.node, long.node] == ["b", "c", "c"]
        for each in (short, middle, long):
            each.leave()


async def test_a_profile_that_is_only_listed_here(autojump_clock: MockClock) -> None:
    """max_instances 0: peers serve it, for peers that come by, too."""
    listed = profile(max_instances=0)
    async with neighbourhood({}, [listed]) as a:
        assert isinstance((await one(a, listed)).error, NoCapacity)
        a.peer("b", KEY)
        a.peer("c", KEY, runs=False)
        own, passing = await one(a, listed), await one(a, replace(Ask(listed, "id"), travel=FROM_PEER))
        assert (own.node, passing.node) == ("b", "b")
        own.leave()
        passing.leave()


async def test_a_peers_request_is_served_here_or_nowhere(autojump_clock: MockClock) -> None:
    """Two nodes that send it to and fro serve nobody."""
    async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
        holder = await one(a, M)
        await trio.sleep(1)
        a.peer("b", KEY, slots=8)
        passing = await one(a, replace(Ask(M, "id", True), travel=FROM_PEER))
        assert passing.waits
        holder.leave()
        await trio.testing.wait_all_tasks_blocked()
        assert passing.node == ""
        passing.leave()


async def test_what_must_be_here_stays_here(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=5)]}, [M]) as a:
        a.peer("b", KEY, slots=8)
        waiting = await one(a, replace(Ask(M, "id", True), here_only=True))
        assert waiting.waits
        await trio.sleep(6)
        assert waiting.node == ""
        waiting.leave()


@pytest.mark.parametrize("moment", ["granted", "waiting"])
async def test_who_leaves_gives_its_seat_back(moment: str, autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        b = a.peer("b", KEY, closed="" if moment == "granted" else "is draining")
        with a.here.dispatch.join(Ask(FAR, "id", True)) as ticket:
            if moment == "granted":
                assert b.in_flight == {KEY: 1}
            else:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await ticket.wait()
        assert not b.in_flight
        assert b.breaker.state.value == "closed"


async def test_requests_of_peers_are_counted_and_forgotten(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0, slots=4)]}, [M]) as a:
        (await one(a, M)).leave()
        await trio.sleep(1)
        held = await one(a, M)
        a.here.dispatch.count_origin("z", KEY, 1)
        passing = await one(a, replace(Ask(M, "id"), travel=FROM_PEER))
        assert a.router.situation(KEY, "z").others == 1
        assert a.router.situation(KEY, "y").others == 2
        a.here.dispatch.count_origin("z", KEY, -1)
        assert not a.router.requests
        held.leave()
        passing.leave()
