"""What a node tells of its profiles: seldom, truly, and with a fingerprint of what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from llamesh.config.cookbook import Cookbook, HubFile, ModelPath, Profile
from llamesh.core.offers import Situation, decode_offer
from llamesh.dispatch.offering import Offering
from llamesh.telemetry.stats import Usage
from tests.support.neighbours import Neighbourhood, neighbourhood
from tests.support.scripted import Play, get, profile

M = profile()
KEY = "m:default"


def offering(a: Neighbourhood, *, unwilling: str = "", status: str = "unloaded") -> Offering:
    return Offering(
        a.here.current,
        a.here.pool,
        a.here.dispatch,
        a.router,
        a.here.learned,
        status=lambda profile: status,
        summary=lambda: {"one": 1},
        unwilling=lambda: unwilling,
    )


async def test_an_offer_of_each_profile(autojump_clock: MockClock) -> None:
    listed = profile("n", max_instances=0, kind="rerank")
    async with neighbourhood({}, [M, listed]) as a:
        a.here.current.cookbook = Cookbook((M, listed), {"best": "M", "other": "x"})
        told = offering(a).entries()
        assert sorted(told) == ["p:m:default", "p:n:default"]
        one, two = (decode_offer(told[key]) for key in sorted(told))
        assert one is not None
        assert two is not None
        assert (one.model, one.profile, one.aliases, one.runs, one.kind) == (
            "m",
            "default",
            ("best",),
            True,
            "text",
        )
        assert (two.runs, two.kind, two.aliases) == (False, "rerank", ())
        assert one.fingerprint != two.fingerprint


async def test_what_moves_all_the_time_isnt_told_all_the_time(autojump_clock: MockClock) -> None:
    """Only when a value has moved by a quarter; else all nodes of the mesh would hear of each request."""
    async with neighbourhood({}, [M]) as a:
        some = offering(a)
        ask = type("A", (), {"profile": M})()

        def learn(seconds: float, times: int = 1) -> int:
            told = set()
            for _ in range(times):
                usage = Usage(completion_tokens=10, predicted_ms=seconds * 1000)
                a.router.learn(ask, usage, seconds, 0)
                told.add(some.entries()[f"p:{KEY}"])
            return len(told)

        learn(1.0, 40)
        assert learn(1.1, 40) == 1
        assert learn(1.0, 40) == 1
        assert 1 < learn(2.0, 40) < 8
        assert some.entries()[f"p:{KEY}"] is some.entries()[f"p:{KEY}"]


@pytest.mark.parametrize(
    ("status", "told"),
    [("loaded", "loaded"), ("failed", "failed"), ("queued", "unloaded"), ("loading", "unloaded")],
)
async def test_states_that_pass_arent_told(status: str, told: str, autojump_clock: MockClock) -> None:
    async with neighbourhood({}, [M]) as a:
        offer = decode_offer(offering(a, status=status).entries()[f"p:{KEY}"])
        assert offer is not None
        assert offer.status == told


async def test_news_for_one_peer(autojump_clock: MockClock) -> None:
    idle = profile("idle")
    async with neighbourhood({"m": [Play(load=0, slots=2)]}, [M, idle]) as a:
        some = offering(a)
        lease = await get(a.here.dispatch, M)
        a.here.dispatch.count_origin("z", KEY, 1)
        assert some.news("z").profiles == {KEY: Situation(slots=2, others=0, room_ms=None)}
        assert some.news("y").profiles == {KEY: Situation(slots=2, others=1, room_ms=None)}
        assert (some.news("y").closed, some.news("y").summary) == ("", {"one": 1})
        a.here.dispatch.count_origin("z", KEY, -1)
        lease.release()
        assert offering(a, unwilling="it is on battery").news("y").closed == "it is on battery"
        a.here.dispatch.drained = True
        assert offering(a, unwilling="it is on battery").news("y").closed == "is draining"
        a.here.dispatch.drained = False


# Fingerprints.


def one(source: Any = None, *arguments: str, **more: Any) -> Profile:
    source = source or ModelPath("/models/a.gguf")
    return Profile("m", "default", "", "", source, arguments=arguments, **more)


SAME = [
    (one(), one(ModelPath("/elsewhere/a.gguf"))),
    (one(None, "-c", "4096", "--pooling", "mean"), one(None, "--pooling", "mean", "-c", "4096")),
    (one(None, "-ngl", "99", "-t", "8", "--mlock"), one(None, "--threads", "2")),
    (one(None, "--gpu-layers=99", "-np", "4"), one()),
    (one(), one(idle_timeout_seconds=5.0, max_instances=3)),
    (one(HubFile("x/y", None)), one(HubFile("x/y", None), "--port", "1")),
]
DIFFERENT = [
    (one(), one(ModelPath("/models/b.gguf"))),
    (one(), one(None, "--pooling", "mean")),
    (one(None, "--pooling", "cls"), one(None, "--pooling", "mean")),
    (one(), one(kind="embedding")),
    (one(HubFile("x/y", None)), one(HubFile("x/y", "z.gguf"))),
    (one(HubFile("x/y", None)), one(HubFile("x/z", None))),
    (one(None, "--mlock", "--pooling", "mean"), one(None, "--mlock", "mean")),
]


@pytest.mark.parametrize(("left", "right"), SAME)
async def test_what_comes_out_the_same(left: Profile, right: Profile, autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        assert offering(a).fingerprint(left) == offering(a).fingerprint(right)


@pytest.mark.parametrize(("left", "right"), DIFFERENT)
async def test_what_comes_out_differently(left: Profile, right: Profile, autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        assert offering(a).fingerprint(left) != offering(a).fingerprint(right)


async def test_the_size_of_the_weights_counts(tmp_path: Path) -> None:
    first, second = tmp_path / "1" / "a.gguf", tmp_path / "2" / "a.gguf"
    for path, size in ((first, 100), (second, 200)):
        path.parent.mkdir()
        path.write_bytes(b"x" * size)
    profiles = [one(ModelPath(str(path))) for path in (first, second, tmp_path / "missing" / "a.gguf")]
    async with neighbourhood({}, profiles) as a:
        some = offering(a)
        assert len({some.fingerprint(each) for each in profiles}) == 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(some.run)
            with trio.fail_after(20):
                while not some._sizes:
                    await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
        assert len({some.fingerprint(each) for each in profiles}) == 3


async def test_telling_how_it_is_fetches_nothing(autojump_clock: MockClock) -> None:
    """Whoever probes asks about every profile: that mustn't start their downloads."""
    absent = Profile("h", "default", "", "", HubFile("owner/name", None))
    async with neighbourhood({}, [absent]) as a:
        news = offering(a).news("b")
        situation = news.profiles["h:default"]
        assert situation.room_ms == 0
        assert situation.download_ms > 0
        assert a.router.outlook(absent, ahead=0).download_ms == situation.download_ms
        assert a.here.pool.weights.progress(absent) is None
