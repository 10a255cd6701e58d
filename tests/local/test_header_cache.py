"""The cache of headers: read once, read again when anything changed, never held up by one slow file."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest

from llamesh.local import header_cache
from llamesh.local.gguf import BadGguf, GgufHeader, read_header
from llamesh.local.header_cache import HeaderCache
from tests.support.gguf_bytes import U16, gguf, key, llama, tensor


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were really read, in order."""
    paths: list[str] = []

    def counted(path: str) -> GgufHeader:
        paths.append(path)
        return read_header(path)

    monkeypatch.setattr(header_cache, "read_header", counted)
    return paths


def test_an_unchanged_file_is_read_once(tiny_model: Path, reads: list[str]) -> None:
    cache = HeaderCache()
    first = cache.read(tiny_model)
    assert cache.read(str(tiny_model)) is first
    assert reads == [str(tiny_model)]


def test_a_changed_file_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    path = tmp_path / "m.gguf"
    cache = HeaderCache()
    path.write_bytes(gguf(llama(block_count=1)))
    assert cache.read(path).block_count == 1
    # Of the same length, and with the times of before: replaced by renaming, so another inode.
    status = path.stat()
    other = tmp_path / "other"
    other.write_bytes(gguf(llama(block_count=3)))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)
    assert cache.read(path).block_count == 3
    # In place, with another time.
    path.write_bytes(gguf(llama(block_count=4)))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert cache.read(path).block_count == 4
    assert len(reads) == 3


def test_a_changed_part_counts(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{number:05}-of-00002.gguf" for number in (1, 2)]
    for number, path in enumerate(paths):
        keys = [key("split.count", U16, 2), key("split.no", U16, number)]
        path.write_bytes(gguf([*keys, *(llama() if number == 0 else [])], [tensor(f"t{number}", [8])], 32))
    cache = HeaderCache()
    assert cache.read(paths[0]).weight_bytes == 64
    paths[1].write_bytes(gguf([key("split.count", U16, 2), key("split.no", U16, 1)]))
    assert cache.read(paths[0]).weight_bytes == 32
    paths[1].unlink()
    with pytest.raises(BadGguf, match="00002-of-00002"):
        cache.read(paths[0])


def test_failures_are_not_kept(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    cache = HeaderCache()
    with pytest.raises(BadGguf):
        cache.read(path)
    shutil.copy(tiny_model, path)
    assert cache.read(path).vocabulary == 260


def test_the_least_recently_used_leaves(tmp_path: Path, reads: list[str]) -> None:
    paths = [tmp_path / f"{name}.gguf" for name in "abc"]
    for path in paths:
        path.write_bytes(gguf(llama()))
    a, b, c = map(str, paths)
    cache = HeaderCache(limit=2)
    for name in (a, b, a, c, a, b):
        cache.read(name)
    assert reads == [a, b, c, b]


def test_a_file_replaced_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf(llama(block_count=1)))

    def replaced_afterwards(name: str) -> GgufHeader:
        header = read_header(name)
        path.write_bytes(gguf([*llama(block_count=2), key("llama.more", U16, 1)]))
        return header

    cache = HeaderCache()
    with monkeypatch.context() as patch:
        patch.setattr(header_cache, "read_header", replaced_afterwards)
        assert cache.read(path).block_count == 1
    assert cache.read(path).block_count == 2


def test_a_file_that_hangs_holds_up_no_other(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging, go_on = threading.Event(), threading.Event()

    def slow(name: str) -> GgufHeader:
        if name == "hanging":
            hanging.set()
            assert go_on.wait(60)
        return read_header(tiny_model)

    monkeypatch.setattr(header_cache, "read_header", slow)
    cache = HeaderCache()
    stuck = threading.Thread(target=cache.read, args=("hanging",))
    stuck.start()
    try:
        assert hanging.wait(60)
        assert cache.read(tiny_model).block_count == 1
    finally:
        go_on.set()
        stuck.join()
