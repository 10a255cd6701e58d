"""Here or at a peer: what the router knows of both, and what it takes a seat for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.core.cost import Features
from llamesh.core.offers import Situation
from llamesh.dispatch.lease import Ask, Forward, Travel
from llamesh.telemetry.stats import Usage
from tests.support.neighbours import Neighbourhood, elsewhere, neighbourhood
from tests.support.scripted import Play, get, profile

M = profile()
FAR = elsewhere()
KEY = "m:default"
EMBED = profile("e", kind="embedding")


def ask(wanted: object = M, **more: object) -> Ask:
    return Ask(wanted, "id", True, **more)  # type: ignore[arg-type]


def forward(a: Neighbourhood, wish: Ask, *, here: bool = True, ahead: int = 0) -> Forward | None:
    """A seat as the dispatcher takes it, given back at once."""
    found = a.router.forward(wish, here=here, since=trio.current_time(), ahead=ahead)
    if found is not None:
        found.release(complete=True)
    return found


def place(a: Neighbourhood, wish: Ask, *, here: bool = True, ahead: int = 0) -> str:
    found = forward(a, wish, here=here, ahead=ahead)
    return found.node if found is not None else ""


async def test_without_a_peer_that_has_it_nothing_is_reckoned(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
        a.peer("b", "other:default")
        a.router._current = None  # type: ignore[assignment]
        assert place(a, ask()) == ""
        assert not a.router.has_choice(ask())


async def test_its_own_situation(autojump_clock: MockClock) -> None:
    """What is told to a peer leaves out what that peer sent."""
    async with neighbourhood(
        {"m": [Play(load=4, slots=2)]}, [M], model_defaults={"max_instances_per_model": 2}
    ) as a:
        assert a.router.situation(KEY) == Situation(room_ms=0.0)
        clients = await a.here.clients(3, M)
        await trio.sleep(1)
        now = a.router.situation(KEY)
        assert (now.slots, now.others) == (0, 3)
        assert now.loading_slots >= 1
        assert now.loading_left_ms == pytest.approx(4000)  # of the 5 s of who knows nothing
        await trio.sleep(20)
        now = a.router.situation(KEY)
        assert (now.slots, now.others, now.loading_left_ms) == (4, 3, None)
        assert now.room_ms is None  # two are all there may be
        a.router.requests["z", KEY] = 2
        assert a.router.situation(KEY, "z").others == 1
        a.router.requests.clear()
        for client in clients:
            assert client.lease is not None
            client.lease.release()
        assert a.router.situation("unknown:default") == Situation(room_ms=None)


async def test_a_failing_profile_says_so(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0, fails=True)]}, [M]) as a:
        [client] = await a.here.clients(1, M)
        await trio.sleep(60)
        assert client.error is not None
        assert a.router.situation(KEY).failing


async def test_who_is_ahead_counts(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
        lease = await get(a.here.dispatch, M)
        a.peer("b", KEY, others=3)
        a.router.learn(ask(), Usage(), 1.0, 0)
        assert a.router.outlook(M, ahead=0).queued == 0
        assert a.router.outlook(M, ahead=2).queued == 2
        assert [place(a, ask(), ahead=number) for number in (0, 1, 4, 9)] == ["", "", "b", "b"]
        lease.release()


async def test_what_was_learned_decides(autojump_clock: MockClock) -> None:
    async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
        (await get(a.here.dispatch, M)).release()
        usage = Usage(prompt_tokens=100, completion_tokens=100, predicted_ms=5000, prompt_ms=200)
        for _ in range(30):
            a.router.learn(ask(), usage, 5.2, 0)
        assert a.router.speeds(KEY).decode_ms == pytest.approx(50)
        a.peer("b", KEY, service_ms=1000.0, decode_ms=5.0, prefill_ms=1.0, requests=64)
        assert place(a, ask(features=Features(output_tokens=100))) == "b"
        # The limit that a client names is seldom used up: the usual answer counts.
        features = Features(prompt_tokens=10, output_tokens=100_000, number=3)
        assert a.router._features(ask(features=features)) == Features(
            prompt_tokens=10, output_tokens=100, number=3
        )
        assert a.router._features(ask(features=Features(output_tokens=7))) == Features(output_tokens=7)


async def test_learned_values_of_an_earlier_life(autojump_clock: MockClock) -> None:
    async with neighbourhood({}, [M]) as a:
        a.here.learned.of(KEY).speeds = {"requests": "nonsense"}
        assert a.router.speeds(KEY).requests == 0
        a.router.learn(ask(), Usage(), 2.0, 0)
        assert a.here.learned.of(KEY).speeds["service_ms"] == 2000


async def test_contexts(autojump_clock: MockClock) -> None:
    """A prompt that is too long for a peer stays away from it, and goes somewhere in the end."""
    async with neighbourhood({"m": [Play(load=0)]}, [M]) as a:
        (await get(a.here.dispatch, M)).release()
        held = await get(a.here.dispatch, M)
        a.peer("b", KEY, context_length=1000)
        a.peer("c", KEY, context_length=4000, others=2)
        sized = {tokens: ask(features=Features(prompt_tokens=tokens)) for tokens in (900, 3000, 9000)}
        assert place(a, sized[900]) == "b"
        assert not a.router.has_choice(sized[9000])
        assert a.router.has_choice(sized[3000])
        assert place(a, sized[9000]) == ""
        assert place(a, sized[9000], here=False) == "c"
        held.release()


async def test_hops_origin_and_here_only(autojump_clock: MockClock) -> None:
    async with neighbourhood({}, [M], max_hops=4) as a:
        a.peer("b", KEY)
        passing = Travel("z", hops=1, via=("z",))
        assert place(a, ask(FAR)) == "b"
        assert place(a, ask(FAR, travel=passing), here=False) == "b"
        assert place(a, ask(travel=passing), here=False) == ""
        assert place(a, ask(FAR, travel=replace(passing, hops=3)), here=False) == "b"
        for unwanted in (
            ask(FAR, travel=replace(passing, hops=4)),
            ask(FAR, travel=replace(passing, via=("b", "z"))),
            ask(FAR, excluded=frozenset("b")),
            ask(here_only=True),
        ):
            assert place(a, unwanted, here=False) == ""
            assert not a.router.has_choice(unwanted)


async def test_a_seat_that_isnt_to_be_had(autojump_clock: MockClock) -> None:
    """The best one's breaker changed its mind: the next best is asked."""
    async with neighbourhood() as a:
        a.peer("b", KEY)
        a.peer("c", KEY, others=4)
        real, shut = a.peers.seat, {"b"}
        a.peers.seat = lambda node, *more: None if node in shut else real(node, *more)  # type: ignore[method-assign]
        assert place(a, ask(FAR)) == "c"
        shut.add("c")
        assert place(a, ask(FAR)) == ""


async def test_how_long_it_may_wait_there(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        a.peer("b", KEY)
        alone = forward(a, ask(FAR))
        assert alone is not None
        assert alone.max_wait_ms is None
        a.peer("c", KEY, others=3)
        best = forward(a, ask(FAR))
        assert best is not None
        assert (best.node, best.fingerprint) == ("b", "")
        assert best.max_wait_ms is not None
        assert best.max_wait_ms >= 100


async def test_many_equal_ones_are_spread(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        for name in "bcdef":
            a.peer(name, KEY, slots=4)
        seats = [
            a.router.forward(ask(FAR, features=Features(number=number)), here=False, since=0.0)
            for number in range(20)
        ]
        nodes = [seat.node for seat in seats if seat is not None]
        assert sorted(nodes) == sorted("bcdef" * 4)
        for seat in seats:
            assert seat is not None
            seat.release()


# Embeddings.


async def test_embeddings_of_two_fingerprints_never_mix(autojump_clock: MockClock) -> None:
    async with neighbourhood({"e": [Play(load=0)]}, [EMBED]) as a:
        ours = a.router.fingerprint(EMBED)
        assert ours is not None
        a.peer("b", EMBED.key, kind="embedding", fingerprint="other")
        assert place(a, ask(EMBED), here=False) == ""
        a.peer("c", EMBED.key, kind="embedding", fingerprint=ours, others=9)
        found = forward(a, ask(EMBED), here=False)
        assert found is not None
        assert (found.node, found.fingerprint) == ("c", ours)


@pytest.mark.parametrize("known", ["not at all", "listed"])
async def test_nor_where_only_peers_have_it(known: str, autojump_clock: MockClock) -> None:
    """The entry has no weights of its own, so it sticks to one version of theirs, whoever is busy."""
    wanted = (
        elsewhere("e", kind="embedding")
        if known == "not at all"
        else profile("e", kind="embedding", max_instances=0)
    )
    async with neighbourhood({}, [] if known == "not at all" else [wanted]) as a:
        a.peer("b", "e:default", kind="embedding", fingerprint="one", others=50)
        a.peer("c", "e:default", kind="embedding", fingerprint="one", others=60)
        d = a.peer("d", "e:default", kind="embedding", fingerprint="two")
        found = forward(a, ask(wanted))
        assert found is not None
        assert (found.node, found.fingerprint) == ("b", "one")
        # Who connects two nodes uses what the entry uses.
        passing = Travel("z", hops=1, via=("z",), fingerprint="two")
        assert place(a, ask(wanted, travel=passing), here=False) == "d"
        assert place(a, ask(wanted, travel=replace(passing, fingerprint="three")), here=False) == ""
        # It stays so while anybody has it.
        a.peers.forget("c")
        a.peer("f", "e:default", kind="embedding", fingerprint="two")
        assert place(a, ask(wanted)) == "b"
        a.peers.forget("b")
        assert place(a, ask(wanted)) in ("d", "f")
        assert d.breaker.state.value == "closed"


async def test_text_of_any_version_will_do(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        a.peer("b", KEY, fingerprint="one", others=3)
        a.peer("c", KEY, fingerprint="two")
        assert place(a, ask(FAR)) == "c"


async def test_who_runs_something_else_says_so(autojump_clock: MockClock) -> None:
    async with neighbourhood({}, [EMBED, M]) as a:
        same = Travel("z", fingerprint=a.router.fingerprint(EMBED) or "")
        assert not a.router.differs(EMBED, same)
        assert a.router.differs(EMBED, replace(same, fingerprint="other"))
        assert not a.router.differs(EMBED, replace(same, fingerprint=""))
        assert not a.router.differs(M, replace(same, fingerprint="other"))
        assert not a.router.differs(elsewhere("e", kind="embedding"), replace(same, fingerprint="other"))
