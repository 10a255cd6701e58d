"""Many viewers of one stream: what each gets, who is dropped, what it costs."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
import trio
from msgspec.structs import replace

from llamesh.errors import LlameshError
from llamesh.net.exchange import Headers
from llamesh.web.history import sum_up
from llamesh.web.state_merge import merge
from llamesh.web.state_schema import SECTIONS, Document, Event, Instance, Node, Part
from llamesh.web.state_stream import BEAT_SECONDS, StateStream, TooManyViewers


class Source:
    """Makes the document, and counts how often."""

    def __init__(self) -> None:
        own = Part(node=Node(id="a"), models=[], instances=[], requests=[], attention=[], events=[])
        self.document: Document = merge(own, [], sum_up([], 0.0), 0.0)
        self.made = 0

    async def __call__(self) -> Document:
        self.made += 1
        return replace(self.document, time=trio.current_time())

    def happen(self, text: str) -> None:
        events = self.document.events
        self.document = replace(
            self.document, events=[*events, Event(len(events) + 1, 0.0, "info", "a", "e", text)]
        )


class Viewer:
    """A sink that keeps what comes, or takes nothing any more."""

    def __init__(self) -> None:
        self.started = False
        self.events: list[tuple[str, str, dict[str, Any]]] = []  # id, event, data
        self.headers: Headers = []
        self.reads = True
        self.left = False
        self.scope = trio.CancelScope()

    def start(self, status: int, headers: Headers, *, length: int | None) -> None:
        assert (status, length) == (200, None)
        self.started, self.headers = True, headers

    async def write(self, data: bytes) -> None:
        if not self.reads:
            await trio.sleep_forever()
        if self.left:
            raise BrokenPipeError
        await trio.lowlevel.checkpoint()
        for frame in data.decode().removesuffix("\n\n").split("\n\n"):
            fields = dict(line.split(": ", 1) for line in frame.split("\n"))
            self.events.append((fields["id"], fields["event"], json.loads(fields["data"])))

    async def flush(self) -> None: ...
    async def finish(self, data: bytes = b"") -> None: ...

    def abort(self) -> None:
        self.scope.cancel()

    def cancel(self, error: LlameshError) -> None: ...

    def kinds(self) -> list[str]:
        return [event for _, event, _ in self.events]


@asynccontextmanager
async def streaming(source: Source, **options: Any) -> AsyncIterator[tuple[StateStream, trio.Nursery]]:
    stream = StateStream(source, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run)
        yield stream, nursery
        nursery.cancel_scope.cancel()


async def watch(stream: StateStream, viewer: Viewer, last: str = "") -> None:
    with viewer.scope, suppress(BrokenPipeError):
        await stream.serve(viewer, last, viewer.abort, [])


async def test_a_snapshot_comes_first_and_holds_all(autojump_clock: trio.testing.MockClock) -> None:
    async with streaming(Source()) as (stream, nursery):
        viewer = Viewer()
        nursery.start_soon(watch, stream, viewer)
        await trio.testing.wait_all_tasks_blocked()
        [(_, event, data)] = viewer.events
        assert event == "snapshot"
        assert set(data) == {"schema", "node_id", "time", "version", *SECTIONS}
        assert (b"content-type", b"text/event-stream") in viewer.headers
        assert (b"x-accel-buffering", b"no") in viewer.headers


async def test_only_what_changed_is_told_at_most_once_a_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = Source()
    async with streaming(source) as (stream, nursery):
        viewer = Viewer()
        nursery.start_soon(watch, stream, viewer)
        await trio.sleep(0.5)
        for number in range(5):
            source.happen(str(number))
            await trio.sleep(0.01)
        await trio.sleep(5)
        changes = [data for _, event, data in viewer.events if event == "change"]
        assert [set(data) for data in changes] == [{"time", "events"}]
        assert [one["text"] for one in changes[0]["events"]] == ["0", "1", "2", "3", "4"]


async def test_a_quiet_stream_beats(autojump_clock: trio.testing.MockClock) -> None:
    async with streaming(Source()) as (stream, nursery):
        viewer = Viewer()
        nursery.start_soon(watch, stream, viewer)
        await trio.sleep(3 * BEAT_SECONDS + 2)
        assert viewer.kinds() == ["snapshot", "beat", "beat", "beat"]


async def test_all_viewers_share_one_look(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with streaming(source) as (stream, nursery):
        viewers = [Viewer() for _ in range(100)]
        for viewer in viewers:
            nursery.start_soon(watch, stream, viewer)
        await trio.sleep(10.5)
        assert source.made <= 13
        assert len({tuple(viewer.kinds()) for viewer in viewers}) == 1


async def test_nobody_looks_nothing_is_made(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with streaming(source) as (stream, nursery):
        viewer = Viewer()
        nursery.start_soon(watch, stream, viewer)
        await trio.sleep(2)
        viewer.abort()
        await trio.sleep(2)
        made = source.made
        await trio.sleep(100)
        assert source.made == made
        assert stream.viewers == 0


async def test_a_viewer_that_comes_back_goes_on_where_it_was(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with streaming(source) as (stream, nursery):
        stays, leaves, returns = Viewer(), Viewer(), Viewer()
        nursery.start_soon(watch, stream, stays)
        nursery.start_soon(watch, stream, leaves)
        await trio.sleep(1.5)
        source.happen("seen by both")
        await trio.sleep(1)
        leaves.abort()
        last = leaves.events[-1][0]
        source.happen("missed")
        await trio.sleep(1)
        nursery.start_soon(watch, stream, returns, last)
        await trio.sleep(1)
        assert returns.kinds() == ["change"]
        assert returns.events[0][2]["events"][-1]["text"] == "missed"
        assert returns.events[-1][0] == stays.events[-1][0]


async def test_what_was_missed_while_nobody_looked_comes_too(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with streaming(source) as (stream, nursery):
        viewer, returns = Viewer(), Viewer()
        nursery.start_soon(watch, stream, viewer)
        await trio.sleep(1.5)
        viewer.abort()
        await trio.sleep(5)
        source.happen("missed")
        nursery.start_soon(watch, stream, returns, viewer.events[-1][0])
        await trio.sleep(1.5)
        assert "snapshot" not in returns.kinds()
        told = [data for _, _, data in returns.events if "events" in data]
        assert told[0]["events"][-1]["text"] == "missed"


@pytest.mark.parametrize(
    "last", ["", "x", "another-1", "{epoch}-999", "{epoch}--1", "{epoch}-x", "-", "{epoch}-" + "9" * 400]
)
async def test_an_id_that_says_nothing_gets_a_snapshot(
    autojump_clock: trio.testing.MockClock, last: str
) -> None:
    async with streaming(Source()) as (stream, nursery):
        first, second = Viewer(), Viewer()
        nursery.start_soon(watch, stream, first)
        await trio.sleep(0.5)
        epoch = first.events[0][0].partition("-")[0]
        nursery.start_soon(watch, stream, second, last.replace("{epoch}", epoch))
        await trio.testing.wait_all_tasks_blocked()
        assert second.kinds() == ["snapshot"]


async def test_one_that_fell_behind_gets_a_snapshot_again(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with streaming(source) as (stream, nursery):
        stays, leaves, returns = Viewer(), Viewer(), Viewer()
        nursery.start_soon(watch, stream, stays)
        nursery.start_soon(watch, stream, leaves)
        await trio.sleep(1.5)
        leaves.abort()
        for number in range(200):
            source.happen(str(number))
            source.document = replace(source.document, events=source.document.events[-3:])
            await trio.sleep(1)
        nursery.start_soon(watch, stream, returns, leaves.events[-1][0])
        await trio.testing.wait_all_tasks_blocked()
        assert returns.kinds() == ["snapshot"]
        assert len(stays.events) > 200


async def test_who_does_not_read_is_dropped_and_holds_up_nobody(
    autojump_clock: trio.testing.MockClock,
) -> None:
    source = Source()
    async with streaming(source, stalled_seconds=20.0) as (stream, nursery):
        reads, stalls = Viewer(), Viewer()
        nursery.start_soon(watch, stream, reads)
        nursery.start_soon(watch, stream, stalls)
        await trio.sleep(1.5)
        stalls.reads = False
        for number in range(30):
            source.happen(str(number))
            await trio.sleep(1)
        assert stalls.scope.cancelled_caught
        assert stream.viewers == 1
        assert reads.kinds().count("change") == 30


async def test_who_left_is_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()
    async with streaming(source) as (stream, nursery):
        viewer = Viewer()
        nursery.start_soon(watch, stream, viewer)
        await trio.sleep(1)
        viewer.left = True
        source.happen("news")
        await trio.sleep(2)
        assert stream.viewers == 0


async def test_there_is_a_limit(autojump_clock: trio.testing.MockClock) -> None:
    async with streaming(Source(), most_viewers=3) as (stream, nursery):
        viewers = [Viewer() for _ in range(3)]
        for viewer in viewers:
            nursery.start_soon(watch, stream, viewer)
        await trio.sleep(1)
        with pytest.raises(TooManyViewers) as refused:
            await stream.serve(Viewer(), "", lambda: None, [])
        assert (refused.value.status, refused.value.retry_after) == (503, 30)
        viewers[0].abort()
        await trio.sleep(1)
        another = Viewer()
        nursery.start_soon(watch, stream, another)
        await trio.sleep(1)
        assert another.kinds() == ["snapshot"]


async def test_what_only_grows_older_is_not_news(autojump_clock: trio.testing.MockClock) -> None:
    source = Source()

    def age(seconds: float, busy: int = 0) -> None:
        known: dict[str, Any] = {"model": "m:default", "state": "ready", "slots": 1, "started": 0.0}
        one = Instance(node="a", id="m:default#1", busy=busy, age=seconds, **known)
        source.document = replace(source.document, instances=[one])

    age(0.0)
    async with streaming(source) as (stream, nursery):
        viewer = Viewer()
        nursery.start_soon(watch, stream, viewer)
        for second in range(8):
            await trio.sleep(1)
            age(float(second))
        assert viewer.kinds().count("change") <= 3
        before = len(viewer.events)
        age(8.0, busy=1)
        await trio.sleep(1.1)
        assert viewer.events[before][2]["instances"][0]["busy"] == 1


async def test_a_defect_in_the_document_ends_no_stream(
    autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    source, fails = Source(), False

    async def make() -> Document:
        if fails:
            raise RuntimeError("a defect")
        return await source()

    stream = StateStream(make)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.run)
        viewer = Viewer()
        nursery.start_soon(watch, stream, viewer)
        await trio.sleep(1.5)
        fails = True
        await trio.sleep(3)
        fails = False
        source.happen("well again")
        await trio.sleep(2)
        assert viewer.events[-1][2]["events"][-1]["text"] == "well again"
        nursery.cancel_scope.cancel()
    assert "a defect" in capsys.readouterr().err
