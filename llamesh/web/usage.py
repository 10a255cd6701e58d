"""Count tokens from what passes by, without decoding it.

llama-server ends each answer, streamed or not, with `usage` and `timings`. Only the last pieces
of the body are kept, and looked at once, at the end. Inside text a quote is escaped, so the
patterns can't match what a model wrote.
"""

from __future__ import annotations

import re
from collections import deque

from llamesh.telemetry.stats import Usage

# The last event with its usage, the `[DONE]` behind it, and room for both being cut into pieces.
_KEEP_PIECES = 6
_KEEP_BYTES = 16_384

# Embeddings have it in front of their numbers.
_KEEP_START = 1024

_NUMBER = re.compile(
    rb'"(completion_tokens|output_tokens|prompt_tokens|input_tokens'
    rb'|predicted_n|cache_n|prompt_n|predicted_ms|prompt_ms)"\s*:\s*(\d+(?:\.\d+)?)'
)


class UsageScan:
    """Feed it the pieces of a body as they pass; `result` at the end."""

    __slots__ = ("_events", "_pieces", "_start", "_streams")

    def __init__(self, *, streams: bool) -> None:
        self._pieces: deque[bytes] = deque(maxlen=_KEEP_PIECES)
        self._streams = streams
        self._events = 0
        self._start = b""

    def feed(self, piece: bytes) -> None:
        """Note one piece; costs one search in C."""
        if self._streams:
            self._events += piece.count(b"data: ")
        elif not self._pieces:
            self._start = piece[:_KEEP_START]
        self._pieces.append(piece)

    def result(self) -> Usage:
        """The tokens of the answer; of a stream that was cut, its events so far."""
        tail = b"".join(self._pieces)[-_KEEP_BYTES:]
        found = _numbers(tail) or _numbers(self._start)
        usage = Usage()
        generated = (
            found.get(b"predicted_n") or found.get(b"completion_tokens") or found.get(b"output_tokens")
        )
        if generated is not None:
            usage.completion_tokens = int(float(generated))
        elif self._streams:
            usage.completion_tokens = self._events
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


def _numbers(data: bytes) -> dict[bytes, bytes]:
    """The figures of the last `usage` and `timings` in `data`; looks only from there on."""
    starts = [at for at in (data.rfind(b'"usage"'), data.rfind(b'"timings"')) if at >= 0]
    return dict(_NUMBER.findall(data, min(starts))) if starts else {}
