"""The rows about the mesh: what a forward through another node costs, and whether load spreads.

All nodes run on this machine and speak Noise with each other, as they do between machines. A pair is an
entry node with the model `bench` and a node behind it with the model `far`, both on the mock, so both
paths of a row begin at the same node: what differs is one link and one more node.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks import client, servers
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
from benchmarks.rows_process import MIB
from benchmarks.rows_traffic import MOCK_FLAGS, PACE_MS, STREAMS
from benchmarks.servers import MODEL, Server

FAR = "far"
JOIN_SECONDS = 20.0

# The spread: nodes, slots of each, requests at once, and how long each request holds its slot.
NODES, SLOTS, CLIENTS, SERVICE_MS = 4, 4, 64, 200

Reports = dict[str, list[Report]]


def _until(what: str, condition: Callable[[], bool]) -> None:
    until = time.monotonic() + JOIN_SECONDS
    while not condition():
        if time.monotonic() > until:
            raise BenchError(f"{what}: not within {JOIN_SECONDS:g} s")
        time.sleep(0.05)


def _has_joined(node: Server, count: int) -> bool:
    nodes = client.get_json(node.port, "/cluster/nodes")["nodes"]
    return len(nodes) == count and all(entry["ready"] for entry in nodes.values())


def _start(
    stack: contextlib.ExitStack, bench: Bench, cookbooks: Sequence[Sequence[str]], flags: Sequence[str]
) -> list[Server]:
    """A mesh of one node for each cookbook, a list of model names. Returns when each sees all.

    They have a token and an mDNS service of their own, so other nodes of this machine don't matter.
    """
    token = base64.b64encode(secrets.token_bytes(32)).decode()
    service = f"_llb-{secrets.token_hex(4)}._tcp.local"
    nodes: list[Server] = []
    for number, models in enumerate(cookbooks):
        name = f"node{number + 1}"
        cluster = {
            "enabled": True,
            "peers": [f"127.0.0.1:{other.port}" for other in nodes],
            "discovery": {"interfaces": ["127.0.0.1"], "service_name": service},
            "noise": {"config_dir": str(bench.folder / name / "keys")},
        }
        nodes.append(
            servers.start_node(
                stack,
                bench.folder,
                name,
                engine=bench.tools.mock,
                model=bench.model,
                flags=flags,
                models=models,
                settings={"cluster": cluster},
                variables={"CLUSTER_TOKEN": token},
            )
        )
    for node in nodes:
        _until(f"the mesh of {len(nodes)} nodes", functools.partial(_has_joined, node, len(nodes)))
    return nodes


@dataclass(frozen=True, slots=True)
class Pair:
    """An entry node and one behind it."""

    entry: Server
    far: Server

    @classmethod
    def start(cls, stack: contextlib.ExitStack, bench: Bench) -> Pair:
        """Both, with both models loaded, and connections enough for what the rows send."""
        pair = cls(*_start(stack, bench, [[MODEL], [FAR]], MOCK_FLAGS))
        _until(f"the entry's list of models has {FAR}", pair._is_listed)
        for model in (MODEL, FAR):
            load(bench.tools, "requests", pair.entry.port, model=model, connections=STREAMS, seconds=0.5)
        return pair

    def _is_listed(self) -> bool:
        models = client.get_json(self.entry.port, "/v1/models")["data"]
        return any(model["id"] == FAR for model in models)

    def connections(self) -> set[tuple[Any, Any]]:
        """Those between the two nodes that are open now. Each began with a handshake, and one that isn't
        needed any more stays open for a minute, so a new one doesn't come and go between two looks.
        """
        ends = []
        for node in (self.entry, self.far):
            inet = psutil.Process(node.process.pid).net_connections("tcp")
            ends.append({(one.laddr, one.raddr) for one in inet if one.status == psutil.CONN_ESTABLISHED})
        here, there = ends
        return {(near, distant) for near, distant in here if (distant, near) in there}

    def ledgers(self) -> Callable[[Reports], tuple[list[str], dict[str, Any]]]:
        """Compares, after the load, the counts of both nodes with those of the load generator."""
        entry, far = Ledger(self.entry), Ledger(self.far)

        def check(reports: Reports) -> tuple[list[str], dict[str, Any]]:
            notes, numbers = entry.check(reports["local"] + reports["forwarded"])
            more, behind = far.check(reports["forwarded"])
            return failures(reports) + notes + more, {"entry": numbers, "far": behind}

        return check


def _both(measure: Callable[..., Report], **options: Any) -> dict[str, Callable[[], Report]]:
    """The two paths of a pair."""
    return {
        "local": functools.partial(measure, model=MODEL, **options),
        "forwarded": functools.partial(measure, model=FAR, **options),
    }


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
        before = pair.connections()
        seconds = plan.seconds * 0.6
        measure = functools.partial(load, bench.tools, "requests", pair.entry.port, seconds=seconds)

        check = pair.ledgers()
        alone = interleave(_both(measure, connections=1), plan.rounds, "one request at a time")
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
        many = interleave(_both(measure, connections=16), plan.rounds, "requests/s, 16 connections")
        share = ratio(many["forwarded"], many["local"], "requests_per_s")
        rate = Result(
            "mesh_requests",
            "forwarded requests/s, 16 connections, mock upstream",
            "50 % of local",
            f"{share:.1%} of local",
            share >= 0.50,
            [_rates(many, "requests_per_s")],
            {"of_local": share},
        )
        rate = _judged(rate, *check(many), many)

        sent = sum(report["ok"] for reports in (alone, many) for report in reports["forwarded"])
        made = len(pair.connections() - before)
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
        reports = interleave(_both(measure), bench.plan.paced_rounds, what)
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
                f"first token {late['first_token_ms']:+.2f} ms, each token {late['transit_ms']:+.2f} ms, medians",
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
            reports = interleave(_both(measure), plan.rounds, what)
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
                    "events per read: " + ", ".join(f"{name} {count:.0f}" for name, count in reads.items()),
                ],
                {"of_local": share, "events_per_read": reads},
            )
            results.append(_judged(result, *check(reports), reports))
    return results


def spread(bench: Bench) -> list[Result]:
    """64 clients at one of four equal nodes, services of a fixed time: how far from the best split?

    With one slot for each quarter of the clients, every request of the best split waits for three others
    and is answered after four services; whatever is split worse shows in the last twentieth.
    """
    best = math.ceil(CLIENTS / (NODES * SLOTS)) * SERVICE_MS
    with contextlib.ExitStack() as stack:
        flags = ("-c", "8192", "-np", str(SLOTS))
        nodes = _start(stack, bench, [[MODEL]] * NODES, flags)
        stream = functools.partial(load, bench.tools, "stream", pace_ms=SERVICE_MS, max_tokens=1)
        for node in nodes:
            stream(port=node.port, connections=SLOTS, seconds=1.0)
        entry, others = nodes[0], nodes[1:]
        ledger = Ledger(entry)
        run = functools.partial(stream, port=entry.port, connections=CLIENTS, seconds=bench.plan.seconds * 3)
        before = [_served(node) for node in nodes]
        reports = interleave(
            {"mesh": run}, bench.plan.paced_rounds, f"{CLIENTS} clients at one of {NODES} nodes"
        )
        served = [_served(node) - count for node, count in zip(nodes, before, strict=True)]
        # Each forward is counted at the entry, too.
        shares = [served[0] - sum(served[1:]), *served[1:]]
        problems, numbers = ledger.check(reports["mesh"])
        last = median(reports["mesh"], "latency_ms", "p95")
        result = Result(
            "mesh_spread",
            f"{CLIENTS} clients at one node, {len(others)} idle ones: p95",
            "1.3 x the best split",
            f"{last / best:.2f} x",
            last <= 1.3 * best,
            [
                f"p95 {last:.0f} ms, best {best} ms; requests by node: " + ", ".join(map(str, shares)),
            ],
            {"of_best": last / best, "p95_ms": last, "best_ms": best, "by_node": shares},
        )
        return [_judged(result, failures(reports) + problems, numbers, reports)]


def _served(node: Server) -> int:
    counted = client.get_json(node.port, "/metrics/json")["hashes"].values()
    return sum(int(entry["requests_total"]) for entry in counted)


def idle(bench: Bench) -> list[Result]:
    """A node of three that has nothing to do: its memory, and what gossip costs it."""
    seconds = bench.plan.seconds * 6
    with contextlib.ExitStack() as stack:
        nodes = _start(stack, bench, [[MODEL], [FAR], ["third"]], MOCK_FLAGS)
        for node in nodes:
            for path in ("/metrics", "/v1/models"):
                client.get_json(node.port, path) if path == "/v1/models" else client.call(
                    node.port, "GET", path
                )
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
