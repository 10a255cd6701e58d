"""The rows about the node as a process: cold start and memory."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import time
from pathlib import Path

import psutil

from benchmarks import client, servers
from benchmarks.build import BenchError
from benchmarks.measure import Bench, Result, say
from benchmarks.rows_traffic import MOCK_FLAGS
from benchmarks.servers import MODEL, Server

MIB = 1 << 20
SETTLE_SECONDS = 30.0


def _children(node: Server) -> list[psutil.Process]:
    return psutil.Process(node.process.pid).children(recursive=True)


def _wait_gone(node: Server) -> None:
    until = time.monotonic() + SETTLE_SECONDS
    while _children(node):
        if time.monotonic() > until:
            raise BenchError("an unloaded instance did not end")
        time.sleep(0.02)


def _unload(node: Server) -> None:
    """Ask for the model to be unloaded and wait until its process is gone.

    The profile's idle timeout of a second does the same, later, should nobody answer that path.
    """
    client.call(node.port, "POST", "/admin/unload", {"model": MODEL})
    _wait_gone(node)


def _set_flag(argv: list[str], flag: str, value: str) -> list[str]:
    """`argv` with the value after `flag` replaced, or both appended."""
    if flag not in argv:
        return [*argv, flag, value]
    at = argv.index(flag)
    return [*argv[: at + 1], value, *argv[at + 2 :]]


def _by_hand(argv: list[str], folder: Path) -> float:
    """Start llama-server, poll it each 5 ms, ask: seconds from the start to the first token."""
    port = servers.free_port()
    command = _set_flag(_set_flag(argv, "--port", str(port)), "--host", "127.0.0.1")
    with contextlib.ExitStack() as stack, (folder / "by-hand.log").open("wb") as log:
        began = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(servers.end, process)
        client.wait_healthy(port, 0.005, SETTLE_SECONDS)
        return client.first_token(port, MODEL) - began


def _through_node(node: Server) -> float:
    began = time.monotonic()
    return client.first_token(node.port, MODEL) - began


def cold_start(bench: Bench) -> list[Result]:
    """First token with nothing running, against the same llama-server with the same flags by hand."""
    engine = bench.need_engine()
    with contextlib.ExitStack() as stack:
        node = servers.start_node(
            stack, bench.folder, "cold", engine=engine, model=bench.model, idle_seconds=1
        )
        _through_node(node)
        running = [child.cmdline() for child in _children(node)]
        argv = next((line for line in running if line and Path(line[0]).name == engine.name), None)
        if argv is None:
            raise BenchError(f"the node runs no {engine.name} after its first answer, but {running}")
        _unload(node)
        node_ms, hand_ms = [], []
        for number in range(bench.plan.cold_starts):
            say(f"  cold start: {number + 1} of {bench.plan.cold_starts}")
            hand_ms.append(_by_hand(argv, bench.folder) * 1000)
            time.sleep(0.1)  # the end of one process must not slow the start of the next
            node_ms.append(_through_node(node) * 1000)
            _unload(node)
            time.sleep(0.1)
    added = statistics.median(node_ms) - statistics.median(hand_ms)
    note = f"llamesh {statistics.median(node_ms):.0f} ms, by hand {statistics.median(hand_ms):.0f} ms"
    numbers = {"added_ms": added, "llamesh_ms": node_ms, "by_hand_ms": hand_ms}
    what = "cold start to first token"
    return [
        Result("cold", what, "at most 60 ms over by hand", f"{added:+.1f} ms", added <= 60, [note], numbers)
    ]


def _resident(node: Server) -> int:
    """VmRSS in bytes, of the node alone."""
    return int(psutil.Process(node.process.pid).memory_info().rss)


def memory(bench: Bench) -> list[Result]:
    """VmRSS of an idle node with the mesh on, and what each idle client connection adds."""
    count = bench.plan.connections
    with contextlib.ExitStack() as stack:
        node = servers.start_node(
            stack,
            bench.folder,
            "memory",
            engine=bench.tools.mock,
            model=bench.model,
            flags=MOCK_FLAGS,
            cluster=True,
        )
        say("  memory: idle node")
        for path in ("/metrics", "/v1/models"):
            status, body = client.call(node.port, "GET", path)
            if status != 200:
                raise BenchError(f"GET {path} answered {status}: {body[:200]!r}")
        time.sleep(1.0)
        idle = _resident(node)
        say(f"  memory: {count} idle connections")
        # Once before, so that what is allocated once (the instance, its pool) isn't charged to connections.
        client.close_all(client.open_idle(node.port, MODEL, 50))
        time.sleep(0.5)
        before = _resident(node)
        connections = client.open_idle(node.port, MODEL, count)
        stack.callback(client.close_all, connections)
        time.sleep(0.5)
        each = (_resident(node) - before) / count
    whole = f"{idle / MIB:.1f} MB"
    return [
        Result("memory", "VmRSS of an idle node", "under 90 MB", whole, idle < 90 * MIB, [], {"bytes": idle}),
        Result(
            "memory",
            "each idle keep-alive connection",
            "under 20 KB",
            f"{each / 1024:.1f} KB",
            each < 20 * 1024,
            [f"{count} connections, each after one chat completion"],
            {"bytes": each, "connections": count},
        ),
    ]
