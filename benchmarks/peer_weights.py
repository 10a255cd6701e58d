"""`python -m benchmarks.peer_weights`: weights from a node to another over Noise, and what requests feel.

Two real nodes on loopback. One has a file, the other one fetches it as a download does: hashed, on the disk,
checked. Meanwhile this program asks the node that gives (and in other rounds the one that takes) for short
chats, one after the other, of a fake llama-server; the same chats are timed while nothing is fetched. Rounds
alternate; medians are shown. Everything runs on the same few cores: what the two nodes and the client cost
each other is in the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio

from tests.end_to_end.cookbooks import cookbook
from tests.end_to_end.mesh.parts import fakes
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.hub import running_hub
from tests.support.mesh import Member, Mesh, running_mesh

_BLOCK = 1 << 20
_FILE = "big.gguf"
_PLACES = ("nowhere", "giver", "taker")

# Nobody wants to run what was fetched.
_ENGINE = """#!/bin/sh
case "$*" in *big.gguf*) echo "not a model"; exit 1;; esac
exec {fake} "$@"
"""
_TARGET_RATE, _TARGET_RATIO = 200e6, 1.10


def main() -> int:
    """Measure and print; 1 when a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer_weights", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1024, help="size of the file, in MiB (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--token-ms", type=float, default=5.0, help="of the chats (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="of each chat (%(default)s)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        return trio.run(_measure, Path(folder), options)


async def _measure(folder: Path, options: argparse.Namespace) -> int:
    sha256 = _put(folder / "giver", options.megabytes)
    chats: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    with running_hub() as hub:
        for number in range(options.rounds * len(_PLACES)):
            hub.add(f"bench/big-{number}", {_FILE: b""})
            hub.repos[f"bench/big-{number}"].files[_FILE] = _blob(folder / "giver", sha256)
        async with _nodes(folder, hub.url, options) as mesh:
            taker = mesh["taker"].node
            for number in range(options.rounds * len(_PLACES)):
                place = _PLACES[number % len(_PLACES)]
                asked = mesh[place] if place != "nowhere" else None
                during = list[float]()
                if asked is not None:
                    chats.setdefault(f"{place} idle", []).extend(await _ask(asked, options, seconds=3.0))
                await taker.client.post("/admin/prewarm", json={"model": f"big-{number}", "wait": False})
                async with trio.open_nursery() as nursery:
                    if asked is not None:
                        nursery.start_soon(_keep_asking, asked, options, during)
                    told = await taker.wait_event("downloaded", after=number)
                    nursery.cancel_scope.cancel()
                rates.setdefault(f"asked: {place}", []).append(options.megabytes * _BLOCK / told["seconds"])
                if asked is not None:
                    chats.setdefault(f"{place} busy", []).extend(during)
                print(f"{place}: {told['seconds']} s, {len(during)} chats", file=sys.stderr)
                await taker.wait_event("prewarm failed", after=number)
                shutil.rmtree(folder / "taker" / "hf" / "hub" / f"models--bench--big-{number}")
        if hub.sent:
            print(f"the hub was asked for {hub.sent / 1e6:.0f} MB of it", file=sys.stderr)
    return _tell(chats, rates, options)


def _tell(chats: dict[str, list[float]], rates: dict[str, list[float]], options: argparse.Namespace) -> int:
    speed = {name: statistics.median(values) for name, values in rates.items()}
    middle = {name: statistics.median(values) for name, values in chats.items() if values}
    ratios = {
        place: middle[f"{place} busy"] / middle[f"{place} idle"]
        for place in ("giver", "taker")
        if f"{place} busy" in middle
    }
    for name, rate in speed.items():
        print(f"{name:16} {rate / 1e6:8.0f} MB/s")
    for name, seconds in middle.items():
        print(f"chats, {name:12} {seconds * 1e3:8.2f} ms  ({len(chats[name])})")
    for place, ratio in ratios.items():
        print(f"slower, {place:8} {(ratio - 1) * 100:8.1f} %")
    if options.json is not None:
        options.json.write_text(json.dumps({"rates": rates, "chats": chats, "ratios": ratios}))
    met = max(speed.values()) >= _TARGET_RATE and all(ratio <= _TARGET_RATIO for ratio in ratios.values())
    print("targets met" if met else "targets MISSED")
    return 0 if met else 1


async def _keep_asking(member: Member, options: argparse.Namespace, into: list[float]) -> None:
    while True:
        into.extend(await _ask(member, options, seconds=0.0))


async def _ask(member: Member, options: argparse.Namespace, *, seconds: float) -> list[float]:
    """Chats one after the other, at least one; how long each took."""
    found, end = [], time.monotonic() + seconds
    model = f"m-{member.id}"
    while not found or time.monotonic() < end:
        began = time.perf_counter()
        answer = await member.ask(model, stream=True, max_tokens=options.tokens)
        assert answer.status == 200, answer
        found.append(time.perf_counter() - began)
    return found


@contextlib.asynccontextmanager
async def _nodes(folder: Path, hub: str, options: argparse.Namespace) -> AsyncIterator[Mesh]:
    behaviour = {"token_delay": options.token_ms / 1000}
    books: dict[str, Any] = {}
    for name in ("giver", "taker"):
        books[name] = fakes(folder / "models", **{f"m-{name}": behaviour})
    for number in range(options.rounds * len(_PLACES)):
        big = {"id": "default", "hf_repo": f"bench/big-{number}"}
        books["taker"]["models"] += cookbook(**{f"big-{number}": big})["models"]
    engine = folder / "engine"
    engine.write_text(_ENGINE.format(fake=FAKE_LLAMA_SERVER))
    engine.chmod(0o755)
    ours = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    env = {**ours, "HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1"}
    async with running_mesh(folder, books, env=env, binary_path=engine, start=()) as mesh:
        for member in mesh:
            member.change(env={**env, "HF_HOME": str(member.directory / "hf")})
        await mesh.start(*books)
        await mesh.wait_joined()
        for member in mesh:
            assert (await member.ask(f"m-{member.id}")).status == 200
        yield mesh


def _blob(directory: Path, sha256: str) -> Path:
    return directory / "hf" / "hub" / "models--bench--big" / "blobs" / sha256


def _put(directory: Path, megabytes: int) -> str:
    """A file into a node's cache; its hash."""
    draft = directory / "draft"
    directory.mkdir(parents=True)
    digest = hashlib.sha256()
    with draft.open("wb") as file:
        for number in range(megabytes):
            block = os.urandom(_BLOCK) if number else b"GGUF" + os.urandom(_BLOCK - 4)
            digest.update(block)
            file.write(block)
    blob = _blob(directory, digest.hexdigest())
    blob.parent.mkdir(parents=True)
    draft.rename(blob)
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
