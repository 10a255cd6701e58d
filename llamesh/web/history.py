"""The last hour of a node in steps of ten seconds, and the sum over several nodes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec
import trio

from llamesh.web.state_schema import STEP, STEPS, History, Series


class Sample(msgspec.Struct, frozen=True):
    """One step. number: Unix seconds divided by STEP, of its end; tokens: written during the step; the rest
    as it was at its end, None = not known.
    """

    number: int
    tokens: float
    queue: float
    vram: float | None
    ram: float | None
    requests: float


class Now(msgspec.Struct, frozen=True):
    """What is looked at once a step. tokens: a counter."""

    tokens: int
    queue: int
    vram: int | None
    ram: int | None
    requests: int


class Ring:
    """A node's own samples. `look()` says how it is now."""

    def __init__(self, look: Callable[[], Now]) -> None:
        self.samples: deque[Sample] = deque(maxlen=STEPS)
        self._look = look
        self._tokens = 0

    async def run(self) -> None:
        """Take a sample at the end of each step, for ever."""
        self._tokens = self._look().tokens
        while True:
            await trio.sleep(STEP - time.time() % STEP)
            self.take(time.time())

    def take(self, now: float) -> None:
        """Take one; the step is the one that ends at Unix time `now` or ended just before."""
        look = self._look()
        written, self._tokens = max(0, look.tokens - self._tokens), look.tokens
        # Half a step of tolerance: sleeping may end a moment early.
        number = round(now / STEP)
        if self.samples and self.samples[-1].number >= number:
            return  # the clock was set back, or two wake-ups fell into one step
        self.samples.append(Sample(number, written, look.queue, look.vram, look.ram, look.requests))


def sum_up(rings: Iterable[Iterable[Sample]], now: float) -> History:
    """All nodes together, at Unix time `now`. Nodes' clocks may differ by a step; nobody would see that."""
    last = int(now // STEP)
    first = last - STEPS + 1
    names = Series.__struct_fields__
    columns: dict[str, list[float | None]] = {name: [None] * STEPS for name in names}
    for ring in rings:
        for sample in ring:
            at = sample.number - first
            if not 0 <= at < STEPS:
                continue
            values = (sample.tokens / STEP, sample.queue, sample.vram, sample.ram, sample.requests)
            for name, value in zip(names, values, strict=True):
                if value is not None:
                    columns[name][at] = round((columns[name][at] or 0) + value, 1)
    return History(STEP, float(last * STEP), Series(**columns))
