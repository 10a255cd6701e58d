"""Compile the two C tools, once for each version of their source, into a cache outside the checkout."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("-O2", "-Wall", "-Wextra")


class BenchError(Exception):
    """Something the benchmark needs isn't there or broke; the message is for the person who runs it."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The compiled programs: `mock` stands in for llama-server, `load` plays the clients."""

    mock: Path
    load: Path


def cache_folder() -> Path:
    """Where builds are kept: `$XDG_CACHE_HOME/llamesh-bench`, else below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "llamesh-bench"


def _compile(name: str, compiler: str, version: bytes) -> Path:
    digest = hashlib.sha256(" ".join(FLAGS).encode() + version)
    for source in [HERE / f"{name}.c", *sorted(HERE.glob("*.h"))]:
        digest.update(source.read_bytes())
    target = cache_folder() / f"{name}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(f".{os.getpid()}")
    command = [compiler, *FLAGS, "-o", str(part), str(HERE / f"{name}.c")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"{compiler} could not compile {name}.c:\n{done.stderr}")
    part.replace(target)
    return target


def build() -> Tools:
    """Compile what isn't in the cache yet. Raises BenchError without a compiler, or off Linux (epoll)."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise BenchError("no C compiler: install one (Debian: gcc and libc6-dev), or set CC")
    if sys.platform != "linux":
        raise BenchError("the load generator and the mock upstream use epoll: run the benchmarks on Linux")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    return Tools(mock=_compile("mock_upstream", compiler, version), load=_compile("load", compiler, version))
