"""Weights from a hub to the disk, with all that can go wrong on the way."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.config.cookbook import HubFile, UrlFile
from llamesh.local.weights.cache import Cache, Record
from llamesh.local.weights.errors import (
    DiskFull,
    Hostile,
    NotAllowed,
    NotFound,
    Offline,
    Unreachable,
    Unusable,
    WeightsError,
    WrongContent,
)
from llamesh.local.weights.fetch import SPARE_BYTES, Fetcher
from llamesh.local.weights.lock import FileLock
from llamesh.local.weights.progress import Progress
from llamesh.local.weights.wanted import Wanted
from tests.support.hub import Hub

CONTENT = random.Random(3).randbytes(700_000)
FILE = "m-Q4_K_M.gguf"
WANTED = Wanted(HubFile("o/n:Q4_K_M", None), projector=True)


async def obtain(cache: Cache, wanted: Wanted = WANTED, **more: Any) -> Record:
    with trio.fail_after(30):
        return await Fetcher(cache, first_pause=0.001, **more).obtain(wanted, Progress(wanted.name))


def left_in(cache: Cache) -> list[str]:
    """The files of the cache, but notes and locks."""
    return sorted(
        path.name
        for path in cache.hub.rglob("*")
        if path.is_file() and not path.is_symlink() and not {".locks", "refs"} & set(path.parts)
    )


async def test_a_model_comes_whole_and_once(cache: Cache, hub: Hub) -> None:
    hub.add("o/n", {FILE: CONTENT, "README.md": b"read me", "other-Q8_0.gguf": b"not asked for"})
    record = await obtain(cache)
    assert Path(record.found.model).read_bytes() == CONTENT
    assert record.found.projector is None
    assert record.parts[0].ours
    assert record.commit == hub.repos["o/n"].commit
    asked = len(hub.seen)
    assert (await obtain(cache)).found == record.found
    assert len(hub.seen) == asked, "somebody was asked for what is here"


async def test_a_split_model_and_its_projector(cache: Cache, hub: Hub) -> None:
    parts = {f"m-Q4_K_M-0000{n}-of-00003.gguf": random.Random(n).randbytes(50_000) for n in (1, 2, 3)}
    hub.add("o/n", {**parts, "mmproj-F16.gguf": b"projector"})
    record = await obtain(cache)
    for name, content in parts.items():
        assert (Path(record.found.model).parent / name).read_bytes() == content
    assert record.found.projector is not None
    assert Path(record.found.projector).read_bytes() == b"projector"


async def test_a_new_revision_brings_only_what_is_new(cache: Cache, hub: Hub) -> None:
    hub.add("o/n", {FILE: CONTENT, "mmproj.gguf": b"old"})
    first = await obtain(cache)
    hub.add("o/n", {FILE: CONTENT, "mmproj.gguf": b"new"})
    assert (await obtain(cache)).commit == first.commit
    sent = hub.sent
    with trio.fail_after(30):
        second = await Fetcher(cache).obtain(WANTED, Progress(""), fresh=True)
    assert second.commit != first.commit
    assert hub.sent - sent == 3
    assert Path(second.found.projector or "").read_bytes() == b"new"
    assert [file.ours for file in second.files] == [False, True]


async def test_a_small_file_that_git_keeps(cache: Cache, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamesh.core.model_files import RemoteFile
    from llamesh.local.weights import fetch
    from llamesh.local.weights import hub as hub_module

    repo = hub.add("o/n", {FILE: b"small"})
    digest = hashlib.sha1(b"blob 5\0small").hexdigest()
    listing = hub_module.Listing("o/n", repo.commit, (RemoteFile(FILE, 5, git_sha1=digest),), hub.url, None)
    monkeypatch.setattr(fetch, "list_repo", lambda name: listing)
    record = await obtain(cache)
    assert Path(record.found.model).read_bytes() == b"small"
    assert record.parts[0].sha256 == ""


async def test_a_file_at_an_address(cache: Cache, hub: Hub) -> None:
    hub.add("plain/x", {"a model.gguf": CONTENT})
    url = f"{hub.store_url}/plain/x/a%20model.gguf"
    record = await obtain(cache, Wanted(UrlFile(url, hashlib.sha256(CONTENT).hexdigest())))
    assert Path(record.found.model).read_bytes() == CONTENT
    assert Path(record.found.model).name == "a model.gguf"
    with pytest.raises(WrongContent, match=f"its hash is .*, not {'0' * 64}"):
        await obtain(cache, Wanted(UrlFile(url, "0" * 64)))
    assert not list((cache.own / "web" / ("0" * 64)).iterdir())


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ({"told_size": len(CONTENT) + 1}, WrongContent, "bytes long there, not"),
        ({"told_size": len(CONTENT) - 1}, WrongContent, "bytes long there, not"),
        ({"told_size": -1}, WrongContent, "the hub says that it has -1 bytes"),
        ({"served": CONTENT[:-1] + b"?"}, WrongContent, "isn't what it should be"),
        ({"cut_after": 0}, Unreachable, "broke off"),
        ({"statuses": [500] * 99}, Unreachable, "answers 500"),
        ({"statuses": [403] * 99}, NotAllowed, "refuses it"),
    ],
)
async def test_what_goes_wrong_leaves_nothing_wrong(
    cache: Cache, hub: Hub, fault: dict[str, Any], kind: type[WeightsError], message: str
) -> None:
    hub.add("o/n", {FILE: CONTENT})
    hub.fault(FILE, **fault)
    with pytest.raises(kind, match=message):
        await obtain(cache)
    assert [name for name in left_in(cache) if "llamesh" not in name] == []
    # With the trouble over, it works.
    hub.faults.clear()
    assert Path((await obtain(cache)).found.model).read_bytes() == CONTENT


async def test_troubles_that_pass(cache: Cache, hub: Hub) -> None:
    hub.add("o/n", {FILE: CONTENT})
    hub.fault(FILE, statuses=[503, 429], cut_after=200_000, cuts=2)
    assert Path((await obtain(cache)).found.model).read_bytes() == CONTENT
    assert hub.sent == len(CONTENT)


async def test_who_may_have_it(
    cache: Cache, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub.add("o/n", {FILE: CONTENT}, gated=True, allowed=frozenset({"good"}))
    page = f"{hub.url}/o/n"
    with pytest.raises(NotAllowed, match=f"o/n is gated: accept its conditions at {page}, then set HF_TOKEN"):
        await obtain(cache)
    monkeypatch.setenv("HF_TOKEN", "bad")
    with pytest.raises(NotAllowed, match=r"o/n is gated, and your token isn't let in") as caught:
        await obtain(cache)
    assert "bad" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("good\n")  # the hub's own login
    assert Path((await obtain(cache)).found.model).read_bytes() == CONTENT
    assert {one.authorization for one in hub.asked("store")} == {None}


@pytest.mark.parametrize("token", ["", "other"])
async def test_a_private_repository(
    cache: Cache, hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.add("o/n", {FILE: CONTENT}, private=True, allowed=frozenset({"good"}))
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    who = "your token may see" if token else "set HF_TOKEN"
    with pytest.raises(NotFound, match=who):
        await obtain(cache)
    monkeypatch.setenv("HF_TOKEN", "good")
    assert Path((await obtain(cache)).found.model).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_hub_with_troubles_of_its_own(cache: Cache, hub: Hub, status: int) -> None:
    hub.add("o/n", {FILE: CONTENT}, status=status)
    with pytest.raises(Unreachable, match=f"answers {status}"):
        await obtain(cache)


async def test_no_hub_at_all(cache: Cache, hub: Hub) -> None:
    hub.close()
    with pytest.raises(Unreachable, match="gives no usable answer"):
        await obtain(cache)


@pytest.mark.parametrize(
    "name", ["../evil.gguf", "/etc/evil.gguf", "a/../../evil.gguf", "a\x01.gguf", "a\\b.gguf"]
)
async def test_a_hostile_name_stops_everything(cache: Cache, hub: Hub, name: str) -> None:
    hub.add("o/n", {FILE: CONTENT, name: b"evil"})
    with pytest.raises(Hostile, match="nothing of it is fetched"):
        await obtain(cache)
    assert hub.asked("store") == []
    assert left_in(cache) == []


async def test_offline(cache: Cache, hub: Hub) -> None:
    import dataclasses

    with pytest.raises(Offline, match="o/n:Q4_K_M isn't on this machine, and HF_HUB_OFFLINE forbids"):
        await obtain(dataclasses.replace(cache, offline=True))
    assert hub.seen == []


async def test_a_disk_without_room(cache: Cache, hub: Hub) -> None:
    hub.add("o/n", {FILE: CONTENT})
    with pytest.raises(DiskFull, match=r"needs 700\.0 kB more, and 536\.9 MB stay free .* HF_HUB_CACHE"):
        await obtain(cache, free=lambda folder: SPARE_BYTES + len(CONTENT) - 1)
    assert hub.asked("store") == []
    assert await obtain(cache, free=lambda folder: SPARE_BYTES + len(CONTENT))


async def test_a_cache_that_cant_be_written(cache: Cache, hub: Hub) -> None:
    hub.add("o/n", {FILE: CONTENT})
    cache.hub.parent.mkdir(parents=True)
    cache.hub.write_text("a file where the folder should be")
    with pytest.raises(Unusable, match="can't be used: "):
        await obtain(cache)


async def test_many_who_ask_at_once_share_one_download(cache: Cache, hub: Hub) -> None:
    hub.add("o/n", {FILE: CONTENT})
    fault = hub.fault(FILE, stall_after=100_000)
    found: list[Record] = []
    async with trio.open_nursery() as nursery:

        async def ask(progress: Progress) -> None:
            found.append(await Fetcher(cache).obtain(WANTED, progress))

        several = [Progress(f"{number}") for number in range(3)]
        for progress in several:
            nursery.start_soon(ask, progress)
        doing = {"downloading", "waiting for another program that downloads"}
        await until(lambda: {progress.doing for progress in several} == doing)
        fault.resume.set()
    assert len(found) == 3
    assert hub.sent == len(CONTENT)
    assert [record.parts[0].ours for record in found].count(True) == 1


async def test_cancelled_in_the_middle_it_lets_go(cache: Cache, hub: Hub) -> None:
    hub.add("o/n", {FILE: CONTENT})
    hub.fault(FILE, stall_after=300_000)
    progress = Progress("")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Fetcher(cache).obtain, WANTED, progress)
        await until(lambda: progress.have == 300_000)
        nursery.cancel_scope.cancel()
    digest = hashlib.sha256(CONTENT).hexdigest()
    lock = FileLock(cache.lock("o/n", digest))
    assert lock.try_lock()
    lock.release()
    hub.faults.clear()
    assert Path((await obtain(cache)).found.model).read_bytes() == CONTENT
    assert hub.sent == len(CONTENT), "what had come was fetched again"


@pytest.mark.parametrize("ticks", range(0, 40, 3))
async def test_cancelled_at_any_moment_nothing_stays_locked_or_open(
    cache: Cache, hub: Hub, ticks: int
) -> None:
    hub.add("o/n", {FILE: CONTENT})
    before = open_files()
    with trio.move_on_after(ticks / 1000):
        await Fetcher(cache).obtain(WANTED, Progress(""))
    await until(lambda: open_files() <= before)
    assert Path((await obtain(cache)).found.model).read_bytes() == CONTENT


def open_files() -> int:
    """Open files below a folder of models."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += "models--" in os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue
    return found


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.005)
