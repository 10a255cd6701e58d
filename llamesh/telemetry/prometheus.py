"""`GET /metrics`: the counters as Prometheus families, made at the scrape and nowhere else.

docs/metrics.md has a line on each. Names stay; where a family gets another label, sums over it stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import psutil
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from llamesh.telemetry.key_figures import KeyFigures
from llamesh.telemetry.key_figures import families as key_families
from llamesh.telemetry.mesh_figures import MeshFigures, families
from llamesh.telemetry.stats import Histogram, NodeStats, ProfileStats

# Why an instance is told to leave; shown from the start, since what begins at 1 is no increase to Prometheus.
DRAIN_REASONS = ("idle", "room", "strangers", "owner", "reload", "unload", "engine")

# What alerts look for; the same goes for these outcomes.
_NO_REFUSALS = {
    (outcome, "", "client"): 0
    for outcome in (
        "queue_full",
        "queue_timeout",
        "no_capacity",
        "spawn_failures_exhausted",
        "upstream_error",
    )
}

# Lines of one part of a family: a millisecond or two.
_PART_LINES = 400

_OF_PROFILE = ("model", "profile")


@dataclass(frozen=True, slots=True)
class ProfileFigures:
    """What is known of a profile elsewhere. `slots`, `busy`: of its instances that are ready; `failed`: all
    tries to load it failed, the last time somebody wanted it.
    """

    queued: int = 0
    slots: int = 0
    busy: int = 0
    failed: bool = False


@dataclass(frozen=True, slots=True)
class Gauges:
    """What is counted elsewhere.

    instances: by (profile key, state); profiles: by key; memory: bytes by ("vram" or "sysmem", what);
    evictions by reason; files: reloads, refused ones, and whether what is on disk is in force;
    profile_memory: bytes by (profile key, "vram" or "sysmem", "estimated" or "measured"); mesh: None where
    there is none; certificate_expiry: Unix time, None without TLS; keys: by name.
    """

    instances: dict[tuple[str, str], int]
    profiles: dict[str, ProfileFigures]
    ready: bool
    memory: dict[tuple[str, str], int] = field(default_factory=dict)
    evictions: dict[str, int] = field(default_factory=dict)
    files: tuple[int, int, bool] = (0, 0, True)
    profile_memory: dict[tuple[str, str, str], int] = field(default_factory=dict)
    mesh: MeshFigures | None = None
    certificate_expiry: float | None = None
    keys: Mapping[str, KeyFigures] = field(default_factory=dict)


class NodeCollector:
    """Turns `NodeStats` into metric families. Label values come from the cookbook, from what the mesh offers,
    and from fixed sets; never from a client.
    """

    def __init__(
        self, stats: NodeStats, gauges: Callable[[], Gauges], info: Callable[[], dict[str, str]]
    ) -> None:
        self._stats = stats
        self._gauges = gauges
        self._info = info
        self._process = psutil.Process()

    def families(self) -> Iterator[Metric]:
        """All families, large ones in several parts. Counters may move on between two of them."""
        profiles = [(_labels(key), stats) for key, stats in self._stats.profiles.items()]
        yield InfoMetricFamily("llamesh_build", "Version, node and engine of this process", self._info())
        yield from _requests(profiles)
        yield from self._refused()
        yield from _profile_figures(profiles)
        yield from _instance_tokens(profiles)
        yield from _profile_histograms([(labels, stats) for labels, stats in profiles if stats.used])
        yield from self._now()

    def _refused(self) -> Iterator[Metric]:
        yield _counter(
            "llamesh_requests_rejected",
            "Inference requests that were refused before a profile was known",
            "type",
            self._stats.rejected,
        )
        yield CounterMetricFamily(
            "llamesh_malformed_requests", "Bytes that were no HTTP request", value=self._stats.bad_heads
        )
        yield _counter(
            "llamesh_engine_builds",
            "Builds of llama.cpp and looks for a newer one",
            "outcome",
            self._stats.builds,
        )

    def _now(self) -> Iterator[Metric]:
        now = self._gauges()
        instances = GaugeMetricFamily(
            "llamesh_instances", "Instances of llama-server", labels=("model", "profile", "state")
        )
        for (key, state), count in now.instances.items():
            instances.add_metric((*_labels(key), state), count)
        yield instances
        yield from _profile_gauges(now.profiles)
        yield GaugeMetricFamily("llamesh_ready", "1 when /readyz says 200", value=float(now.ready))
        yield GaugeMetricFamily(
            "llamesh_connections", "Open client connections", value=self._stats.connections
        )
        yield from _memory_and_files(now)
        if now.certificate_expiry is not None:
            yield GaugeMetricFamily(
                "llamesh_certificate_expiry_timestamp_seconds",
                "When the certificate of server_tls expires, Unix time",
                value=now.certificate_expiry,
            )
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
        yield _counter(
            "llamesh_requests_served",
            "Inference requests answered, by the node that did",
            "node",
            self._stats.served_by,
        )
        yield _counter(
            "llamesh_forward_retries",
            "Forwards after which the request was tried elsewhere, by why",
            "reason",
            self._stats.forward_retries,
        )


def _counter(name: str, text: str, label: str, counts: Mapping[str, int]) -> Metric:
    """A counter with a single label."""
    family = CounterMetricFamily(name, text, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count)
    return family


_Profiles = list[tuple[tuple[str, str], ProfileStats]]


def _requests(profiles: _Profiles) -> Iterator[Metric]:
    for part in _parts(profiles, 20):
        family = CounterMetricFamily(
            "llamesh_requests",
            "Inference requests answered, by the node that served and by who asked",
            labels=(*_OF_PROFILE, "outcome", "node", "source"),
        )
        for labels, stats in part:
            for more, count in (_NO_REFUSALS | stats.outcomes).items():
                family.add_metric((*labels, *more), count)
        yield family


def _profile_figures(profiles: _Profiles) -> Iterator[Metric]:
    counters: tuple[tuple[str, str, Callable[[ProfileStats], float]], ...] = (
        ("llamesh_tokens_generated", "Tokens generated", lambda s: s.tokens_generated_total),
        ("llamesh_prompt_tokens", "Prompt tokens, cached ones included", lambda s: s.prompt_tokens_total),
        ("llamesh_cached_prompt_tokens", "Prompt tokens found in cache", lambda s: s.cached_tokens_total),
        ("llamesh_instance_starts", "Starts of llama-server", lambda s: s.starts_total),
        ("llamesh_instance_start_failures", "Starts that failed", lambda s: s.start_failures_total),
        ("llamesh_instance_crashes", "Instances that ended while serving", lambda s: s.crashes_total),
    )
    gauges: tuple[tuple[str, str, Callable[[ProfileStats], float]], ...] = (
        ("llamesh_requests_running", "Requests being answered or waiting", lambda s: s.current_requests),
        ("llamesh_load_seconds", "Duration of the last start", lambda s: s.load_seconds),
        ("llamesh_tokens_per_second", "Decode speed of one answer", lambda s: s.tokens_per_second),
    )
    for kind, figures in ((CounterMetricFamily, counters), (GaugeMetricFamily, gauges)):
        for name, text, read in figures:
            for part in _parts(profiles, 1):
                family = kind(name, text, labels=_OF_PROFILE)
                for labels, stats in part:
                    family.add_metric(labels, read(stats))
                yield family


def _instance_tokens(profiles: _Profiles) -> Iterator[Metric]:
    family = CounterMetricFamily(
        "llamesh_instance_tokens",
        "Tokens that instances of this node read (prompt, of these cached) and generated",
        labels=(*_OF_PROFILE, "kind"),
    )
    for labels, stats in profiles:
        if stats.starts_total:
            family.add_metric((*labels, "prompt"), stats.instance_prompt_total)
            family.add_metric((*labels, "cached"), stats.instance_cached_total)
            family.add_metric((*labels, "generated"), stats.instance_generated_total)
    yield family


def _profile_histograms(profiles: _Profiles) -> Iterator[Metric]:
    histograms: tuple[tuple[str, str, Callable[[ProfileStats], Histogram]], ...] = (
        ("llamesh_request_duration_seconds", "Whole requests", lambda s: s.duration_seconds),
        ("llamesh_first_byte_seconds", "Until the first byte of an answer", lambda s: s.first_byte_seconds),
        (
            "llamesh_time_to_first_token_seconds",
            "Of streams, from the request until the first content",
            lambda s: s.first_token_seconds,
        ),
        (
            "llamesh_inter_token_latency_seconds",
            "Of streams, between one token and the next",
            lambda s: s.inter_token_seconds,
        ),
        ("llamesh_start_duration_seconds", "From process start to ready", lambda s: s.start_seconds),
        ("llamesh_queue_wait_seconds", "Until an instance took the request", lambda s: s.queue_seconds),
    )
    for name, text, read in histograms:
        for part in _parts(profiles, 20):
            family = HistogramMetricFamily(name, text, labels=_OF_PROFILE)
            for labels, stats in part:
                histogram = read(stats)
                family.add_metric(labels, histogram.cumulative(), histogram.total)
            yield family


def _profile_gauges(profiles: dict[str, ProfileFigures]) -> Iterator[Metric]:
    gauges: tuple[tuple[str, str, Callable[[ProfileFigures], float]], ...] = (
        ("llamesh_queue_length", "Requests that wait for a slot", lambda f: f.queued),
        ("llamesh_slots", "Slots of instances that are ready", lambda f: f.slots),
        ("llamesh_slots_busy", "Those of them that are answering", lambda f: f.busy),
        (
            "llamesh_load_failing",
            "1 where all tries to load a profile failed, the last time it was wanted",
            lambda f: f.failed,
        ),
    )
    for name, text, read in gauges:
        family = GaugeMetricFamily(name, text, labels=_OF_PROFILE)
        for key, figures in profiles.items():
            family.add_metric(_labels(key), float(read(figures)))
        yield family


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
        labels=(*_OF_PROFILE, "kind", "what"),
    )
    for (key, kind, what), size in now.profile_memory.items():
        profiles.add_metric((*_labels(key), kind, what), size)
    yield profiles
    yield _counter(
        "llamesh_instance_drains",
        "Instances that were told to leave",
        "reason",
        dict.fromkeys(DRAIN_REASONS, 0) | now.evictions,
    )
    reloads, refusals, in_force = now.files
    yield CounterMetricFamily("llamesh_reloads", "Changes of the files that were taken in", value=reloads)
    yield CounterMetricFamily("llamesh_reload_failures", "Changes that were refused", value=refusals)
    yield GaugeMetricFamily(
        "llamesh_config_in_force", "1 when the files as they are now are in force", value=float(in_force)
    )


def _parts(profiles: _Profiles, lines: int) -> Iterable[_Profiles]:
    """At least one, so that the family is there. `lines`: about how many a profile is."""
    rest, size = iter(profiles), _PART_LINES // lines
    yield [*islice(rest, size)]
    while part := [*islice(rest, size)]:
        yield part


def _labels(key: str) -> tuple[str, str]:
    model, _, profile = key.rpartition(":")
    return model, profile
