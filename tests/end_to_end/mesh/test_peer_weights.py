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


async def test_nothing_is_fetched_before_somebody_wants_it(tmp_path: Path, hub: Hub) -> None:
    hub.add(REPO, {FILE: content(1 << 20)})
    async with mesh_of(tmp_path, hub) as mesh:
        # Several rounds of gossip, in which the node tells what it could do.
        await mesh.wait_listed("big", at="haver-0", by="taker")
        reply = await mesh["taker"].node.client.get("/v1/models/big")
        assert reply.json()["status"]["value"] == "unloaded"
        assert hub.seen == []


@pytest.mark.parametrize("havers", [1, 2])
async def test_a_peer_that_breaks_off_is_followed_by_another(tmp_path: Path, hub: Hub, havers: int) -> None:
    data = content(24 << 20)
    commit = hub.add(REPO, {FILE: data}).commit
    for number in range(havers):
        put(tmp_path / f"haver-{number}", REPO, {FILE: data}, commit)
    async with mesh_of(tmp_path, hub, havers) as mesh:
        # However often it is dialled, no more than 4 MiB come out of it.
        tap = mesh.taps["haver-0"]
        tap.on_each(lambda link: link.to_dialler.truncate(4 << 20))
        for link in tap.alive:
            link.to_dialler.truncate(4 << 20)
        await begin(mesh["taker"])
        await mesh["taker"].node.wait_event("downloaded")
    assert (blobs(tmp_path / "taker") / digest_of(data)).read_bytes() == data
    if havers == 1:
        assert 0 < hub.sent < len(data), "it began anew, or didn't go on at all"
    else:
        assert hub.sent == 0


async def test_a_peer_that_lies_is_found_out(tmp_path: Path, hub: Hub) -> None:
    data = content(8 << 20)
    commit = hub.add(REPO, {FILE: data}).commit
    put(tmp_path / "haver-0", REPO, {FILE: data}, commit)
    blob = blobs(tmp_path / "haver-0") / digest_of(data)
    blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    async with mesh_of(tmp_path, hub) as mesh:
        await begin(mesh["taker"])
        said = await mesh["taker"].node.wait_event("peers gave wrong weights")
        assert said["of"] == ["node haver-0"]
        await mesh["taker"].node.wait_event("downloaded")
    assert (blobs(tmp_path / "taker") / digest_of(data)).read_bytes() == data
    assert hub.sent == len(data)


@pytest.mark.parametrize("reason", ["offline", "down"])
async def test_without_the_hub_peers_say_what_the_files_are(tmp_path: Path, hub: Hub, reason: str) -> None:
    """A model in two parts, of which each peer has one and knows both names only together."""
    parts = {f"big-Q4_K_M-0000{number}-of-00002.gguf": content(3 << 20) for number in (1, 2)}
    repo = hub.add(REPO, parts)
    for number, (name, data) in enumerate(parts.items()):
        put(tmp_path / f"haver-{number}", REPO, {name: data}, repo.commit)
    repo.status = 503
    env = {"HF_HUB_OFFLINE": "1"} if reason == "offline" else {}
    async with mesh_of(tmp_path, hub, 2, **env) as mesh:
        await begin(mesh["taker"])
        await mesh["taker"].node.wait_event("the hub can't be asked: peers say what the files are")
        await mesh["taker"].node.wait_event("downloaded", after=1)
        for data in parts.values():
            assert (blobs(tmp_path / "taker") / digest_of(data)).read_bytes() == data
    assert hub.sent == 0
    if reason == "offline":
        assert hub.seen == []


async def test_a_node_that_serves_no_peers_gives_no_weights(tmp_path: Path, hub: Hub) -> None:
    data = content(1 << 20)
    commit = hub.add(REPO, {FILE: data}).commit
    put(tmp_path / "haver-0", REPO, {FILE: data}, commit)
    each = {"haver-0": {"cluster": {"serve_peers": "never"}}}
    async with mesh_of(tmp_path, hub, each=each) as mesh:
        await begin(mesh["taker"])
        await mesh["taker"].node.wait_event("downloaded")
    assert hub.sent == len(data)
