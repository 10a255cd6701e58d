"""Records of requests and the feed of events: bounded, and right whenever somebody looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from llamesh.errors import CancelledByOperator, LlameshError
from llamesh.telemetry.feed import describe
from llamesh.telemetry.logs import get_logger, listen
from llamesh.telemetry.recorder import Record, Recorder


@dataclass
class Sink:
    """Where an answer goes."""

    errors: list[LlameshError] = field(default_factory=list)

    def cancel(self, error: LlameshError) -> None:
        self.errors.append(error)


@dataclass
class Count:
    events: int
    first_token: float | None = None


@dataclass
class Terms:
    node: str
    total: float


def begun(recorder: Recorder, id: str = "r", sink: Sink | None = None) -> Record:  # noqa: A002
    return recorder.begin(id, b"/v1/chat/completions", 1.0, answer=sink or Sink())


def test_a_request_is_live_until_it_ends_and_can_be_found_ever_after() -> None:
    recorder = Recorder()
    record = begun(recorder)
    assert recorder.live == {"r": record}
    assert recorder.find("r") is record
    recorder.end(record)
    assert recorder.live == {}
    assert recorder.find("r") is record
    assert (record.phase, record.answer, record.way, record.count) == ("done", None, None, None)
    assert recorder.find("another") is None


def test_the_last_ones_stay_and_the_newest_comes_first() -> None:
    recorder = Recorder(most_requests=1000)
    for number in range(5000):
        recorder.end(begun(recorder, f"r{number}"))
    assert [record.id for record in recorder.ended()] == [f"r{n}" for n in range(4999, 3999, -1)]
    assert recorder.find("r4000") is not None
    assert recorder.find("r3000") is None


def test_what_was_packed_is_as_it_was() -> None:
    recorder = Recorder()
    record = begun(recorder, "packed/1 é")
    record.via, record.model, record.tries = ("a", "b"), "m:default", ["one", "two"]
    record.first_token_ms, record.status, record.tokens = 1.25, 200, 7
    record.decision = [Terms("b", float("inf"))]
    recorder.end(record)
    for number in range(300):
        recorder.end(begun(recorder, f"later {number}"))
    found = recorder.find("packed/1 é")
    assert found is not None
    assert found is not record
    for name in Record.__struct_fields__:
        if name not in ("decision", "via"):
            assert getattr(found, name) == getattr(record, name), name
    assert tuple(found.via) == ("a", "b")
    assert list(found.decision) == [{"node": "b", "total": float("inf")}]
    assert recorder.find("packed/1") is None


def test_an_id_that_is_used_twice_at_once_names_two_requests() -> None:
    recorder = Recorder()
    first, second, third = begun(recorder), begun(recorder), begun(recorder)
    assert [one.id for one in (first, second, third)] == ["r", "r#2", "r#3"]
    recorder.end(second)
    assert set(recorder.live) == {"r", "r#3"}


def test_of_an_id_that_is_used_again_the_newest_is_found() -> None:
    recorder = Recorder()
    recorder.end(begun(recorder))
    newest = begun(recorder)
    recorder.end(newest)
    assert recorder.find("r") is newest


def test_cancelling_ends_what_is_under_way_and_says_why() -> None:
    recorder, sink = Recorder(), Sink()
    record, error = begun(recorder, sink=sink), CancelledByOperator("enough")
    assert recorder.cancel("r", error)
    assert sink.errors == [error]
    assert (record.error, record.message) == ("cancelled_by_operator", "enough")
    recorder.end(record)
    assert not recorder.cancel("r", error)
    assert not recorder.cancel("never seen", error)
    assert sink.errors == [error]


def test_tokens_are_counted_while_they_pass_and_only_where_they_are_made() -> None:
    recorder = Recorder()
    here, forwarded = begun(recorder, "here"), begun(recorder, "forwarded")
    here.instance, here.count = "m:default#1", Count(7)
    forwarded.peer, forwarded.count = "node-b", Count(100)
    assert recorder.tokens_now() == 7
    assert here.tokens_so_far == 7
    here.tokens, forwarded.tokens = 9, 100
    recorder.end(here)
    recorder.end(forwarded)
    assert recorder.tokens_now() == recorder.served_tokens == 9


def test_the_time_to_the_first_token_is_there_while_it_streams_and_afterwards() -> None:
    recorder = Recorder()
    record = begun(recorder)
    record.streams = True
    record.count = count = Count(0)
    assert record.first_token_so_far is None
    count.first_token = 0.25
    assert record.first_token_so_far == 250
    recorder.end(record)
    assert record.first_token_so_far == record.first_token_ms == 250


def test_of_many_candidates_the_best_are_remembered() -> None:
    recorder = Recorder()
    record = begun(recorder)
    record.decision = [Terms(f"n{cost}", float(cost)) for cost in range(100, 0, -1)]
    recorder.end(record)
    assert [terms.node for terms in record.decision] == [f"n{cost}" for cost in range(1, 9)]


def test_events_are_numbered_and_the_last_ones_stay() -> None:
    recorder = Recorder(most_events=3)
    for number in range(5):
        recorder.event("info", "e", f"text {number}")
    assert [one.id for one in recorder.events()] == [3, 4, 5]
    assert [one.text for one in recorder.events(1)] == ["text 4"]
    assert [one.id for one in recorder.events(after=4)] == [5]
    assert recorder.events(after=99) == []


def test_a_long_text_is_cut() -> None:
    recorder = Recorder()
    record = begun(recorder)
    record.note_try("x" * 100_000)
    recorder.event("error", "e", "x" * 100_000)
    assert record.tries is not None
    assert len(record.tries[0]) == len(recorder.events()[0].text) == 1000


@pytest.mark.parametrize(
    ("level", "fields", "said"),
    [
        ("info", {"event": "request", "request_id": "r"}, None),
        ("debug", {"event": "state", "instance": "m:default#1"}, None),
        ("info", {"event": "peer joined", "peer": "b"}, ("info", "node b has joined the mesh", "b")),
        ("info", {"event": "peer doesn't answer", "peer": "b"}, ("warning", "node b doesn't answer", "b")),
        (
            "warning",
            {"event": "peer lost", "peer": "b", "request_id": "r", "error": "cut"},
            ("warning", "a request was lost with node b: cut", "b"),
        ),
        (
            "error",
            {"event": "start failed", "instance": "m:default#1", "error": "no file"},
            ("error", "m:default#1 failed to start: no file", "m:default#1"),
        ),
        # What nobody wrote a sentence for, and what lacks a field that its sentence needs.
        ("warning", {"event": "odd", "logger": "x", "a": 1, "b": "two"}, ("warning", "odd: a 1, b two", "")),
        ("critical", {"event": "bad"}, ("error", "bad", "")),
        ("info", {"event": "ready", "instance": "i"}, ("info", "ready: instance i", "i")),
        # A value isn't a sentence: what looks like a field stays as it is.
        (
            "info",
            {"event": "gone", "instance": "{peer}", "reason": "{0.__class__}"},
            ("info", "{peer} has ended: {0.__class__}", "{peer}"),
        ),
    ],
)
def test_lines_of_the_log_become_sentences(
    level: str, fields: dict[str, Any], said: tuple[str, str, str] | None
) -> None:
    found = describe(level, fields)
    assert (found and (found[0], found[2], found[3])) == said


def test_a_listener_hears_clean_lines_until_it_ends(capsys: pytest.CaptureFixture[str]) -> None:
    recorder, log = Recorder(), get_logger("test")
    stop = listen(recorder.hear)
    try:
        log.info("request", request_id="r")
        log.error("start failed", instance="m:default#1", error="Bearer abc", api_key="abc")
    finally:
        stop()
    log.error("start failed", instance="m:default#2", error="later")
    [event] = recorder.events()
    assert event.text == "m:default#1 failed to start: Bearer [hidden]"
    assert event.subject == "m:default#1"
    assert "abc" not in event.text
    capsys.readouterr()


def test_a_listener_that_fails_costs_nobody_anything(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(level: str, fields: object) -> None:
        raise RuntimeError("a defect")

    stop = listen(broken)
    try:
        get_logger("test").error("something")
    finally:
        stop()
    assert "something" in capsys.readouterr().err
