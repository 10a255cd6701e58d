"""A child's output as lines that are safe to show: cut, cleaned, and the last ones kept."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

__all__ = ["LINE_CHARACTERS", "TAIL_LINES", "LineCutter", "LogTail"]

TAIL_LINES = 200
LINE_CHARACTERS = 4096
# UTF-8 takes at most four bytes for a character, so this many bytes always hold a full line.
_LINE_BYTES = 4 * LINE_CHARACTERS

# Terminal sequences go as a whole (else "[0m" stays), then every other control character, then what
# reorders or breaks a line on a terminal: a log line of a child must not be able to forge one of ours.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def _readable(raw: bytes) -> str:
    text = _SEQUENCE.sub("", raw.decode("utf-8", "replace")).replace("\t", " ")
    return _CONTROL.sub("", text)[:LINE_CHARACTERS].rstrip()


class LineCutter:
    """Turns chunks of bytes into clean lines, in bounded memory whatever the child writes.

    A line ends at `\\n` or `\\r` (progress bars use the latter), is UTF-8 with replacement characters for
    what isn't, has no control characters and at most `LINE_CHARACTERS`; what is longer is cut off. Empty
    lines are dropped.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The lines that `chunk` completes, in order."""
        *whole, rest = chunk.replace(b"\r", b"\n").split(b"\n")
        for piece in whole:
            # Cut before decoding: what lies behind the limit isn't worth the work.
            line = _readable((self._rest + piece)[:_LINE_BYTES])
            self._rest = b""
            if line:
                yield line
        self._rest = (self._rest + rest)[:_LINE_BYTES]

    def finish(self) -> Iterator[str]:
        """The last line, if the output ended without a line end."""
        yield from self.feed(b"\n")


class LogTail:
    """The last `TAIL_LINES` lines of a child's output, oldest first; `total` counts all there ever were."""

    def __init__(self) -> None:
        self.total = 0
        self._lines: deque[str] = deque(maxlen=TAIL_LINES)

    def append(self, line: str) -> None:
        """Keep one clean line; the oldest goes when there are too many."""
        self.total += 1
        self._lines.append(line)

    def lines(self) -> list[str]:
        """A copy of what is kept."""
        return list(self._lines)

    def last_words(self, n: int) -> str:
        """The last `n` lines as one text, for an error message; "" when there are none."""
        return "\n".join(self.lines()[-n:]) if n > 0 else ""
