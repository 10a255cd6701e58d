"""Metrics of keys."""

from __future__ import annotations

from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.registry import Collector

from llamesh.telemetry.key_figures import KeyFigures, families
from llamesh.telemetry.log_lines import HIDDEN, Shown, clean


def text_of(figures: dict[str, KeyFigures]) -> list[str]:
    class One(Collector):
        def collect(self) -> list[object]:  # type: ignore[override]
            return [*families(figures)]

    registry = CollectorRegistry(auto_describe=False)
    registry.register(One())
    return [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]


def test_each_key_has_its_lines() -> None:
    assert text_of({}) == []
    figures = {
        "alice": KeyFigures(3, Counter({"models": 1, "tokens_per_day": 2}), 10, 4, 5, 1),
        "key-2": KeyFigures(),
    }
    assert text_of(figures) == [
        'llamesh_key_requests_total{key="alice"} 3.0',
        'llamesh_key_requests_total{key="key-2"} 0.0',
        'llamesh_key_prompt_tokens_total{key="alice"} 10.0',
        'llamesh_key_prompt_tokens_total{key="key-2"} 0.0',
        'llamesh_key_cached_prompt_tokens_total{key="alice"} 4.0',
        'llamesh_key_cached_prompt_tokens_total{key="key-2"} 0.0',
        'llamesh_key_tokens_generated_total{key="alice"} 5.0',
        'llamesh_key_tokens_generated_total{key="key-2"} 0.0',
        'llamesh_key_requests_refused_total{key="alice",limit="models"} 1.0',
        'llamesh_key_requests_refused_total{key="alice",limit="tokens_per_day"} 2.0',
        'llamesh_key_requests_running{key="alice"} 1.0',
        'llamesh_key_requests_running{key="key-2"} 0.0',
    ]


def test_the_name_of_a_key_is_shown_in_the_log_and_the_key_is_not() -> None:
    assert clean({"key": Shown("alice")}) == {"key": "alice"}
    assert type(clean({"key": Shown("alice")})["key"]) is str
    assert clean({"key": "alice"}) == {"key": HIDDEN}
    assert "hunter2" not in str(clean({"key": Shown("Bearer hunter2")}))
