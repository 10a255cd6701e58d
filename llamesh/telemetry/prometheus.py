"""`GET /metrics`: the counters as Prometheus families, made at the scrape and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import psutil
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from llamesh.telemetry.key_figures import KeyFigures
from llamesh.telemetry.key_figures import families as key_families
from llamesh.telemetry.mesh_figures import MeshFigures, families
from llamesh.telemetry.stats import Histogram, NodeStats, ProfileStats


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is counted elsewhere: instances by (profile key, state), queue length by profile key, bytes of
    memory by ("vram" or "sysmem", what), evictions by reason, and of the files: reloads, refused ones,
    and whether what is on disk is in force. `profile_memory`: bytes by (profile key, "vram" or "sysmem",
    "estimated" or "measured"). `mesh`: None where there is none; `keys`: by name.
    """

    instances: dict[tuple[str, str], int]
    queued: dict[str, int]
    ready: bool
    memory: dict[tuple[str, str], int] = field(default_factory=dict)
    evictions: dict[str, int] = field(default_factory=dict)
    files: tuple[int, int, bool] = (0, 0, True)
    profile_memory: dict[tuple[str, str, str], int] = field(default_factory=dict)
    mesh: MeshFigures | None = None
    keys: Mapping[str, KeyFigures] = field(default_factory=dict)


class NodeCollector(Collector):
    """Turns `NodeStats` into metric families. Label values come from the cookbook and from fixed sets."""

    def __init__(
        self, stats: NodeStats, gauges: Callable[[], Gauges], info: Callable[[], dict[str, str]]
    ) -> None:
        self._stats = stats
        self._gauges = gauges
        self._info = info
        self._process = psutil.Process()

    def describe(self) -> Iterable[Metric]:
        """Nothing beforehand: families are made at the scrape."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield InfoMetricFamily("llamesh_build", "Version, node and engine of this process", self._info())
        yield from self._requests()
        yield from self._profile_counters()
        yield from self._profile_histograms()
        yield from self._now()

    def _requests(self) -> Iterator[Metric]:
        family = CounterMetricFamily(
            "llamesh_requests", "Inference requests answered", labels=("model", "profile", "outcome")
        )
        for key, stats in self._stats.profiles.items():
            for outcome, count in stats.outcomes.items():
                family.add_metric((*_labels(key), outcome), count)
        yield family
        rejected = CounterMetricFamily(
            "llamesh_requests_rejected",
            "Inference requests that were refused before a profile was known",
            labels=("type",),
        )
        for kind, count in self._stats.rejected.items():
            rejected.add_metric((kind,), count)
        yield rejected
        yield CounterMetricFamily(
            "llamesh_malformed_requests", "Bytes that were no HTTP request", value=self._stats.bad_heads
        )

        builds = CounterMetricFamily(
            "llamesh_engine_builds", "Builds of llama.cpp and looks for a newer one", labels=("outcome",)
        )
        for outcome, count in self._stats.builds.items():
            builds.add_metric((outcome,), count)
        yield builds

    def _profile_counters(self) -> Iterator[Metric]:
        counters: tuple[tuple[str, str, Callable[[ProfileStats], float]], ...] = (
            ("llamesh_tokens_generated", "Tokens generated", lambda s: s.tokens_generated_total),
            ("llamesh_prompt_tokens", "Prompt tokens, cached ones included", lambda s: s.prompt_tokens_total),
            ("llamesh_cached_prompt_tokens", "Prompt tokens found in cache", lambda s: s.cached_tokens_total),
            ("llamesh_instance_starts", "Starts of llama-server", lambda s: s.starts_total),
            ("llamesh_instance_start_failures", "Starts that failed", lambda s: s.start_failures_total),
            ("llamesh_instance_crashes", "Instances that ended while serving", lambda s: s.crashes_total),
        )
        for name, text, read in counters:
            yield self._by_profile(CounterMetricFamily(name, text, labels=("model", "profile")), read)
        gauges: tuple[tuple[str, str, Callable[[ProfileStats], float]], ...] = (
            ("llamesh_requests_running", "Requests being answered or waiting", lambda s: s.current_requests),
            ("llamesh_load_seconds", "Duration of the last start", lambda s: s.load_seconds),
            ("llamesh_tokens_per_second", "Decode speed of one answer", lambda s: s.tokens_per_second),
        )
        for name, text, read in gauges:
            yield self._by_profile(GaugeMetricFamily(name, text, labels=("model", "profile")), read)

    def _by_profile(
        self, family: CounterMetricFamily | GaugeMetricFamily, read: Callable[[ProfileStats], float]
    ) -> Metric:
        for key, stats in self._stats.profiles.items():
            family.add_metric(_labels(key), read(stats))
        return family

    def _profile_histograms(self) -> Iterator[Metric]:
        histograms: tuple[tuple[str, str, Callable[[ProfileStats], Histogram]], ...] = (
            ("llamesh_request_duration_seconds", "Whole requests", lambda s: s.duration_seconds),
            (
                "llamesh_first_byte_seconds",
                "Until the first byte of an answer",
                lambda s: s.first_byte_seconds,
            ),
            ("llamesh_start_duration_seconds", "From process start to ready", lambda s: s.start_seconds),
            ("llamesh_queue_wait_seconds", "Until an instance took the request", lambda s: s.queue_seconds),
        )
        for name, text, read in histograms:
            family = HistogramMetricFamily(name, text, labels=("model", "profile"))
            for key, stats in self._stats.profiles.items():
                histogram = read(stats)
                family.add_metric(_labels(key), histogram.cumulative(), histogram.total)
            yield family

    def _now(self) -> Iterator[Metric]:
        now = self._gauges()
        instances = GaugeMetricFamily(
            "llamesh_instances", "Instances of llama-server", labels=("model", "profile", "state")
        )
        for (key, state), count in now.instances.items():
            instances.add_metric((*_labels(key), state), count)
        yield instances
        queued = GaugeMetricFamily(
            "llamesh_queue_length", "Requests that wait for a slot", labels=("model", "profile")
        )
        for key, length in now.queued.items():
            queued.add_metric(_labels(key), length)
        yield queued
        yield GaugeMetricFamily("llamesh_ready", "1 when /readyz says 200", value=float(now.ready))
        yield GaugeMetricFamily(
            "llamesh_connections", "Open client connections", value=self._stats.connections
        )
        yield from self._memory_and_files(now)
        yield from key_families(now.keys)
        if now.mesh is not None:
            yield from families(now.mesh)
            yield from self._by_node()
        times = self._process.cpu_times()
        yield CounterMetricFamily(
            "process_cpu_seconds", "CPU time of this process", value=times.user + times.system
        )
        yield GaugeMetricFamily(
            "process_resident_memory_bytes", "Resident memory", value=self._process.memory_info().rss
        )
        yield GaugeMetricFamily(
            "process_start_time_seconds", "Start, Unix time", value=self._process.create_time()
        )

    def _by_node(self) -> Iterator[Metric]:
        served = CounterMetricFamily(
            "llamesh_requests_served", "Inference requests answered, by the node that did", labels=("node",)
        )
        for node, count in self._stats.served_by.items():
            served.add_metric((node,), count)
        yield served
        retries = CounterMetricFamily(
            "llamesh_forward_retries",
            "Forwards after which the request was tried elsewhere, by why",
            labels=("reason",),
        )
        for reason, count in self._stats.forward_retries.items():
            retries.add_metric((reason,), count)
        yield retries

    @staticmethod
    def _memory_and_files(now: Gauges) -> Iterator[Metric]:
        memory = GaugeMetricFamily(
            "llamesh_memory_bytes",
            "Memory of the machine: total, used, external (others' programs), reserved (instances), maximum",
            labels=("kind", "what"),
        )
        for labels, size in now.memory.items():
            memory.add_metric(labels, size)
        yield memory
        profiles = GaugeMetricFamily(
            "llamesh_profile_memory_bytes",
            "Memory of a profile: estimated for one instance, measured over all that run",
            labels=("model", "profile", "kind", "what"),
        )
        for (key, kind, what), size in now.profile_memory.items():
            profiles.add_metric((*_labels(key), kind, what), size)
        yield profiles
        evictions = CounterMetricFamily(
            "llamesh_instance_drains", "Instances that were told to leave", labels=("reason",)
        )
        for reason, count in now.evictions.items():
            evictions.add_metric((reason,), count)
        yield evictions
        reloads, refusals, in_force = now.files
        yield CounterMetricFamily("llamesh_reloads", "Changes of the files that were taken in", value=reloads)
        yield CounterMetricFamily("llamesh_reload_failures", "Changes that were refused", value=refusals)
        yield GaugeMetricFamily(
            "llamesh_config_in_force", "1 when the files as they are now are in force", value=float(in_force)
        )


def _labels(key: str) -> tuple[str, str]:
    model, _, profile = key.rpartition(":")
    return model, profile


def exposition(collector: Collector) -> tuple[str, bytes]:
    """Content type and text of a scrape."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return CONTENT_TYPE_LATEST, generate_latest(registry)
