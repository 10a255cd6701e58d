"""Counters of the hot path: plain integers, turned into Prometheus families only when scraped.

prometheus-client's own counters take a lock and a label lookup per increment. Everything here
runs in trio's one thread, so an increment is an increment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

# Seconds, from a warm prompt cache on a small model to a cold start of a large one.
LATENCY_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

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


@dataclass(slots=True)
class ProfileStats:
    """Totals of one profile since the start of the node."""

    requests_total: int = 0
    errors_total: int = 0
    tokens_generated_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    tokens_per_second: float = 0.0  # moving mean of single answers; 0 = not known yet
    outcomes: Counter[str] = field(default_factory=Counter)
    current_requests: int = 0
    starts_total: int = 0
    start_failures_total: int = 0
    crashes_total: int = 0
    load_seconds: float = 0.0  # of the last start; 0 = never started
    start_seconds: Histogram = field(default_factory=Histogram)
    queue_seconds: Histogram = field(default_factory=Histogram)
    first_byte_seconds: Histogram = field(default_factory=Histogram)
    duration_seconds: Histogram = field(default_factory=Histogram)

    def add_usage(self, usage: Usage) -> None:
        """Count the tokens of one answer."""
        self.tokens_generated_total += usage.completion_tokens
        self.prompt_tokens_total += usage.prompt_tokens
        self.cached_tokens_total += usage.cached_tokens
        # A handful of tokens says more about the clock than about the model.
        if usage.predicted_ms > 0 and usage.completion_tokens >= 8:
            speed = usage.completion_tokens * 1000 / usage.predicted_ms
            known = self.tokens_per_second
            self.tokens_per_second = speed if known == 0 else known + _NEWEST * (speed - known)


# Nodes that are counted by name. They name themselves, so there may be any number of names.
_MOST_NODES = 256
OTHER_NODES = "other nodes"


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

    def count_served(self, node: str) -> None:
        """A request was answered by that node, this one or another."""
        known = node in self.served_by or len(self.served_by) < _MOST_NODES
        self.served_by[node if known else OTHER_NODES] += 1

    def profile(self, key: str) -> ProfileStats:
        """The counters of one profile. Call it with keys of the cookbook only, so that they stay few."""
        stats = self.profiles.get(key)
        if stats is None:
            stats = self.profiles[key] = ProfileStats()
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
