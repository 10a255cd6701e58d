"""What `GET /metrics` says of the clients' keys: plain counters in, metric families out.

A key goes by its name in the configuration, so there are no more labels than keys there. A request is counted
by the node that its client asked, once, whichever node answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric


@dataclass(slots=True)
class KeyFigures:
    """One key since the start of this node. refused: by the limit that stood against it, or `models`."""

    requests: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    running: int = 0


def families(figures: Mapping[str, KeyFigures]) -> Iterator[Metric]:
    """The metric families of keys, by name; none where there are no keys."""
    if not figures:
        return
    counters: tuple[tuple[str, str, Callable[[KeyFigures], int]], ...] = (
        ("llamesh_key_requests", "Inference requests that were let in", lambda one: one.requests),
        ("llamesh_key_prompt_tokens", "Prompt tokens, cached ones included", lambda one: one.prompt_tokens),
        ("llamesh_key_cached_prompt_tokens", "Prompt tokens found in cache", lambda one: one.cached_tokens),
        ("llamesh_key_tokens_generated", "Tokens generated", lambda one: one.tokens),
    )
    for name, text, read in counters:
        family = CounterMetricFamily(name, f"{text}, by the client's key", labels=("key",))
        for key, one in figures.items():
            family.add_metric((key,), read(one))
        yield family
    refused = CounterMetricFamily(
        "llamesh_key_requests_refused",
        "Inference requests that a key's own limit, or list of models, stood against",
        labels=("key", "limit"),
    )
    running = GaugeMetricFamily(
        "llamesh_key_requests_running", "Requests under way, by the client's key", labels=("key",)
    )
    for key, one in figures.items():
        for limit, count in one.refused.items():
            refused.add_metric((key, limit), count)
        running.add_metric((key,), one.running)
    yield refused
    yield running
