"""The rows about the mesh: what a forward through another node costs, and whether load spreads."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from typing import Any

import psutil

from benchmarks import client
from benchmarks.build import BenchError
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
    say,
)
from benchmarks.meshes import FAR, Pair, Reports, cost, start_mesh, until
from benchmarks.rows_process import MIB
from benchmarks.rows_traffic import MOCK_FLAGS, PACE_MS, STREAMS
from benchmarks.servers import MODEL, Server

# The spread: nodes, slots of each, requests at once, and how long each request holds its slot.
NODES, SLOTS, CLIENTS, SERVICE_MS = 4, 4, 64, 200


def _rates(reports: Reports, key: str) -> str:
    return ", ".join(f"{name} {median(several, key):,.0f}/s" for name, several in reports.items())


def _judged(result: Result, problems: list[str], numbers: dict[str, Any], reports: Reports) -> Result:
    """What went wrong makes a target missed."""
    result.notes += problems
    result.numbers |= {"reconciled": numbers, "rounds": reports}
    if problems and result.met is not None:
        result.met = False
    return result


def requests(bench: Bench) -> list[Result]:
    """One request after the other, then 16 connections at once; and no handshake in all that time."""
    plan = bench.plan
    with contextlib.ExitStack() as stack:
        pair = Pair.start(stack, bench)
        before = pair.handshakes()
        seconds = plan.seconds * 0.6
        measure = functools.partial(load, bench.tools, "requests", pair.entry.port, seconds=seconds)

        check = pair.ledgers()
        alone = interleave(pair.paths(measure, connections=1), plan.rounds, "one request at a time")
        added = difference(alone["forwarded"], alone["local"], "latency_ms", "p50")
        tail = difference(alone["forwarded"], alone["local"], "latency_ms", "p99")
        each = {name: median(several, "latency_ms", "p50") for name, several in alone.items()}
        single = Result(
            "mesh_requests",
            "forwarded request, against one served here, median",
            "at most +1.0 ms",
            f"{added:+.2f} ms",
            added <= 1.0,
            [", ".join(f"{name} {took:.2f} ms" for name, took in each.items()) + f"; p99 {tail:+.2f} ms"],
            {"added_ms": added, "added_ms_p99": tail},
        )
        single = _judged(single, *check(alone), alone)

        check = pair.ledgers()
        many = interleave(pair.paths(measure, connections=16), plan.rounds, "requests/s, 16 connections")
        share = ratio(many["forwarded"], many["local"], "requests_per_s")
        rate = Result(
            "mesh_requests",
            "forwarded requests/s, 16 connections, mock upstream",
            "50 % of local",
            f"{share:.1%} of local",
            share >= 0.50,
            [_rates(many, "requests_per_s"), cost(many, "ok")],
            {"of_local": share},
        )
        rate = _judged(rate, *check(many), many)

        sent = sum(report["ok"] for reports in (alone, many) for report in reports["forwarded"])
        made = pair.handshakes() - before
        steady = Result(
            "mesh_requests",
            "handshakes under steady load",
            "none",
            f"{made} in {sent:,} forwards",
            made == 0,
            [],
            {"handshakes": made, "forwards": sent},
        )
        return [single, rate, steady]


def paced(bench: Bench) -> list[Result]:
    """64 forwarded streams of a real model's pace: the processor time of both nodes together."""
    tokens = bench.plan.paced_tokens
    with contextlib.ExitStack() as stack:
        pair = Pair.start(stack, bench)

        def measure(model: str) -> Report:
            # All 64 run from the end of the first second until the first of them ends.
            span = {"after": 1.1, "seconds": tokens * PACE_MS / 1000 - 1.2}
            with (
                CpuMeter(pair.entry.process.pid, **span) as here,
                CpuMeter(pair.far.process.pid, **span) as there,
            ):
                report = load(
                    bench.tools,
                    "paced",
                    pair.entry.port,
                    model=model,
                    connections=STREAMS,
                    pace_ms=PACE_MS,
                    max_tokens=tokens,
                    seconds=10,
                )
            report |= {"entry_percent": here.percent, "far_percent": there.percent}
            report["percent"] = here.percent + there.percent
            return report

        check = pair.ledgers()
        what = f"{STREAMS} forwarded streams paced at {PACE_MS} ms"
        reports = interleave(pair.paths(measure), bench.plan.paced_rounds, what)
        cpu, alone = median(reports["forwarded"], "percent"), median(reports["local"], "entry_percent")
        parts = [median(reports["forwarded"], f"{name}_percent") for name in ("entry", "far")]
        late = {
            key: difference(reports["forwarded"], reports["local"], key, "p50")
            for key in ("first_token_ms", "transit_ms")
        }
        result = Result(
            "mesh_paced",
            f"{what}: CPU of both nodes",
            "under 45 % of a core",
            f"{cpu:.1f} %",
            cpu < 45,
            [
                f"entry {parts[0]:.1f} %, the other {parts[1]:.1f} %; served locally {alone:.1f} %",
                f"first token {late['first_token_ms']:+.2f} ms, each token {late['transit_ms']:+.2f} ms",
            ],
            {"percent": cpu, "entry": parts[0], "far": parts[1], "local": alone, **late},
        )
        return [_judged(result, *check(reports), reports)]


def events(bench: Bench) -> list[Result]:
    """32 unpaced streams: one event per write, then many per write."""
    plan = bench.plan
    results = []
    with contextlib.ExitStack() as stack:
        pair = Pair.start(stack, bench)
        for batch in (1, 64):
            measure = functools.partial(
                load,
                bench.tools,
                "stream",
                pair.entry.port,
                connections=32,
                batch=batch,
                seconds=plan.seconds * 0.7,
                max_tokens=2000,
            )
            check = pair.ledgers()
            what = f"forwarded SSE events/s, 32 unpaced streams, {batch} per write"
            reports = interleave(pair.paths(measure), plan.rounds, what)
            share = ratio(reports["forwarded"], reports["local"], "events_per_s")
            reads = {name: median(several, "events_per_read") for name, several in reports.items()}
            result = Result(
                "mesh_events",
                what,
                "60 % of local",
                f"{share:.1%} of local",
                share >= 0.60,
                [
                    _rates(reports, "events_per_s"),
                    cost(reports, "events"),
                    "events per read: " + ", ".join(f"{name} {count:.0f}" for name, count in reads.items()),
                ],
                {"of_local": share, "events_per_read": reads},
            )
            results.append(_judged(result, *check(reports), reports))
    return results


def spread(bench: Bench) -> list[Result]:
    """64 clients at one of four equal nodes, services of a fixed time: how far from the best split?

    There are four clients for each slot, so with the best split every request waits for three others and
    is answered after four services. Whatever is split worse shows in the last twentieth.
    """
    best = math.ceil(CLIENTS / (NODES * SLOTS)) * SERVICE_MS
    plan = bench.plan
    with contextlib.ExitStack() as stack:
        nodes = start_mesh(stack, bench, [[MODEL]] * NODES, ("-c", "8192", "-np", str(SLOTS)))
        for node in nodes:
            status, body = client.call(node.port, "POST", "/admin/prewarm", {"model": MODEL})
            if status not in (200, 202):
                raise BenchError(f"prewarm answered {status}: {body[:200]!r}")
        for node in nodes:
            until("each node sees the model loaded on all", functools.partial(_all_loaded, node))
        entry = nodes[0]
        run = functools.partial(
            load, bench.tools, "stream", entry.port, pace_ms=SERVICE_MS, max_tokens=1, connections=CLIENTS
        )
        run(seconds=1.0)
        ledger, before = Ledger(entry), [_served(node) for node in nodes]
        what = f"{CLIENTS} clients at one of {NODES} nodes"
        reports = interleave(
            {"mesh": functools.partial(run, seconds=plan.seconds * 3)}, plan.paced_rounds, what
        )
        problems, numbers = ledger.check(reports["mesh"])
        served = [_served(node) - count for node, count in zip(nodes, before, strict=True)]
        # What was forwarded is counted at both nodes.
        shares = [served[0] - sum(served[1:]), *served[1:]]
        last = median(reports["mesh"], "latency_ms", "p95")
        result = Result(
            "mesh_spread",
            f"{what}: p95",
            "1.3 x the best split",
            f"{last / best:.2f} x",
            last <= 1.3 * best,
            [f"p95 {last:.0f} ms, best {best} ms; requests by node: " + ", ".join(map(str, shares))],
            {"of_best": last / best, "p95_ms": last, "best_ms": best, "by_node": shares},
        )
        return [_judged(result, failures(reports) + problems, numbers, reports)]


def _all_loaded(node: Server) -> bool:
    nodes = client.get_json(node.port, "/cluster/nodes")["nodes"]
    return all(entry["loaded_models"] and entry["active_instances"] for entry in nodes.values())


def _served(node: Server) -> int:
    counted = client.get_json(node.port, "/metrics/json")["hashes"].values()
    return sum(int(entry["requests_total"]) for entry in counted)


def idle(bench: Bench) -> list[Result]:
    """A node of three that has nothing to do: its memory, and what gossip costs it."""
    seconds = bench.plan.seconds * 6
    with contextlib.ExitStack() as stack:
        nodes = start_mesh(stack, bench, [[MODEL], [FAR], ["third"]], MOCK_FLAGS)
        for node in nodes:
            for path in ("/metrics", "/v1/models", "/cluster/nodes"):
                client.call(node.port, "GET", path)
        time.sleep(2.0)
        say(f"  idle mesh: {seconds:.0f} s")
        meters = [CpuMeter(node.process.pid, after=0, seconds=seconds) for node in nodes]
        with contextlib.ExitStack() as meter_stack:
            for meter in meters:
                meter_stack.enter_context(meter)
        resident = max(psutil.Process(node.process.pid).memory_info().rss for node in nodes)
        cpu = max(meter.percent for meter in meters)
    return [
        Result(
            "mesh_idle",
            "VmRSS of an idle node with two peers",
            "under 90 MB",
            f"{resident / MIB:.1f} MB",
            resident < 90 * MIB,
            ["the largest of three"],
            {"bytes": resident},
        ),
        Result(
            "mesh_idle",
            "CPU of an idle node with two peers",
            "-",
            f"{cpu:.2f} % of a core",
            None,
            ["the busiest of three"],
            {"percent": cpu},
        ),
    ]
