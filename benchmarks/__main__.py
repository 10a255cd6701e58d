"""`python -m benchmarks`: build the tools, measure every row, print a table, write JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import psutil

import llamesh
from benchmarks import rows_mesh, rows_process, rows_traffic
from benchmarks.build import HERE, BenchError, build
from benchmarks.measure import Bench, Plan, Result, say
from tests.support.tiny_model import write_tiny_model

Row = Callable[[Bench], list[Result]]

ROWS: dict[str, Row] = {
    "requests": rows_traffic.requests,
    "own_cost": rows_traffic.own_cost,
    "events": rows_traffic.events,
    "paced": rows_traffic.paced,
    "cold": rows_process.cold_start,
    "memory": rows_process.memory,
    "mesh_requests": rows_mesh.requests,
    "mesh_paced": rows_mesh.paced,
    "mesh_events": rows_mesh.events,
    "mesh_spread": rows_mesh.spread,
    "mesh_idle": rows_mesh.idle,
}

# For `--only`: several rows by one name.
GROUPS = {"mesh": [name for name in ROWS if name.startswith("mesh_")]}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short rounds: a smoke test, not a measurement")
    names = [*ROWS, *GROUPS]
    parser.add_argument(
        "--only", action="append", choices=names, metavar="ROW", help=f"one of {', '.join(names)}"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="where to write (default: benchmarks/results/)"
    )
    return parser.parse_args(argv)


def _chosen(only: Sequence[str] | None) -> list[str]:
    """The rows that `--only` names, in their usual order; all when it names none."""
    wanted = {row for name in only or ROWS for row in GROUPS.get(name, [name])}
    return [name for name in ROWS if name in wanted]


def _engine() -> Path | None:
    named = os.environ.get("LLAMESH_TEST_LLAMA_SERVER")
    found = named or shutil.which("llama-server")
    if named and not Path(named).is_file():
        raise BenchError(f"LLAMESH_TEST_LLAMA_SERVER names no file: {named}")
    return Path(found).resolve() if found else None


def _version(engine: Path | None) -> str | None:
    if engine is None:
        return None
    done = subprocess.run([engine, "--version"], capture_output=True, text=True, timeout=20, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return next((line.strip() for line in lines if "version" in line), None)


def _machine(engine: Path | None) -> dict[str, Any]:
    """What the numbers depend on. No host name: results are meant to be shown."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": psutil.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "llamesh": llamesh.__version__,
        "llama_server": _version(engine),
        "load_average": os.getloadavg(),
    }


def _measure(name: str, bench: Bench) -> list[Result]:
    """One row. What goes wrong in it becomes its result: the other rows are measured all the same."""
    began = time.monotonic()
    say(f"{name}:")
    try:
        results = ROWS[name](bench)
    except (BenchError, OSError, ValueError, KeyError, psutil.Error) as error:
        words = str(error).splitlines() or [type(error).__name__]
        results = [Result(name, name, "-", "not measured", None, words, {"error": "\n".join(words)})]
    say(f"  took {time.monotonic() - began:.0f} s")
    return results


def _verdict(result: Result) -> str:
    if result.measured == "not measured":
        return "NOT MEASURED"
    return {True: "met", False: "MISSED", None: ""}[result.met]


def table(results: Sequence[Result]) -> str:
    """The results as text: a line each, notes below."""
    cells = [("what", "target", "measured", "")]
    cells += [(result.what, result.target, result.measured, _verdict(result)) for result in results]
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    lines = []
    for number, row in enumerate(cells):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
        else:
            lines += [f"    {note}" for note in results[number - 1].notes]
    return "\n".join(lines)


def _terminated(*_: object) -> NoReturn:
    raise SystemExit(143)  # unwinds the stacks that end what was started


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 when every row was measured, met or not; 1 when one could not be."""
    options = _arguments(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        tools, engine = build(), _engine()
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    results: list[Result] = []
    machine = _machine(engine)
    with tempfile.TemporaryDirectory(prefix="llamesh-bench-") as scratch:
        models = Path(scratch, "models")
        models.mkdir()
        model = write_tiny_model(models / "bench.gguf")
        for name in _chosen(options.only):
            folder = Path(scratch, name)
            folder.mkdir()
            plan = Plan.quick() if options.quick else Plan.full()
            results += _measure(name, Bench(tools, folder, plan, engine, model))
    print(table(results))
    now = datetime.datetime.now(datetime.UTC)
    target: Path = options.json or HERE / "results" / f"{now:%Y%m%d-%H%M%S}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "time": now.isoformat(timespec="seconds"),
        "quick": options.quick,
        "machine": machine,
        "results": [asdict(result) for result in results],
    }
    target.write_text(json.dumps(document, indent=1) + "\n")
    say(f"written to {target}")
    return int(any(result.measured == "not measured" for result in results))


if __name__ == "__main__":
    sys.exit(main())
