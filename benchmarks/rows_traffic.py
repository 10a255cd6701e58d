"""The rows about traffic: requests and events per second, and streams paced like a real model's."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

from benchmarks import servers
from benchmarks.measure import (
    Bench,
    CpuMeter,
    Ledger,
    Report,
    Result,
    difference,
    failures,
    interleave,
    load,
    median,
    ratio,
)
from benchmarks.servers import Server

MOCK_FLAGS = ("-c", "8192", "-np", "256")
PACE_MS = 20
STREAMS = 64


def _rates(reports: dict[str, list[Report]], key: str) -> str:
    return ", ".join(f"{name} {median(several, key):,.0f}/s" for name, several in reports.items())


def _checked(result: Result, reports: dict[str, list[Report]], ledger: Ledger) -> Result:
    """Add what went wrong and what doesn't add up; either makes a target missed."""
    reconciled, numbers = ledger.check(reports["llamesh"])
    problems = failures(reports) + reconciled
    result.notes += problems
    result.numbers |= {"reconciled": numbers, "rounds": reports}
    if problems and result.met is not None:
        result.met = False
    return result


def requests(bench: Bench) -> list[Result]:
    """8 connections, one token each, the real llama-server behind everything."""
    engine, plan = bench.need_engine(), bench.plan
    with contextlib.ExitStack() as stack:
        direct = servers.start_engine(stack, bench.folder, engine, bench.model)
        router = servers.start_router(stack, bench.folder, engine, bench.model)
        node = servers.start_node(stack, bench.folder, "requests", engine=engine, model=bench.model)
        paths = {"direct": direct, "llamesh": node, "router": router}
        measure = functools.partial(load, bench.tools, "requests", connections=8, max_tokens=1)
        for server in paths.values():
            measure(port=server.port, seconds=0.5)
        ledger = Ledger(node)
        runs = {
            name: functools.partial(measure, port=server.port, seconds=plan.seconds)
            for name, server in paths.items()
        }
        reports = interleave(runs, plan.rounds, "requests/s, real llama-server")
        key = "requests_per_s"
        share = ratio(reports["llamesh"], reports["direct"], key)
        lead = ratio(reports["llamesh"], reports["router"], key)
        what = "requests/s, 8 connections, 1 token"
        result = _checked(
            Result(
                "requests",
                what,
                "70 % of direct",
                f"{share:.1%} of direct",
                share >= 0.70,
                [_rates(reports, key)],
                {"of_direct": share, "of_router": lead},
            ),
            reports,
            ledger,
        )
        clean = result.met or share < 0.70
        above = Result(
            "requests",
            what,
            "above the router",
            f"{lead:.2f} x the router",
            lead > 1 and clean,
            [],
            {"of_router": lead},
        )
        return [result, above]


def own_cost(bench: Bench) -> list[Result]:
    """16 connections to the mock: what is left is the proxy's own work."""
    plan = bench.plan
    with contextlib.ExitStack() as stack:
        mock = servers.start_mock(stack, bench.folder, bench.tools.mock)
        node = servers.start_node(
            stack, bench.folder, "own", engine=bench.tools.mock, model=bench.model, flags=MOCK_FLAGS
        )
        nginx = servers.start_nginx(stack, bench.folder, mock.port)
        paths = {"direct": mock, "llamesh": node} | ({"nginx": nginx} if nginx else {})
        measure = functools.partial(load, bench.tools, "requests", connections=16)
        for server in paths.values():
            measure(port=server.port, seconds=0.5)
        ledger = Ledger(node)
        runs = {
            name: functools.partial(measure, port=server.port, seconds=plan.seconds * 0.8)
            for name, server in paths.items()
        }
        reports = interleave(runs, plan.rounds, "requests/s, mock upstream")
        rate = median(reports["llamesh"], "requests_per_s")
        cost = median(reports["llamesh"], "latency_ms", "p50")
        notes = [_rates(reports, "requests_per_s")] + ([] if nginx else ["no nginx on PATH: left out"])
        result = Result(
            "own_cost",
            "requests/s, 16 connections, mock upstream",
            "-",
            f"{rate:,.0f}/s, median {cost:.2f} ms",
            None,
            notes,
            {"requests_per_s": rate, "latency_ms_p50": cost},
        )
        return [_checked(result, reports, ledger)]


def events(bench: Bench) -> list[Result]:
    """32 unpaced streams from the mock: one event per write, then many per write."""
    plan = bench.plan
    with contextlib.ExitStack() as stack:
        mock = servers.start_mock(stack, bench.folder, bench.tools.mock)
        node = servers.start_node(
            stack, bench.folder, "events", engine=bench.tools.mock, model=bench.model, flags=MOCK_FLAGS
        )
        results = []
        for batch in (1, 64):
            measure = functools.partial(load, bench.tools, "stream", connections=32, batch=batch)
            paths = {"direct": mock, "llamesh": node}
            for server in paths.values():
                measure(port=server.port, seconds=0.2, max_tokens=500)
            ledger = Ledger(node)
            runs = {
                name: functools.partial(
                    measure, port=server.port, seconds=plan.seconds * 0.7, max_tokens=2000
                )
                for name, server in paths.items()
            }
            what = f"SSE events/s, 32 unpaced streams, {batch} per write"
            reports = interleave(runs, plan.rounds, what)
            key = "events_per_s"
            rate, share = median(reports["llamesh"], key), ratio(reports["llamesh"], reports["direct"], key)
            reads = {name: median(several, "events_per_read") for name, several in reports.items()}
            notes = [
                _rates(reports, key),
                "events per read: " + ", ".join(f"{name} {count:.0f}" for name, count in reads.items()),
            ]
            numbers: dict[str, Any] = {"events_per_s": rate, "of_direct": share, "events_per_read": reads}
            measured = f"{rate:,.0f}/s, {share:.1%} of direct"
            reached = rate >= 150_000 or share >= 0.40
            result = Result("events", what, "150,000/s or 40 % of direct", measured, reached, notes, numbers)
            results.append(_checked(result, reports, ledger))
        return results


def paced(bench: Bench) -> list[Result]:
    """64 streams at 20 ms a token, starts spread over a second; then 64 at once."""
    with contextlib.ExitStack() as stack:
        mock = servers.start_mock(stack, bench.folder, bench.tools.mock)
        node = servers.start_node(
            stack, bench.folder, "paced", engine=bench.tools.mock, model=bench.model, flags=MOCK_FLAGS
        )
        for server in (mock, node):
            load(bench.tools, "requests", server.port, connections=16, seconds=0.5)
        return [*_spread(bench, mock, node), _burst(bench, mock, node)]


def _added(reports: dict[str, list[Report]], key: str, quantile: str) -> float:
    """Milliseconds that the node adds to a quantile."""
    return difference(reports["llamesh"], reports["direct"], key, quantile)


def _latencies(reports: dict[str, list[Report]]) -> list[str]:
    return [
        f"first token added: p50 {_added(reports, 'first_token_ms', 'p50'):+.2f} ms, "
        f"p99 {_added(reports, 'first_token_ms', 'p99'):+.2f} ms",
        f"each token added: p50 {_added(reports, 'transit_ms', 'p50'):+.2f} ms, "
        f"p99 {_added(reports, 'transit_ms', 'p99'):+.2f} ms",
    ]


def _spread(bench: Bench, mock: Server, node: Server) -> list[Result]:
    tokens = bench.plan.paced_tokens
    stream = functools.partial(
        load, bench.tools, "paced", connections=STREAMS, pace_ms=PACE_MS, max_tokens=tokens, seconds=10
    )

    def through_node() -> Report:
        # All 64 run from the end of the first second until the first of them ends.
        with CpuMeter(node.process.pid, after=1.1, seconds=tokens * PACE_MS / 1000 - 1.2) as meter:
            report = stream(port=node.port)
        report["node_cpu_percent"] = meter.percent
        return report

    ledger = Ledger(node)
    runs: dict[str, Callable[[], Report]] = {
        "direct": functools.partial(stream, port=mock.port),
        "llamesh": through_node,
    }
    what = f"{STREAMS} streams paced at {PACE_MS} ms"
    reports = interleave(runs, bench.plan.paced_rounds, what)
    first, cpu = _added(reports, "first_token_ms", "p50"), median(reports["llamesh"], "node_cpu_percent")
    pace = ratio(reports["llamesh"], reports["direct"], "stream_tokens_per_s", "p50")
    late = Result(
        "paced",
        f"{what}: first token, median",
        "at most 2 ms later",
        f"{first:+.2f} ms",
        first <= 2.0,
        _latencies(reports),
        {"first_token_added_ms": first, "tokens_per_s_ratio": pace, "node_cpu_percent": cpu},
    )
    late = _checked(late, reports, ledger)
    clean = late.met or first > 2.0
    return [
        late,
        Result(
            "paced",
            f"{what}: tokens/s",
            "within 1 %",
            f"{pace:.2%} of direct",
            abs(pace - 1) <= 0.01 and clean,
        ),
        Result("paced", f"{what}: node's CPU", "under 20 % of a core", f"{cpu:.1f} %", cpu < 20 and clean),
    ]


def _burst(bench: Bench, mock: Server, node: Server) -> Result:
    stream = functools.partial(
        load,
        bench.tools,
        "paced",
        connections=STREAMS,
        pace_ms=PACE_MS,
        max_tokens=50,
        seconds=10,
        burst=True,
    )
    ledger = Ledger(node)
    what = f"{STREAMS} streams paced at {PACE_MS} ms, all at once"
    runs = {
        "direct": functools.partial(stream, port=mock.port),
        "llamesh": functools.partial(stream, port=node.port),
    }
    reports = interleave(runs, bench.plan.rounds, what)
    first, last = _added(reports, "first_token_ms", "p50"), _added(reports, "first_token_ms", "p99")
    measured = f"first token {first:+.1f} ms, p99 {last:+.1f} ms"
    numbers = {"first_token_added_ms": first, "first_token_added_ms_p99": last}
    return _checked(Result("paced", what, "-", measured, None, _latencies(reports), numbers), reports, ledger)
