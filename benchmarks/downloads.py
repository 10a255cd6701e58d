"""`python -m benchmarks.downloads`: a large file from a server on this machine, by us and by curl.

Ours is fetched as a node does it: in ranges, hashed on the way, on the disk (fsync) before it has its name.
curl only writes. So there are two columns for curl: alone, and with the `fsync` that makes the two
comparable. Rounds alternate, ratios are taken within a round, and the median is shown. Memory is what this
process grew by (VmRSS), huggingface-hub included.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from llamesh.local.weights import digest
from llamesh.local.weights.download import CONNECTIONS, Download
from llamesh.local.weights.part import Part
from llamesh.local.weights.web_source import WebSource
from tests.support.hub import running_hub

_BLOCK = 1 << 20
_TARGET_RATIO, _TARGET_MEGABYTES = 1.10, 60


def main() -> int:
    """Measure and print; 1 when something can't be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.downloads", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=2048, help="size of the file, in MiB (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        return _serve(options.serve)
    if shutil.which("curl") is None:
        sys.stderr.write("there is no curl on PATH\n")
        return 1
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return _measure(Path(folder), options)


def _serve(file: Path) -> int:
    """The server, in a process of its own: it mustn't share our Python with what is measured."""
    with running_hub() as hub:
        hub.add("plain/x", {"file.gguf": b""})
        hub.repos["plain/x"].files["file.gguf"] = file
        print(f"{hub.store_url}/plain/x/file.gguf", flush=True)
        sys.stdin.read()
    return 0


def _measure(folder: Path, options: argparse.Namespace) -> int:
    file, size = folder / "source", options.megabytes * _BLOCK
    sha256 = _write(file, options.megabytes)
    command = [sys.executable, "-m", "benchmarks.downloads", "--serve", str(file)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = psutil.Process()
    before = most = process.memory_info().rss
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        import huggingface_hub.hf_api  # noqa: F401 (a node has it by then)

        def ours(target: Path) -> None:
            nonlocal most
            part = Part(target, size)
            source = WebSource(url, size, what="file")
            Download(
                source, part, digest.sha256, expected=sha256, what="file", connections=options.connections
            ).run()
            part.close()
            most = max(most, process.memory_info().rss)

        def curl(target: Path) -> None:
            subprocess.run(["curl", "-sf", "-o", str(target), url], check=True)

        def curl_synced(target: Path) -> None:
            curl(target)
            fd = os.open(target, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)

        ways: dict[str, Callable[[Path], None]] = {"ours": ours, "curl": curl, "curl + fsync": curl_synced}
        curl(folder / "warm")  # the source is in the page cache from here on
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds):
            names = list(ways)
            for name in names[number % 3 :] + names[: number % 3]:
                seconds[name].append(_time(ways[name], folder / "target"))
            print(
                *(f"{name} {times[-1]:.2f} s" for name, times in seconds.items()), sep="   ", file=sys.stderr
            )
    finally:
        server.terminate()
        server.communicate()
    ratios = {
        name: statistics.median(
            mine / other for mine, other in zip(seconds["ours"], seconds[name], strict=True)
        )
        for name in ways
        if name != "ours"
    }
    grown = (most - before) / 1e6
    for name, times in seconds.items():
        rate = size / statistics.median(times) / 1e6
        print(f"{name:14} {statistics.median(times):6.2f} s {rate:8.0f} MB/s")
    for name, ratio in ratios.items():
        print(f"ours / {name:12} {ratio:5.2f} of its time (target: at most {_TARGET_RATIO})")
    print(f"memory grew by {grown:.1f} MB (target: under {_TARGET_MEGABYTES})")
    if options.json is not None:
        document = {"seconds": seconds, "ratios": ratios, "grown_mb": grown, "bytes": size}
        options.json.write_text(json.dumps(document, indent=1))
    return 0


def _time(way: Callable[[Path], None], target: Path) -> float:
    target.unlink(missing_ok=True)
    os.sync()  # what others left to be written isn't ours
    began = time.perf_counter()
    way(target)
    passed = time.perf_counter() - began
    target.unlink()
    return passed


def _write(file: Path, megabytes: int) -> str:
    """A file without long repetitions; its SHA-256."""
    block, found = bytearray(random.Random(1).randbytes(_BLOCK)), hashlib.sha256()
    with file.open("wb") as stream:
        for number in range(megabytes):
            block[:8] = number.to_bytes(8, "little")
            stream.write(block)
            found.update(block)
        os.fsync(stream.fileno())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
