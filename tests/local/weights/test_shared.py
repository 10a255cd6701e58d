"""What this disk gives to others, and what it doesn't."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from llamesh.core.model_files import RemoteFile
from llamesh.local.weights.cache import Cache
from llamesh.local.weights.hashes import Hashes
from llamesh.local.weights.shared import Shared
from tests.support.hub import digest_of

REPO = "someone/tiny-GGUF"
CONTENT = b"GGUF" + random.Random(7).randbytes(5000)
SHA256 = digest_of(CONTENT)


def publish(cache: Cache, content: bytes, name: str = "tiny-Q4_K_M.gguf") -> Path:
    blob = cache.blob(REPO, digest_of(content))
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    cache.publish(REPO, "a" * 40, RemoteFile(name, len(content), sha256=digest_of(content)))
    cache.note_main(REPO, "a" * 40)
    return blob


def shared(cache: Cache, *paths: Path) -> Shared:
    return Shared(cache, Hashes(cache.own / "hashes.json"), lambda: [str(path) for path in paths])


def test_a_blob_of_the_hubs_cache(cache: Cache) -> None:
    publish(cache, CONTENT)
    shelf = shared(cache)
    assert shelf.size(SHA256) == len(CONTENT)
    file = shelf.open(SHA256)
    assert file is not None
    buffer = memoryview(bytearray(100))
    assert file.read(buffer, 50) == 100
    assert bytes(buffer) == CONTENT[50:150]
    assert file.read(buffer, len(CONTENT) - 10) == 10
    file.close()
    file.close()
    assert file.read(buffer, 0) == 0
    assert shelf.files(REPO) == ("a" * 40, (RemoteFile("tiny-Q4_K_M.gguf", len(CONTENT), sha256=SHA256),))


def test_a_file_of_the_cookbook_once_its_hash_is_known(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "mine-00001-of-00002.gguf"
    second = tmp_path / "mine-00002-of-00002.gguf"
    path.write_bytes(CONTENT)
    second.write_bytes(CONTENT + b"2")
    shelf = shared(cache, path)
    assert shelf.size(SHA256) is None
    for one in (path, second):
        Hashes(cache.own / "hashes.json").of(str(one))
    assert shelf.size(SHA256) == len(CONTENT)
    assert shelf.size(digest_of(CONTENT + b"2")) == len(CONTENT) + 1
    path.write_bytes(b"GGUF, but changed since")
    assert shelf.size(SHA256) is None


def test_a_file_whose_hash_is_known_but_that_isnt_a_model_of_ours(cache: Cache, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(CONTENT)
    Hashes(cache.own / "hashes.json").of(str(path))
    assert shared(cache).size(SHA256) is None


def test_only_weights_leave_this_disk(cache: Cache) -> None:
    secret = b"-----BEGIN PRIVATE KEY-----"
    publish(cache, secret, "tiny-Q8_0.gguf")
    assert shared(cache).size(digest_of(secret)) is None


def test_what_isnt_whole_isnt_here(cache: Cache) -> None:
    blob = publish(cache, CONTENT)
    blob.rename(blob.with_name(f"{blob.name}.llamesh.incomplete"))
    shelf = shared(cache)
    assert shelf.size(SHA256) is None
    assert shelf.files(REPO) == ("", ())


def test_what_isnt_a_file_isnt_read(cache: Cache) -> None:
    blob = publish(cache, CONTENT)
    blob.unlink()
    os.mkfifo(blob)
    assert shared(cache).size(SHA256) is None


@pytest.mark.parametrize("name", ["", "..", "../../x", SHA256.upper(), f"{SHA256}/..", f"{SHA256}\n"])
def test_hostile_names(cache: Cache, name: str) -> None:
    publish(cache, CONTENT)
    shelf = shared(cache)
    assert shelf.open(name) is None
    assert shelf.files(name) == ("", ())
    assert shelf.files(f"../{REPO}") == ("", ())
