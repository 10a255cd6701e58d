"""Clients that leave and upstreams that break, in every phase, by every lane."""

from __future__ import annotations

from typing import Any

import pytest

from tests.web.raw import Cut, Http1, post
from tests.web.served import Asking, Served


def chat(model: str, *, stream: bool = True, **fake: Any) -> dict[str, Any]:
    return {"model": model, "messages": [], "stream": stream, "fake": fake}


def never(node: Served) -> str:
    """A file that nobody makes."""
    return str(node.directory / "never")


def counters(node: Served, model: str) -> dict[str, int]:
    found: dict[str, int] = node.page("/metrics/json")["hashes"][f"{model}:default"]
    return found


def assert_served(node: Served, lane: str, model: str) -> None:
    assert node.ask(lane, chat(model)).body.count(b"data: ") == 7
    node.wait(lambda: counters(node, model)["current_requests"] == 0, "no request left")


# Clients that leave.


@pytest.mark.parametrize("way", ["leave", "reset"])
def test_leaving_mid_stream(node: Served, lane: str, way: str) -> None:
    assert_served(node, lane, "one")
    aborted = node.fake("one")["aborted"]
    with Asking(node, lane, chat("one", gate=never(node), gate_after=2)) as asking:
        asking.until(b"t1 ")
        getattr(asking, way)()
        node.wait_fake("one", lambda s: s["aborted"] == aborted + 1 and s["running"] == 0, "an abort")
        assert_served(node, lane, "one")


def test_leaving_before_the_head_of_a_stream(node: Served, lane: str) -> None:
    assert_served(node, lane, "one")
    aborted = node.fake("one")["aborted"]
    with Asking(node, lane, chat("one", head_gate=never(node))) as asking:
        node.wait_fake("one", lambda s: s["running"] == 1, "the request at the fake")
        asking.leave()
    node.wait_fake("one", lambda s: s["aborted"] == aborted + 1 and s["running"] == 0, "an abort")
    assert_served(node, lane, "one")


def test_leaving_a_request_that_does_not_stream(node: Served, lane: str) -> None:
    """llama-server works on; the slot is given away only when it has ended."""
    assert_served(node, lane, "one")
    aborted = node.fake("one")["aborted"]
    gate = node.directory / f"gate-left-{lane}"
    with Asking(node, lane, chat("one", stream=False, head_gate=str(gate))) as asking:
        node.wait_fake("one", lambda s: s["running"] == 1, "the request at the fake")
        asking.leave()
    node.wait_fake("one", lambda s: s["aborted"] == aborted + 1, "an abort")
    with Asking(node, lane, chat("one")) as next_one:
        node.wait(lambda: counters(node, "one")["queue_len"] == 1, "the next one waits")
        gate.touch()
        assert next_one.answer().status == 200
    assert node.fake("one")["max_running"] == 1


def test_leaving_the_queue(node: Served, lane: str) -> None:
    assert_served(node, lane, "one")
    before = node.fake("one")["requests"]
    gate = node.directory / f"gate-queue-{lane}"
    with Asking(node, "fast", chat("one", gate=str(gate), gate_after=1)) as holder:
        holder.until(b"t0 ")
        for stream in (True, False):
            with Asking(node, lane, chat("one", stream=stream)) as waiting:
                node.wait(lambda: counters(node, "one")["queue_len"] == 1, "one in the queue")
                waiting.reset()
                node.wait(lambda: counters(node, "one")["queue_len"] == 0, "nobody in the queue")
        gate.touch()
        assert holder.answer().status == 200
    assert node.fake("one")["requests"] == before + 1
    assert_served(node, lane, "one")


def test_leaving_while_the_model_loads(node: Served, lane: str) -> None:
    model = f"late-left-{lane}"
    for stream in (True, False):
        with Asking(node, lane, chat(model, stream=stream)) as asking:
            node.wait(lambda: counters(node, model)["queue_len"] == 1, "one in the queue")
            asking.leave()
        node.wait(lambda: counters(node, model)["current_requests"] == 0, "no request left")
    (node.directory / f"ready-left-{lane}").touch()
    assert_served(node, lane, model)
    assert node.fake(model)["requests"] == 1


def test_a_reader_that_stops_is_waited_for_without_a_growing_buffer(node: Served, lane: str) -> None:
    assert_served(node, lane, "large")
    memory = node.process().memory_info().rss
    finished = node.fake("large")["finished"]
    with Asking(node, lane, chat("large", tokens=2000, pad=20_000)) as asking:
        asking.until(b"t0 ")
        fake = next(p for p in node.process().children(recursive=True) if _is_fake(p.cmdline(), "large"))
        seen: list[float] = []

        def stands_still() -> bool:
            seen.append(sum(fake.cpu_times()[:2]))
            return len(seen) > 30 and seen[-1] - seen[-30] < 0.015

        node.wait(stands_still, "the fake stands still")
        stats = node.fake("large")
        assert (stats["running"], stats["finished"]) == (1, finished)
        assert node.process().memory_info().rss - memory < 25 << 20
        body = asking.answer().body
        assert len(body) > 2000 * 20_000
        assert body.endswith(b"data: [DONE]\n\n")


def _is_fake(command: list[str], model: str) -> bool:
    return any(part.endswith(f"/{model}.json") for part in command)


# Upstreams that break.


@pytest.mark.parametrize("how", ["die_mid_stream", "cut_mid_stream"])
def test_a_stream_that_breaks_has_no_clean_end(node: Served, lane: str, how: str) -> None:
    fake: dict[str, Any] = {how: 2}
    with Asking(node, lane, chat("spare", **fake)) as asking:
        with pytest.raises(Cut) as caught:
            asking.answer()
        assert b"t0 " in caught.value.got
        assert b"t2 " not in caught.value.got
        assert b"[DONE]" not in caught.value.got
    assert_served(node, lane, "spare")


def test_a_body_that_breaks_has_no_clean_end(node: Served, lane: str) -> None:
    with Asking(node, lane, chat("spare", stream=False, cut_body=True)) as asking, pytest.raises(Cut):
        asking.answer()
    assert_served(node, lane, "spare")


@pytest.mark.parametrize("how", ["refuse", "garbage"])
def test_an_upstream_that_breaks_before_it_answers(node: Served, how: str) -> None:
    before = node.fake("m")["requests"] if node.ask("fast", chat("m")).status == 200 else 0
    reply = node.ask("fast", chat("m", **{how: True}))
    assert (reply.status, reply.error["type"]) == (502, "upstream_error")
    # Tried once more, and no oftener; a kept connection that breaks is replaced without counting.
    assert node.fake("m")["requests"] - before in (2, 3)


def test_a_death_before_the_first_byte_is_made_good(node: Served, lane: str) -> None:
    model = f"fragile-{lane}"
    assert_served(node, lane, model)
    assert len(node.find("starting")) >= 2
    assert node.find("upstream broke", instance=f"{model}:default#{_number(node, model, 0)}")


def _number(node: Served, model: str, index: int) -> str:
    starts = [e["instance"] for e in node.find("starting") if e["instance"].startswith(f"{model}:")]
    return str(starts[index].partition("#")[2])


@pytest.mark.parametrize(("model", "count"), [("short", 300), ("closes", 60)])
def test_upstreams_that_close_their_connections_fail_no_request(node: Served, model: str, count: int) -> None:
    with Http1(node.port) as client:
        for _ in range(count):
            client.send(post({"model": model, "prompt": "x", "max_tokens": 1}, "/v1/completions"))
            assert client.answer().status == 200
    assert node.fake(model)["finished"] == count
    assert len(node.find("upstream broke", model=model)) == 0


def test_silent_upstreams(impatient: Served, lane: str) -> None:
    reply = impatient.ask(lane, chat("m", stream=False, hang_before_head=True))
    assert (reply.status, reply.error["type"]) == (504, "request_timeout")
    with Asking(impatient, lane, chat("m", gate=never(impatient), gate_after=2)) as asking:
        with pytest.raises(Cut) as caught:
            asking.answer()
        assert b"t1 " in caught.value.got
    assert impatient.ask(lane, chat("m", token_delay=0.05)).body.endswith(b"[DONE]\n\n")


# Streams that wait.


def test_a_waiting_stream_hears_what_it_waits_for(node: Served, lane: str) -> None:
    with Asking(node, lane, chat(f"late-comments-{lane}")) as asking:
        asking.until(b": loading late-comments")
        (node.directory / f"ready-comments-{lane}").touch()
        reply = asking.answer()
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["x-request-id"]
    assert reply.body.startswith(b": loading")
    assert reply.body.endswith(b"data: [DONE]\n\n")


def test_a_waiting_stream_of_messages_is_pinged(node: Served, lane: str) -> None:
    with Asking(node, lane, chat(f"late-ping-{lane}"), "/v1/messages") as asking:
        asking.until(b"event: ping\ndata: ")
        (node.directory / f"ready-ping-{lane}").touch()
        assert b"\n: " not in asking.answer().body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
def test_errors_after_comments_are_events(node: Served, lane: str, path: str) -> None:
    start = b"event: error\ndata: " if path == "/v1/messages" else b"data: "
    model = "brief"
    with Asking(node, "fast", chat(model, gate=never(node), gate_after=1)) as holder:
        holder.until(b"t0 ")
        with Asking(node, lane, chat(model), path) as asking:
            body = asking.answer().body
    assert b'"type":"queue_timeout"' in body.split(start)[-1]
    assert b"[DONE]" not in body


def test_an_upstreams_error_after_comments_is_an_event(node: Served, lane: str) -> None:
    with Asking(node, lane, chat(f"late-error-{lane}", status=500)) as asking:
        asking.until(b": loading")
        (node.directory / f"ready-error-{lane}").touch()
        reply = asking.answer()
    assert reply.status == 200
    assert b'data: {"error":{"message":"told to fail"' in reply.body
