"""What rows share: running the load generator, interleaving, medians, reconciling, results."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.build import BenchError, Tools
from benchmarks.client import get_json
from benchmarks.servers import MODEL, Server

Report = dict[str, Any]
"""The JSON object that the load generator prints: counts, rates, and quantiles in milliseconds."""

FAILURES = ("not_200", "broken", "missing_done", "unfinished")


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure. Seconds are per path and round."""

    rounds: int
    seconds: float
    paced_rounds: int
    paced_tokens: int
    cold_starts: int
    connections: int

    @classmethod
    def full(cls) -> Plan:
        return cls(rounds=5, seconds=2.5, paced_rounds=3, paced_tokens=250, cold_starts=10, connections=500)

    @classmethod
    def quick(cls) -> Plan:
        return cls(rounds=2, seconds=0.7, paced_rounds=1, paced_tokens=120, cold_starts=3, connections=200)


@dataclass(frozen=True, slots=True)
class Bench:
    """What every row needs: the tools, a scratch folder of its own, the plan, the engine and its model."""

    tools: Tools
    folder: Path
    plan: Plan
    engine: Path | None
    model: Path

    def need_engine(self) -> Path:
        """The real llama-server; without one the row is not measured."""
        if self.engine is None:
            raise BenchError("no llama-server: name one in LLAMESH_TEST_LLAMA_SERVER or put it on PATH")
        return self.engine


@dataclass(slots=True)
class Result:
    """One line of the table. `met` is None for a row without a target; `numbers` goes to the JSON."""

    row: str
    what: str
    target: str
    measured: str
    met: bool | None = None
    notes: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)


def say(text: str) -> None:
    """Progress, on stderr: stdout holds only the table."""
    print(text, file=sys.stderr, flush=True)


def load(tools: Tools, mode: str, port: int, *, model: str = MODEL, **options: Any) -> Report:
    """Run the load generator. `burst=True` is a bare flag, other options are `--name value`."""
    argv = [str(tools.load), mode, "--port", str(port), "--model", model]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        argv += [flag] if value is True else [flag, str(value)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the load generator failed: {done.stderr.strip()}")
    report: Report = json.loads(done.stdout)
    return report


def interleave(paths: Mapping[str, Callable[[], Report]], rounds: int, what: str) -> dict[str, list[Report]]:
    """Measure every path once per round; who begins changes, so that drift of the machine hits all alike."""
    names = list(paths)
    reports: dict[str, list[Report]] = {name: [] for name in names}
    for number in range(rounds):
        say(f"  {what}: round {number + 1} of {rounds}")
        for offset in range(len(names)):
            name = names[(number + offset) % len(names)]
            reports[name].append(paths[name]())
    return reports


def _number(report: Report, key: str, quantile: str | None) -> float:
    return float(report.get(key, {}).get(quantile, "nan") if quantile else report[key])


def median(reports: list[Report], key: str, quantile: str | None = None) -> float:
    """The median over rounds of one number, or of one quantile of a distribution (nan: it has no values)."""
    return statistics.median(_number(report, key, quantile) for report in reports)


def ratio(over: list[Report], under: list[Report], key: str, quantile: str | None = None) -> float:
    """The median over rounds of a number divided by its neighbour of the same round."""
    pairs = zip(over, under, strict=True)
    return statistics.median(
        _number(a, key, quantile) / max(_number(b, key, quantile), 1e-9) for a, b in pairs
    )


def difference(over: list[Report], under: list[Report], key: str, quantile: str) -> float:
    """The median over rounds of a quantile minus its neighbour of the same round."""
    pairs = zip(over, under, strict=True)
    return statistics.median(_number(a, key, quantile) - _number(b, key, quantile) for a, b in pairs)


def failures(reports: Mapping[str, list[Report]]) -> list[str]:
    """A note for each path on which something went wrong. A row with one of these is not met."""
    notes = []
    for name, several in reports.items():
        bad = {key: sum(report[key] for report in several) for key in FAILURES}
        if any(bad.values()):
            notes.append(f"{name}: " + ", ".join(f"{count} {key}" for key, count in bad.items() if count))
    return notes


class Ledger:
    """Counts of a node (`/metrics/json`) against counts of the load generator, over one row.

    Made before the load, after the warm-up; `check` afterwards returns the notes. Every request must
    have been counted once and every token that reached a client too.
    """

    def __init__(self, node: Server) -> None:
        self._port = node.port
        self._before = self._read()

    def _read(self) -> tuple[int, int]:
        counted = get_json(self._port, "/metrics/json")["hashes"].values()
        requests = sum(int(entry["requests_total"]) for entry in counted)
        return requests, sum(int(entry["tokens_generated_total"]) for entry in counted)

    def check(self, reports: list[Report]) -> tuple[list[str], dict[str, Any]]:
        """Compare; a stream's tokens may take 100 ms to show, so look again for a second."""
        sent = sum(report["begun"] for report in reports)
        tokens = sum(max(report["tokens"], report["completion_tokens"]) for report in reports)
        until = time.monotonic() + 1.0
        while True:
            now = self._read()
            seen = (now[0] - self._before[0], now[1] - self._before[1])
            if seen == (sent, tokens) or time.monotonic() > until:
                break
            time.sleep(0.05)
        numbers = {
            "requests": {"sent": sent, "node": seen[0]},
            "tokens": {"received": tokens, "node": seen[1]},
        }
        if seen == (sent, tokens):
            return [], numbers
        return [
            f"does not reconcile: sent {sent} requests, got {tokens} tokens; the node counted {seen}"
        ], numbers


class CpuMeter:
    """The processor time of one process between two moments of a load, in percent of one core."""

    def __init__(self, pid: int, after: float, seconds: float) -> None:
        self._process = psutil.Process(pid)
        self._after, self._seconds = after, seconds
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.percent = float("nan")

    def _used(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)

    def _watch(self) -> None:
        time.sleep(self._after)
        began, used = time.monotonic(), self._used()
        time.sleep(self._seconds)
        self.percent = (self._used() - used) / (time.monotonic() - began) * 100

    def __enter__(self) -> CpuMeter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
