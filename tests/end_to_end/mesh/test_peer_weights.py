"""Weights from a peer: who joins has the model from those that have it, and the hub only behind them."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.cookbooks import cookbook
from tests.support.hub import Hub, digest_of, running_hub
from tests.support.mesh import NO_MODELS, Member, Mesh, running_mesh

REPO = "someone/big-GGUF"
FILE = "big-Q4_K_M.gguf"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


def content(size: int) -> bytes:
    """Weights of this many bytes, as far as anybody can tell who doesn't load them."""
    return b"GGUF" + os.urandom(size - 4)


def of_hub(repo: str = REPO) -> dict[str, Any]:
    return {"id": "default", "hf_repo": repo, "llama_server_args": "-c 512", "startup_timeout_seconds": 5}


def put(member: Path, repo: str, files: dict[str, bytes], commit: str) -> None:
    """Files into a node's cache, as the hub's own tools would have left them."""
    folder = member / "hf" / "hub" / ("models--" + repo.replace("/", "--"))
    (folder / "refs").mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    for name, data in files.items():
        blob = folder / "blobs" / digest_of(data)
        blob.write_bytes(data)
        (folder / "snapshots" / commit / name).symlink_to(f"../../blobs/{blob.name}")


def blobs(directory: Path, repo: str = REPO) -> Path:
    return directory / "hf" / "hub" / ("models--" + repo.replace("/", "--")) / "blobs"


@asynccontextmanager
async def mesh_of(
    tmp_path: Path, hub: Hub, havers: int = 1, /, each: dict[str, Any] | None = None, **env: str
) -> AsyncIterator[Mesh]:
    """`taker`, whose cookbook names the repository, and `haver-N`, whose caches are in their directories."""
    names = {f"haver-{number}": NO_MODELS for number in range(havers)}
    books = {"taker": cookbook(big=of_hub()), **names}
    ours = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    common = {**ours, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    async with running_mesh(tmp_path, books, env=common, tapped=True, start=(), each=each) as mesh:
        for member in mesh:
            own = env if member.id == "taker" else {}
            member.change(env={**common, "HF_HOME": str(member.directory / "hf"), **own})
        await mesh.start(*books)
        await mesh.wait_joined()
        yield mesh


async def begin(member: Member) -> None:
    reply = await member.node.client.post("/admin/prewarm", json={"model": "big", "wait": False})
    assert reply.status_code < 300, reply.text


async def test_a_node_takes_weights_from_a_peer_and_not_from_the_hub(tmp_path: Path, hub: Hub) -> None:
    data = content(20 << 20)
    commit = hub.add(REPO, {FILE: data}).commit
    put(tmp_path / "haver-0", REPO, {FILE: data}, commit)
    async with mesh_of(tmp_path, hub) as mesh:
        await begin(mesh["taker"])
        await mesh["taker"].node.wait_event("downloaded")
    assert (blobs(tmp_path / "taker") / digest_of(data)).read_bytes() == data
    assert hub.asked("store") == []
    assert hub.sent == 0
