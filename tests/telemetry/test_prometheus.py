"""What a scraper reads, with a scraper's own parser."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from llamesh.telemetry.prometheus import Gauges, NodeCollector
from llamesh.telemetry.stats import NodeStats, Usage

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(stats: NodeStats, gauges: Gauges | None = None) -> Samples:
    """Every sample by name and sorted labels."""
    now = gauges or Gauges({}, {}, ready=True)
    registry = CollectorRegistry()
    registry.register(NodeCollector(stats, lambda: now, lambda: {"version": "1.2", "node": 'a "quoted" one'}))
    text = generate_latest(registry).decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        for sample in family.samples:
            where = sample.name, tuple(sorted(sample.labels.items()))
            assert where not in samples, "counted twice"
            samples[where] = sample.value
    return samples


def of(model: str, profile: str, **more: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"model": model, "profile": profile, **more}.items()))


def test_an_idle_node() -> None:
    samples = scrape(NodeStats())
    assert samples["llamesh_ready", ()] == 1
    assert samples["llamesh_connections", ()] == 0
    assert samples["process_resident_memory_bytes", ()] > 1 << 20
    assert samples["llamesh_build_info", (("node", 'a "quoted" one'), ("version", "1.2"))] == 1


def test_counters_of_a_profile() -> None:
    stats = NodeStats()
    one = stats.profile("org/model.gguf:fast")
    one.outcomes.update(ok=3, queue_full=1)
    one.add_usage(Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=8, predicted_ms=1000))
    one.starts_total, one.start_failures_total, one.crashes_total = 5, 2, 1
    one.current_requests, one.load_seconds = 2, 1.5
    one.queue_seconds.observe(0.02)
    stats.rejected["model_not_found"] += 2
    stats.bad_heads = 3
    samples = scrape(stats)
    labels = of("org/model.gguf", "fast")
    assert samples["llamesh_requests_total", of("org/model.gguf", "fast", outcome="ok")] == 3
    assert samples["llamesh_requests_total", of("org/model.gguf", "fast", outcome="queue_full")] == 1
    expected = {
        "llamesh_tokens_generated_total": 8,
        "llamesh_prompt_tokens_total": 10,
        "llamesh_cached_prompt_tokens_total": 4,
        "llamesh_instance_starts_total": 5,
        "llamesh_instance_start_failures_total": 2,
        "llamesh_instance_crashes_total": 1,
        "llamesh_requests_running": 2,
        "llamesh_load_seconds": 1.5,
        "llamesh_tokens_per_second": 8,
        "llamesh_queue_wait_seconds_count": 1,
        "llamesh_queue_wait_seconds_sum": 0.02,
        "llamesh_first_byte_seconds_count": 0,
    }
    assert {name: samples[name, labels] for name in expected} == pytest.approx(expected)
    below = of("org/model.gguf", "fast", le="0.01")
    above = of("org/model.gguf", "fast", le="0.025")
    assert samples["llamesh_queue_wait_seconds_bucket", below] == 0
    assert samples["llamesh_queue_wait_seconds_bucket", above] == 1
    assert samples["llamesh_requests_rejected_total", (("type", "model_not_found"),)] == 2
    assert samples["llamesh_malformed_requests_total", ()] == 3


def test_what_is_now() -> None:
    gauges = Gauges({("m:default", "ready"): 2, ("m:default", "starting"): 1}, {"m:default": 7}, ready=False)
    samples = scrape(NodeStats(), gauges)
    assert samples["llamesh_instances", of("m", "default", state="ready")] == 2
    assert samples["llamesh_instances", of("m", "default", state="starting")] == 1
    assert samples["llamesh_queue_length", of("m", "default")] == 7
    assert samples["llamesh_ready", ()] == 0


def test_memory_drains_and_files() -> None:
    gauges = Gauges(
        {},
        {},
        ready=True,
        memory={("vram", "maximum"): 8 << 30, ("sysmem", "external"): 3},
        evictions={"idle": 2, "room": 1},
        files=(4, 2, False),
        profile_memory={
            ("m:default", "vram", "estimated"): 5 << 20,
            ("m:default", "vram", "measured"): 4 << 20,
        },
    )
    samples = scrape(NodeStats(), gauges)
    assert samples["llamesh_memory_bytes", (("kind", "vram"), ("what", "maximum"))] == 8 << 30
    assert samples["llamesh_memory_bytes", (("kind", "sysmem"), ("what", "external"))] == 3
    assert samples["llamesh_instance_drains_total", (("reason", "idle"),)] == 2
    assert samples["llamesh_instance_drains_total", (("reason", "room"),)] == 1
    for what, size in (("estimated", 5 << 20), ("measured", 4 << 20)):
        labels = of("m", "default", kind="vram", what=what)
        assert samples["llamesh_profile_memory_bytes", labels] == size
    assert samples["llamesh_reloads_total", ()] == 4
    assert samples["llamesh_reload_failures_total", ()] == 2
    assert samples["llamesh_config_in_force", ()] == 0


def test_what_is_unknown_is_left_out() -> None:
    names = {name for name, _ in scrape(NodeStats())}
    assert not names & {"llamesh_memory_bytes", "llamesh_profile_memory_bytes"}
