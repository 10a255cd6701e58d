"""Tokens are counted from what passes by, however it is cut."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from llamesh.telemetry.stats import Usage
from llamesh.web.usage import UsageScan

USAGE = {"usage": {"completion_tokens": 7, "prompt_tokens": 11, "total_tokens": 18}}
TIMINGS = {"timings": {"cache_n": 4, "prompt_n": 7, "predicted_n": 7, "predicted_ms": 3.5}}


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


WORDS = [event({"choices": [{"delta": {"content": f"t{number}"}}]}) for number in range(7)]
STREAM = b"".join([*WORDS, event({"choices": [], **USAGE, **TIMINGS}), b"data: [DONE]\n\n"])


def scan(*pieces: bytes, streams: bool = False) -> Usage:
    scanner = UsageScan(streams=streams)
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
