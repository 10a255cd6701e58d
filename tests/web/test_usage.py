"""Tokens are counted from what passes by, however it is cut."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.telemetry.stats import INTER_TOKEN_BOUNDS, Histogram, Usage
from llamesh.web.usage import StreamScan, UsageScan

USAGE = {"usage": {"completion_tokens": 7, "prompt_tokens": 11, "total_tokens": 18}}
TIMINGS = {"timings": {"cache_n": 4, "prompt_n": 7, "predicted_n": 7, "predicted_ms": 3.5}}


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


WORDS = [event({"choices": [{"delta": {"content": f"t{number}"}}]}) for number in range(7)]
STREAM = b"".join([*WORDS, event({"choices": [], **USAGE, **TIMINGS}), b"data: [DONE]\n\n"])


def scan(*pieces: bytes, streams: bool = False) -> Usage:
    scanner = StreamScan(0.0) if streams else UsageScan()
    for piece in pieces:
        scanner.feed(piece)
    return scanner.result()


def test_a_whole_answer() -> None:
    assert scan(json.dumps({"choices": [], **USAGE, **TIMINGS}).encode()) == Usage(11, 4, 7, 3.5)


def test_a_stream() -> None:
    assert scan(STREAM, streams=True) == Usage(11, 4, 7, 3.5)


@given(st.integers(0, len(STREAM)), st.integers(0, len(STREAM)))
def test_the_cuts_of_a_stream_do_not_matter(one: int, two: int) -> None:
    one, two = sorted((one, two))
    assert scan(STREAM[:one], STREAM[one:two], STREAM[two:], streams=True) == Usage(11, 4, 7, 3.5)


def test_a_stream_that_was_cut_counts_its_events() -> None:
    assert scan(*WORDS[:4], streams=True).completion_tokens == 4


def test_of_several_answers_each_counts() -> None:
    usage = Usage(4, 3, 16, 2.0, 1.0)
    usage.multiply(3)
    assert usage == Usage(12, 9, 48, 6.0, 3.0)
    cut = Usage(completion_tokens=7)  # counted as they came
    cut.multiply(3)
    assert cut == Usage(completion_tokens=7)


def test_timings_alone() -> None:
    assert scan(json.dumps(TIMINGS).encode()) == Usage(11, 4, 7, 3.5)


def test_the_other_dialect() -> None:
    assert scan(b'{"usage": {"input_tokens": 3, "output_tokens": 5}}') == Usage(3, 0, 5, 0.0)


def test_embeddings_tell_it_before_a_long_list() -> None:
    start = b'{"model": "m", "usage": {"prompt_tokens": 9, "total_tokens": 9}, "data": ['
    assert scan(start + b"0.5, " * 20_000, *[b"0.25, " * 10_000] * 8, b"1]}").prompt_tokens == 9


def test_what_a_model_wrote_is_not_counted() -> None:
    written = json.dumps({"content": '"completion_tokens": 999, "prompt_tokens": 999'}).encode()
    assert scan(written) == Usage()
    assert scan(event({"content": '{"predicted_n": 999}'}), streams=True).completion_tokens == 1


def test_nothing() -> None:
    assert scan() == scan(b"") == Usage()


# Time to the first token, and between tokens.

ROLE = event({"choices": [{"delta": {"role": "assistant", "content": None}}]})
PROGRESS = event(
    {"choices": [{"delta": {"role": "assistant", "content": None}}], "prompt_progress": {"total": 9}}
)
END = STREAM[STREAM.index(b'data: {"choices": [], ') :]


class Clock:
    """Says what it is told to."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def timed(*pieces: tuple[float, bytes], after: float = 0.0) -> tuple[float | None, dict[float, int], float]:
    """Pieces, each with the seconds before it: the time to the first token, the histogram's counts by upper
    bound, and its sum.
    """
    clock, histogram = Clock(), Histogram(INTER_TOKEN_BOUNDS)
    scanner = StreamScan(after, clock)
    for seconds, piece in pieces:
        clock.now += seconds
        scanner.feed(piece)
    scanner.add_times(histogram)
    bounds = (*INTER_TOKEN_BOUNDS, float("inf"))
    found = {bound: count for bound, count in zip(bounds, histogram.counts, strict=True) if count}
    assert scanner.events == sum(piece.count(b"data: ") for _, piece in pieces)
    return scanner.first_token, found, histogram.total


def test_the_first_token_has_content() -> None:
    first, between, total = timed(
        (0.0, ROLE),
        (1.0, PROGRESS),
        (1.0, PROGRESS),
        (0.5, WORDS[0]),
        (0.02, WORDS[1]),
        (0.01, END),
        after=0.25,
    )
    assert first == pytest.approx(2.75)
    assert between == {0.02: 1} or between == {0.025: 1}
    assert total == pytest.approx(0.02)


@pytest.mark.parametrize(
    "content",
    [
        {"choices": [{"delta": {"reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}}]},
        {"choices": [{"text": " a"}]},
        {"type": "response.output_text.delta", "delta": "a"},
        {"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "a"}},
        {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "{"}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a"}},
        {"content": '"'},
    ],
)
def test_content_of_every_dialect(content: object) -> None:
    begins = [
        {"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 3}}},
        {"type": "content_block_start", "content_block": {"type": "text", "text": ""}},
        {"type": "response.content_part.added", "part": {"type": "output_text", "text": ""}},
        {"type": "response.output_item.added", "item": {"arguments": "", "content": []}},
        {"choices": [{"delta": {"role": "assistant", "content": None}}]},
        {"choices": [{"delta": {"content": ""}}]},
    ]
    before = [(1.0, event(one)) for one in begins]
    assert timed(*before)[0] is None
    assert timed(*before, (1.0, event(content)))[0] == len(before) + 1


def test_many_events_of_one_read_share_the_time_before_it() -> None:
    ten = b"".join(WORDS[:5] * 2)
    first, between, total = timed((0.0, WORDS[0]), (0.2, ten), (1.1, WORDS[1]), (0.0, END))
    assert first == 0.0
    assert between == {0.02: 10, 2.5: 1} or between == {0.025: 10, 2.5: 1}
    assert total == pytest.approx(1.3)


def test_the_read_that_ends_it_is_no_token() -> None:
    assert timed((0.0, WORDS[0]), (0.1, END))[1:] == ({}, pytest.approx(0.0))
    assert timed((0.0, STREAM))[1:] == ({}, 0.0)


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_wherever_it_is_cut_no_time_is_lost_and_no_event(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(STREAM)]
    pieces = [(1.0, STREAM[one:two]) for one, two in pairwise(at)]
    first, between, total = timed(*pieces)
    assert first is not None
    assert 0 <= total <= len(pieces) - first
    assert sum(between.values()) <= len(WORDS) + 1


def test_a_dialect_that_nobody_knows_begins_with_its_first_event() -> None:
    strange = [(1.0, event({"tokens": [number]})) for number in range(600)]
    assert timed(*strange[:500])[0] is None
    first, between, _ = timed(*strange)
    assert first == 1.0
    assert sum(between.values()) == 600 - 512 - 1


def test_what_is_no_stream_has_no_first_token() -> None:
    scanner = UsageScan()
    scanner.feed(json.dumps({"choices": [{"message": {"content": "a"}}]}).encode())
    assert (scanner.first_token, scanner.events) == (None, 0)
