"""What a request leaves behind in the metrics, and what clients can't do to their labels."""

from __future__ import annotations

import random
import string

import trio
from trio.testing import MockClock

from llamesh.dispatch.lease import Travel
from llamesh.telemetry.exposition import exposition
from llamesh.telemetry.prometheus import Gauges, NodeCollector
from tests.support.neighbours import Neighbourhood, Talk, chat, neighbourhood, say
from tests.support.scripted import profile

KEY = "m:default"


async def scrape(a: Neighbourhood) -> str:
    gauges = Gauges({}, {}, ready=True)
    collector = NodeCollector(a.gateway.stats, lambda: gauges, lambda: {"version": "1"})
    return (await exposition(collector.families()))[1].decode()


async def test_model_names_of_clients_are_no_labels(autojump_clock: MockClock) -> None:
    chance = random.Random(1)
    letters = string.ascii_letters + ':/."{}\\\n\x00é☃'
    names = ["".join(chance.choices(letters, k=chance.randrange(1, 300))) for _ in range(300)]
    async with neighbourhood(cookbook=[profile()]) as a:
        before = len((await scrape(a)).splitlines())
        for name in names:
            answer = await a.ask(chat(name))
            assert answer.status in (400, 404)
        text = await scrape(a)
        assert len(text.splitlines()) <= before + 2
        assert set(a.gateway.stats.profiles) <= {KEY}
        assert sum(a.gateway.stats.rejected.values()) == len(names)
        assert set(a.gateway.stats.rejected) <= {"model_not_found", "invalid_request_error"}


async def test_nodes_that_call_themselves_something_new_each_time_are_few(autojump_clock: MockClock) -> None:
    count = 0

    async def liar(talk: Talk) -> None:
        nonlocal count
        while True:
            await talk.request()
            count += 1
            await talk.answer(200, b"{}", f"x-llamesh-node: n{count}")

    async with neighbourhood() as a:
        a.peer("b", KEY, part=liar)
        for _ in range(400):
            assert (await a.ask(chat("m"))).status == 200
        [stats] = a.gateway.stats.profiles.values()
        assert stats.requests_total == count == 400
        assert len({node for _, node, _ in stats.outcomes}) == 257
        assert len(a.gateway.stats.served_by) == 257


async def test_who_served_and_who_asked(autojump_clock: MockClock) -> None:
    async with neighbourhood() as a:
        a.peer("b", KEY, part=say("x-llamesh-node: b"))
        assert (await a.ask(chat("m"))).status == 200
        assert (await a.ask(chat("m"), travel=Travel("z", hops=1, via=("z",)))).status == 200
        stats = a.gateway.stats.profiles[KEY]
        assert stats.outcomes == {("ok", "b", "client"): 1, ("ok", "b", "peer"): 1}
        assert stats.instance_generated_total == 0


async def test_a_stream_is_timed_from_its_first_content(autojump_clock: MockClock) -> None:
    async def streams(talk: Talk) -> None:
        await talk.request()
        await talk.begin()
        await talk.chunk(b'data: {"choices":[{"delta":{"role":"assistant","content":null}}]}\n\n')
        await trio.sleep(3)
        for word in (b"a", b"b", b"c"):
            await talk.chunk(b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % word)
            await trio.testing.wait_all_tasks_blocked()
        await talk.chunk(b"data: [DONE]\n\n")
        await talk.send(b"0\r\n\r\n")
        await talk.request()
        await talk.answer()
        await talk.gone()

    async with neighbourhood() as a:
        a.peer("b", KEY, part=streams)
        assert (await a.ask(chat("m", stream=True))).finished
        stats = a.gateway.stats.profiles[KEY]
        assert sum(stats.first_token_seconds.counts) == 1
        assert sum(stats.inter_token_seconds.counts) == 2
        [record] = a.gateway.recorder.ended()
        assert record.first_token_ms is not None
        assert (await a.ask({"model": "m", "messages": []})).status == 200
        assert sum(stats.first_token_seconds.counts) == 1
        assert sum(stats.duration_seconds.counts) == 2
