"""What a scraper reads, with a scraper's own parser."""

from __future__ import annotations

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from llamesh.telemetry.exposition import exposition
from llamesh.telemetry.prometheus import Gauges, NodeCollector, ProfileFigures
from llamesh.telemetry.stats import (
    OTHER_MODELS,
    OTHER_NODES,
    NodeStats,
    Usage,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


OPENMETRICS = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,*/*;q=0.1"
)


def text_of(stats: NodeStats, gauges: Gauges | None = None, accept: str = "") -> tuple[str, str]:
    """Content type and text of a scrape."""
    now = gauges or Gauges({}, {}, ready=True)
    collector = NodeCollector(stats, lambda: now, lambda: {"version": "1.2", "node": 'a "quoted" one'})
    content_type, text = trio.run(exposition, collector.families(), accept)
    return content_type, text.decode()


def scrape(stats: NodeStats, gauges: Gauges | None = None, *, openmetrics: bool = False) -> Samples:
    """Every sample by name and sorted labels."""
    _, text = text_of(stats, gauges, OPENMETRICS if openmetrics else "")
    samples: Samples = {}
    for family in (openmetrics_families if openmetrics else text_string_to_metric_families)(text):
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
    one.outcomes.update({("ok", "b", "client"): 3, ("ok", "a", "peer"): 2, ("queue_full", "", "client"): 1})
    usage = Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=8, predicted_ms=1000)
    one.add_usage(usage)
    one.add_usage(usage, here=True)
    one.starts_total, one.start_failures_total, one.crashes_total = 5, 2, 1
    one.current_requests, one.load_seconds = 2, 1.5
    one.queue_seconds.observe(0.02)
    stats.rejected["model_not_found"] += 2
    stats.bad_heads = 3
    samples = scrape(stats)
    labels = of("org/model.gguf", "fast")
    counted = [
        samples[
            "llamesh_requests_total", of("org/model.gguf", "fast", outcome=outcome, node=node, source=source)
        ]
        for outcome, node, source in (
            ("ok", "b", "client"),
            ("ok", "a", "peer"),
            ("queue_full", "", "client"),
        )
    ]
    assert counted == [3, 2, 1]
    here = [
        samples["llamesh_instance_tokens_total", of("org/model.gguf", "fast", kind=kind)]
        for kind in ("prompt", "cached", "generated")
    ]
    assert here == [10, 4, 8]
    expected = {
        "llamesh_tokens_generated_total": 16,
        "llamesh_prompt_tokens_total": 20,
        "llamesh_cached_prompt_tokens_total": 8,
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
    figures = ProfileFigures(queued=7, slots=8, busy=3, failed=True)
    instances = {("m:default", "ready"): 2, ("m:default", "starting"): 1}
    gauges = Gauges(instances, {"m:default": figures}, ready=False, certificate_expiry=1.5e9)
    samples = scrape(NodeStats(), gauges)
    assert samples["llamesh_instances", of("m", "default", state="ready")] == 2
    assert samples["llamesh_instances", of("m", "default", state="starting")] == 1
    assert samples["llamesh_queue_length", of("m", "default")] == 7
    assert samples["llamesh_slots", of("m", "default")] == 8
    assert samples["llamesh_slots_busy", of("m", "default")] == 3
    assert samples["llamesh_load_failing", of("m", "default")] == 1
    assert samples["llamesh_certificate_expiry_timestamp_seconds", ()] == 1.5e9
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
    assert samples["llamesh_instance_drains_total", (("reason", "owner"),)] == 0
    for what, size in (("estimated", 5 << 20), ("measured", 4 << 20)):
        labels = of("m", "default", kind="vram", what=what)
        assert samples["llamesh_profile_memory_bytes", labels] == size
    assert samples["llamesh_reloads_total", ()] == 4
    assert samples["llamesh_reload_failures_total", ()] == 2
    assert samples["llamesh_config_in_force", ()] == 0


def test_what_is_unknown_is_left_out() -> None:
    names = {name for name, _ in scrape(NodeStats())}
    assert not names & {"llamesh_memory_bytes", "llamesh_profile_memory_bytes"}
    assert "llamesh_certificate_expiry_timestamp_seconds" not in names


def test_what_nobody_asked_for_has_no_histograms() -> None:
    stats = NodeStats()
    stats.profile("idle:default")
    stats.profile("busy:default").requests_total = 1
    samples = scrape(stats)
    assert ("llamesh_time_to_first_token_seconds_count", of("idle", "default")) not in samples
    assert samples["llamesh_time_to_first_token_seconds_count", of("busy", "default")] == 0
    assert samples["llamesh_tokens_generated_total", of("idle", "default")] == 0


def test_names_of_others_are_few() -> None:
    stats = NodeStats()
    for number in range(5000):
        stats.profile(f"theirs-{number}:default", ours=False).requests_total += 1
        stats.count_served(f"node-{number}")
    stats.profile("ours:default").requests_total += 1
    assert len(stats.profiles) == 2048 + 2
    assert stats.profiles[OTHER_MODELS].requests_total == 5000 - 2048
    assert stats.profiles["ours:default"].requests_total == 1
    assert stats.served_by[OTHER_NODES] == 5000 - 256


def many(count: int) -> NodeStats:
    """That many profiles, all in use, on twenty nodes."""
    stats = NodeStats()
    for number in range(count):
        one = stats.profile(f"m{number}:default")
        one.requests_total = 1
        one.outcomes.update({("ok", f"node-{node}", "client"): 1 for node in range(20)})
        one.first_token_seconds.observe(number / 100)
    return stats


@pytest.mark.parametrize("openmetrics", [False, True])
def test_both_formats_say_the_same_in_many_parts(openmetrics: bool) -> None:
    stats = many(150)
    content_type, text = text_of(stats, accept=OPENMETRICS if openmetrics else "")
    assert content_type.startswith("application/openmetrics-text" if openmetrics else "text/plain")
    assert text.count("# TYPE llamesh_time_to_first_token_seconds histogram") == 1
    assert text.count("# EOF") == openmetrics
    assert text.endswith("# EOF\n") == openmetrics
    samples = scrape(stats, openmetrics=openmetrics)
    changing = [name for name, _ in samples if name.startswith("process_")]
    assert changing
    assert set(samples) == set(scrape(stats))
    for number in (0, 19, 20, 149):
        assert samples["llamesh_time_to_first_token_seconds_sum", of(f"m{number}", "default")] == number / 100


@pytest.mark.parametrize("accept", ["text/html", "application/openmetrics-text;version=x", "*/*", ";,;="])
def test_an_accept_header_of_any_kind(accept: str) -> None:
    assert text_of(NodeStats(), accept=accept)[1].startswith("# HELP llamesh_build_info")


def test_no_part_of_a_scrape_is_long() -> None:
    stats = many(200)
    figures = {key: ProfileFigures() for key in stats.profiles}
    gauges = Gauges({}, figures, ready=True)
    parts = [*NodeCollector(stats, lambda: gauges, dict).families()]
    assert sum(len(part.samples) for part in parts) > 30_000
    assert max(len(part.samples) for part in parts) <= 1200


async def test_others_have_their_turn_between_the_parts() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    parts = [*NodeCollector(many(100), lambda: Gauges({}, {}, ready=True), dict).families()]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await exposition(parts)
        nursery.cancel_scope.cancel()
    assert turns >= len(parts) - 1
