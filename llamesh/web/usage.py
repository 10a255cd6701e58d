"""Count tokens, and time them, from what passes by, without decoding it.

llama-server ends each answer, streamed or not, with `usage` and `timings`. Only the last pieces
of the body are kept, and looked at once, at the end. Inside text a quote is escaped, so the
patterns can't match what a model wrote.

Time between tokens is taken once a read, not once a token: n events that came with one read, t seconds after
the one before, are n tokens of t/n each. The last read isn't counted: it ends the answer (`finish_reason`,
usage, `[DONE]`) and holds one token at most.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from time import perf_counter

from llamesh.telemetry.stats import INTER_TOKEN_BOUNDS, Histogram, Usage

# The last event with its usage, the `[DONE]` behind it, and room for both being cut into pieces.
_KEEP_PIECES = 6
_KEEP_BYTES = 16_384

# Embeddings have it in front of their numbers.
_KEEP_START = 1024

_NUMBER = re.compile(
    rb'"(completion_tokens|output_tokens|prompt_tokens|input_tokens'
    rb'|predicted_n|cache_n|prompt_n|predicted_ms|prompt_ms)"\s*:\s*(\d+(?:\.\d+)?)'
)


# The first piece of what a model writes, in any of the dialects: text, a thought, or a call of a tool. What
# comes before it has these names with null, "" or nothing behind them, or not at all: roles, progress, items
# that begin.
_CONTENT = re.compile(
    rb'"(?:content|reasoning_content|text|delta|thinking|partial_json|arguments|refusal)"\s*:\s*"(?!")'
    rb'|"tool_calls"\s*:\s*\['
)

# A stream that has said this much and nothing that looks like content speaks some other dialect.
_MOST_BEFORE = 512

_BUCKETS = len(INTER_TOKEN_BOUNDS) + 1


class UsageScan:
    """Of an answer that is no stream: feed it the pieces of the body as they pass; `result` at the end.

    first_token: seconds from the request to the first event with content. Here always None: what comes in one
    piece tells nothing.
    """

    __slots__ = ("_pieces", "_start", "first_token")

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque(maxlen=_KEEP_PIECES)
        self._start = b""
        self.first_token: float | None = None

    def feed(self, piece: bytes) -> None:
        """Note one piece."""
        if not self._pieces:
            self._start = piece[:_KEEP_START]
        self._pieces.append(piece)

    @property
    def events(self) -> int:
        """Events of a stream so far, about as many as tokens."""
        return 0

    def result(self) -> Usage:
        """The tokens of the answer; of a stream that was cut, its events so far."""
        tail = b"".join(self._pieces)[-_KEEP_BYTES:]
        found = _numbers(tail) or _numbers(self._start)
        usage = Usage()
        generated = (
            found.get(b"predicted_n") or found.get(b"completion_tokens") or found.get(b"output_tokens")
        )
        usage.completion_tokens = self.events if generated is None else int(float(generated))
        cached = int(float(found.get(b"cache_n", 0)))
        read = found.get(b"prompt_tokens") or found.get(b"input_tokens")
        if read is not None:
            usage.prompt_tokens = int(float(read))
        elif b"prompt_n" in found:
            usage.prompt_tokens = cached + int(float(found[b"prompt_n"]))
        usage.cached_tokens = cached
        usage.predicted_ms = float(found.get(b"predicted_ms", 0))
        usage.prompt_ms = float(found.get(b"prompt_ms", 0))
        return usage


class StreamScan(UsageScan):
    """Of a stream. `first_token` is None as long as there was no content."""

    __slots__ = (
        "_before",
        "_clock",
        "_counts",
        "_events",
        "_first",
        "_first_event",
        "_gap",
        "_last",
        "_made",
    )

    def __init__(self, after: float, clock: Callable[[], float] = perf_counter) -> None:
        """`after`: seconds since the request; `clock`: seconds since whenever."""
        self._pieces = deque(maxlen=_KEEP_PIECES)
        self._start = b""
        self.first_token = None
        self._clock = clock
        self._made = clock() - after
        self._before = 0  # events until the first content, its own read included
        # Of the events after that: those of the last read, seconds for each of them, and when it was; and
        # how many of those before it took how long. They aren't added up in the lists of a profile, where a
        # read that turns out to be the last couldn't be taken back.
        self._events = 0
        self._gap = 0.0
        self._first = self._last = self._first_event = 0.0
        self._counts: list[int] = []

    def feed(self, piece: bytes) -> None:
        """Note one piece. Once there was content, this costs a search in C and a look at the clock."""
        if self._counts:
            events = piece.count(b"data: ")
            if events:
                now = self._clock()
                self._counts[bisect_left(INTER_TOKEN_BOUNDS, self._gap)] += self._events
                self._gap = (now - self._last) / events
                self._last = now
                self._events = events
        else:
            self._begin(piece)
        self._pieces.append(piece)

    def _begin(self, piece: bytes) -> None:
        now = self._clock()
        if not self._before:
            self._first_event = now
        self._before += piece.count(b"data: ")
        # An event may be cut anywhere; two pieces are nearly always enough to see it whole.
        has_content = _CONTENT.search(self._pieces[-1] + piece if self._pieces else piece)
        if has_content or self._before >= _MOST_BEFORE:
            self.first_token = (now if has_content else self._first_event) - self._made
            self._first = self._last = now
            self._counts = [0] * _BUCKETS

    @property
    def events(self) -> int:
        """Events so far, about as many as tokens."""
        return self._before + sum(self._counts) + self._events

    def add_times(self, histogram: Histogram) -> None:
        """Count the times between the tokens. The histogram's bounds are INTER_TOKEN_BOUNDS."""
        if self._events:
            histogram.add(self._counts, self._last - self._first - self._gap * self._events)


def _numbers(data: bytes) -> dict[bytes, bytes]:
    """The figures of the last `usage` and `timings` in `data`; looks only from there on."""
    starts = [at for at in (data.rfind(b'"usage"'), data.rfind(b'"timings"')) if at >= 0]
    return dict(_NUMBER.findall(data, min(starts))) if starts else {}
