"""Meshes of nodes on this machine, for the rows about them, and what is read from them.

All speak Noise with each other, as between machines. A pair is an entry node with the model `bench` and a
node behind it with the model `far`, so both paths of a row begin at the same node: what differs is one
link and one more node.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from benchmarks import client, servers
from benchmarks.build import BenchError
from benchmarks.measure import Bench, Ledger, Report, failures, load, median
from benchmarks.rows_traffic import MOCK_FLAGS, STREAMS
from benchmarks.servers import MODEL, Server

FAR = "far"
JOIN_SECONDS = 20.0

Reports = dict[str, list[Report]]


def until(what: str, condition: Callable[[], bool]) -> None:
    """Poll. Raises BenchError."""
    limit = time.monotonic() + JOIN_SECONDS
    while not condition():
        if time.monotonic() > limit:
            raise BenchError(f"{what}: not within {JOIN_SECONDS:g} s")
        time.sleep(0.05)


def _has_joined(node: Server, count: int) -> bool:
    nodes = client.get_json(node.port, "/cluster/nodes")["nodes"]
    return len(nodes) == count and all(entry["ready"] for entry in nodes.values())


def start_mesh(
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
        until(f"the mesh of {len(nodes)} nodes", functools.partial(_has_joined, node, len(nodes)))
    return nodes


@dataclass(frozen=True, slots=True)
class Pair:
    """An entry node and one behind it."""

    entry: Server
    far: Server

    @classmethod
    def start(cls, stack: contextlib.ExitStack, bench: Bench) -> Pair:
        """Both, with both models loaded, and connections enough for what the rows send."""
        pair = cls(*start_mesh(stack, bench, [[MODEL], [FAR]], MOCK_FLAGS))
        until(f"the entry's list of models has {FAR}", pair._is_listed)
        for model in (MODEL, FAR):
            load(bench.tools, "requests", pair.entry.port, model=model, connections=STREAMS, seconds=0.5)
        return pair

    def _is_listed(self) -> bool:
        models = client.get_json(self.entry.port, "/v1/models")["data"]
        return any(model["id"] == FAR for model in models)

    def handshakes(self) -> int:
        """How many there were so far, whoever began them and whatever came of them. Both ends count."""
        return sum(_counted(node.port, "llamesh_handshakes_total") for node in (self.entry, self.far))

    def paths(self, measure: Callable[..., Report], **options: Any) -> dict[str, Callable[[], Report]]:
        """The two ways of a request, with the processor time of each node in the reports."""

        def metered(model: str) -> Report:
            before = self._used()
            report = measure(model=model, **options)
            used = [after - had for after, had in zip(self._used(), before, strict=True)]
            return report | {"entry_cpu_s": used[0], "far_cpu_s": used[1]}

        return {"local": functools.partial(metered, MODEL), "forwarded": functools.partial(metered, FAR)}

    def _used(self) -> list[float]:
        times = [psutil.Process(node.process.pid).cpu_times() for node in (self.entry, self.far)]
        return [float(one.user + one.system) for one in times]

    def ledgers(self) -> Callable[[Reports], tuple[list[str], dict[str, Any]]]:
        """Compares, after the load, the counts of both nodes with those of the load generator."""
        entry, far = Ledger(self.entry), Ledger(self.far)

        def check(reports: Reports) -> tuple[list[str], dict[str, Any]]:
            # A node counts by model what its own cookbook has.
            notes, numbers = entry.check(reports["local"])
            more, behind = far.check(reports["forwarded"])
            return failures(reports) + notes + more, {"entry": numbers, "far": behind}

        return check


def _counted(port: int, name: str) -> int:
    """The sum of a counter's series in `/metrics`. Raises BenchError when there is none."""
    status, body = client.call(port, "GET", "/metrics")
    found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", body.decode(), re.MULTILINE)
    if status != 200 or not found:
        raise BenchError(f"/metrics ({status}) has no {name}")
    return int(sum(map(float, found)))


def cost(reports: Reports, unit: str) -> str:
    """Processor time of the nodes for each of `unit` (a count in the reports), in words.

    Unlike a rate it hardly depends on what else this machine does.
    """
    each = {
        (path, node): median([{"us": one[f"{node}_cpu_s"] / one[unit] * 1e6} for one in several], "us")
        for path, several in reports.items()
        for node in ("entry", "far")
    }
    here, entry, far = each["local", "entry"], each["forwarded", "entry"], each["forwarded", "far"]
    return f"nodes' CPU for each: local {here:.3g} us, forwarded {entry:.3g} + {far:.3g} us"
