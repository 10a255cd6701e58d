"""The estimate beside what a real engine says that it took, weights, cache and compute buffers together."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llamesh.core.footprint import MIB, estimate
from llamesh.core.memory_arguments import read_memory_arguments
from llamesh.local.gguf import read_header
from tests.support.engine import serving
from tests.support.tiny_model import write_tiny_model

# "llama_kv_cache:        CPU KV buffer size =     2.00 MiB", and the like of llama.cpp's other parts.
BUFFER = re.compile(r": +\S+ +(model|KV|RS|compute|output) +buffer size (?:=|is) +([0-9.]+) MiB")
TOLERANCE = 0.25


@pytest.mark.parametrize(
    ("context", "line"),
    [
        (8192, ""),
        (8192, "-c 1024 -np 1"),
        (8192, "-c 3000 -np 3"),
        (8192, "-ctk q8_0 -ctv q8_0"),
        (8192, "-ub 64"),
        (8192, "-ub 2048"),
        (8192, "-fa off"),
        (8192, "--embedding --pooling mean"),
        (32768, "-np 2"),
        (512, "-ctk q8_0"),
    ],
)
def test_the_estimate_is_near(engine_binary: Path | None, tmp_path: Path, context: int, line: str) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", context=context)
    flags = line.split()
    with serving(model, "--fit", "off", "-v", *flags, binary=engine_binary) as engine:
        said = engine.output()
    measured: dict[str, float] = {}
    for what, mib in BUFFER.findall(said):
        measured[what] = measured.get(what, 0.0) + float(mib) * MIB
    assert {"model", "KV", "compute", "output"} <= set(measured), said
    found = estimate(read_header(model), read_memory_arguments(flags), gpu=False)
    estimated = found.weights_cpu + found.weights_cpu_mapped + found.kv_cpu + found.compute_cpu
    assert estimated == pytest.approx(sum(measured.values()), rel=TOLERANCE)
    # The parts that follow rules, not fits, to the hundredth of a MiB that is printed.
    assert found.kv_cpu == pytest.approx(measured["KV"], abs=0.01 * MIB)
    assert found.weights_cpu + found.weights_cpu_mapped == pytest.approx(measured["model"], abs=0.01 * MIB)
