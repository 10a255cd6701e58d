"""Counters of the hot path: plain integers, turned into Prometheus families only when scraped.

prometheus-client's own counters take a lock and a label lookup per increment. Everything here
runs in trio's one thread, so an increment is an increment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Literal

# Seconds. Starts of a process, waits, and whole answers: from an embedding to an hour of reasoning.
LATENCY_BOUNDS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0,
)  # fmt: skip

# Seconds, from a warm prompt cache on a small model to a cold start of a large one with a long prompt.
FIRST_TOKEN_BOUNDS = (
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0,
)  # fmt: skip

# Seconds, from 1000 tokens a second to one that somebody else's prompt holds up. Close together where people
# notice: 20 to 50 ms is the difference between faster and slower than one reads.
INTER_TOKEN_BOUNDS = (
    0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5,
)  # fmt: skip

# Weight of the newest observation in a learned mean: about the last ten count.
_NEWEST = 0.2


class Histogram:
    """Counts per bucket; `bounds` are the inclusive upper ends, ascending, without the infinite one."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...] = LATENCY_BOUNDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value, in the unit of the bounds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, counts: Sequence[int], total: float) -> None:
        """Count values that were sorted into these bounds before; `total` is their sum."""
        self.counts = [*map(add, self.counts, counts)]
        self.total += total

    def cumulative(self) -> list[tuple[str, float]]:
        """Prometheus' form: (upper bound, count of all values up to it), "+Inf" last."""
        running, rows = 0, []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            running += count
            rows.append((bound, float(running)))
        return rows


@dataclass(slots=True)
class Usage:
    """What an answer says about itself, in tokens; speeds in milliseconds as llama-server reports them."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    predicted_ms: float = 0.0
    prompt_ms: float = 0.0

    def multiply(self, answers: int) -> None:
        """One of so many answers to one request said this: llama-server never tells the sum."""
        if self.prompt_tokens:  # not those of a stream that was cut: its events are of all answers
            self.prompt_tokens *= answers
            self.cached_tokens *= answers
            self.completion_tokens *= answers
            self.predicted_ms *= answers
            self.prompt_ms *= answers


Source = Literal["client", "peer"]


@dataclass(slots=True)
class ProfileStats:
    """Totals of one profile since the start of the node.

    outcomes: answered requests by outcome, the node that served ("": none did), and who asked. `instance_*`:
    of the tokens those that instances of this node read and wrote: others passed through.
    """

    requests_total: int = 0
    errors_total: int = 0
    tokens_generated_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    tokens_per_second: float = 0.0  # moving mean of single answers; 0 = not known yet
    instance_generated_total: int = 0
    instance_prompt_total: int = 0
    instance_cached_total: int = 0
    outcomes: Counter[tuple[str, str, Source]] = field(default_factory=Counter)
    current_requests: int = 0
    starts_total: int = 0
    start_failures_total: int = 0
    crashes_total: int = 0
    load_seconds: float = 0.0  # of the last start; 0 = never started
    start_seconds: Histogram = field(default_factory=Histogram)
    queue_seconds: Histogram = field(default_factory=Histogram)
    first_byte_seconds: Histogram = field(default_factory=Histogram)
    first_token_seconds: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    inter_token_seconds: Histogram = field(default_factory=lambda: Histogram(INTER_TOKEN_BOUNDS))
    duration_seconds: Histogram = field(default_factory=Histogram)

    @property
    def used(self) -> bool:
        """Whether anybody has asked for it, or it was started."""
        return bool(self.requests_total or self.current_requests or self.starts_total)

    def add_usage(self, usage: Usage, *, here: bool = False) -> None:
        """Count the tokens of one answer; `here`: an instance of this node gave it."""
        self.tokens_generated_total += usage.completion_tokens
        self.prompt_tokens_total += usage.prompt_tokens
        self.cached_tokens_total += usage.cached_tokens
        if here:
            self.instance_generated_total += usage.completion_tokens
            self.instance_prompt_total += usage.prompt_tokens
            self.instance_cached_total += usage.cached_tokens
        # A handful of tokens says more about the clock than about the model.
        if usage.predicted_ms > 0 and usage.completion_tokens >= 8:
            speed = usage.completion_tokens * 1000 / usage.predicted_ms
            known = self.tokens_per_second
            self.tokens_per_second = speed if known == 0 else known + _NEWEST * (speed - known)


# Nodes that are counted by name. They name themselves, so there may be any number of names.
_MOST_NODES = 256
OTHER_NODES = "other nodes"

# Profiles that only other nodes have, and that change names all the time.
_MOST_PROFILES = 2048
OTHER_MODELS = "other models:default"


class NodeStats:
    """All counters of this node. `profile` creates what it doesn't know; keys are "model:profile".

    `served_by`: answered requests by node id, see `count_served`; `forward_retries`: forwards after which a
    request was tried elsewhere, by an error's type, or "lost".
    """

    def __init__(self) -> None:
        self.profiles: dict[str, ProfileStats] = {}
        self.rejected: Counter[str] = Counter()  # error type -> requests that named no profile of ours
        self.builds: Counter[str] = Counter()  # outcome -> builds of llama.cpp, and looks for a newer one
        self.connections = 0
        self.bad_heads = 0
        self.served_by: Counter[str] = Counter()
        self.forward_retries: Counter[str] = Counter()

    def count_served(self, node: str) -> str:
        """A request was answered by that node, this one or another; the name that it is counted under."""
        if node not in self.served_by and len(self.served_by) >= _MOST_NODES:
            node = OTHER_NODES
        self.served_by[node] += 1
        return node

    def profile(self, key: str, *, ours: bool = True) -> ProfileStats:
        """The counters of one profile. Call it with keys of the cookbook, or (then not `ours`) with what
        other nodes offer, but never with what a client wrote: each is a hundred lines of a scrape.
        """
        stats = self.profiles.get(key)
        if stats is None:
            if not ours and len(self.profiles) >= _MOST_PROFILES:
                key = OTHER_MODELS
            stats = self.profiles.setdefault(key, ProfileStats())
        return stats

    @property
    def requests_total(self) -> int:
        """Inference requests that were answered, whatever the answer."""
        return sum(p.requests_total for p in self.profiles.values()) + sum(self.rejected.values())

    @property
    def errors_total(self) -> int:
        """Of `requests_total`, those that ended in an error of ours or of the upstream."""
        return sum(p.errors_total for p in self.profiles.values()) + sum(self.rejected.values())

    @property
    def current_requests(self) -> int:
        """Inference requests that are being worked on or wait."""
        return sum(p.current_requests for p in self.profiles.values())
