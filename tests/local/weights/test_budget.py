"""`disk_budget_gb`, and hashes that are remembered."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from llamesh.config.cookbook import HubFile
from llamesh.local.weights.budget import make_room, own_bytes
from llamesh.local.weights.cache import Cache, Record
from llamesh.local.weights.errors import DiskFull
from llamesh.local.weights.hashes import Hashes
from llamesh.local.weights.wanted import Wanted
from tests.local.weights.test_cache import put, record_of

MEGABYTE = 10**6


@pytest.fixture
def three(cache: Cache) -> list[Record]:
    """Three models of a megabyte, ours but for the second; used in this order."""
    records = []
    for number, name in enumerate("abc"):
        put(cache, f"o/{name}", "m-Q8_0.gguf", bytes([number]) * MEGABYTE)
        record = record_of(cache, Wanted(HubFile(f"o/{name}:Q8_0", None)), ours=name != "b")
        cache.note(record)
        moment = time.time() - 1000 + number
        os.utime(cache.own / "records" / f"{record.key}.json", (moment, moment))
        records.append(record)
    return records


def names(records: list[Record]) -> list[str]:
    return [record.name for record in records]


def test_without_a_budget_nothing_leaves(cache: Cache, three: list[Record]) -> None:
    assert make_room(cache, 10 * MEGABYTE, 0.0, list) == []
    assert own_bytes(list(cache.records())) == 2 * MEGABYTE


def test_the_least_used_of_our_own_leaves_first(cache: Cache, three: list[Record]) -> None:
    assert make_room(cache, MEGABYTE, 0.003, list) == []
    assert names(make_room(cache, MEGABYTE, 0.002, list)) == ["o/a:Q8_0"]
    assert sorted(names(list(cache.records()))) == ["o/b:Q8_0", "o/c:Q8_0"]


def test_use_counts(cache: Cache, three: list[Record]) -> None:
    cache.touch(three[0].key)
    assert names(make_room(cache, MEGABYTE, 0.002, list)) == ["o/c:Q8_0"]


def test_what_is_in_use_and_what_others_fetched_stays(cache: Cache, three: list[Record]) -> None:
    with pytest.raises(DiskFull, match=r"needs 2.0 MB, and disk_budget_gb allows 2.0 MB .* 1.0 MB are"):
        make_room(cache, 2 * MEGABYTE, 0.002, lambda: {three[2].key})
    assert len(list(cache.records())) == 3, "something was removed in vain"


def test_files_of_two_models_count_once(cache: Cache, three: list[Record]) -> None:
    cache.note(replace(three[0], key="another"))
    assert own_bytes(list(cache.records())) == 2 * MEGABYTE


def test_a_hash_is_worked_out_once(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"content" * 500_000)
    hashes = Hashes(tmp_path / "own" / "hashes.json")
    assert hashes.known(str(file)) is None
    expected = hashlib.sha256(b"content" * 500_000).hexdigest()
    assert hashes.of(str(file)) == expected
    again = Hashes(tmp_path / "own" / "hashes.json")
    assert again.known(str(file)) == expected
    assert again.of(str(file), going_on=lambda done: False) == expected  # it isn't read
    os.utime(file, (5, 5))
    assert again.known(str(file)) is None
    assert again.of(str(file), going_on=lambda done: False) is None
    file.write_bytes(b"other")
    assert again.of(str(file)) == hashlib.sha256(b"other").hexdigest()
    with pytest.raises(FileNotFoundError):
        hashes.of(str(tmp_path / "none"))


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "{"])
def test_broken_notes_of_hashes(tmp_path: Path, text: str) -> None:
    file, notes = tmp_path / "m", tmp_path / "hashes.json"
    file.write_bytes(b"x")
    notes.write_text(text)
    assert Hashes(notes).of(str(file)) == hashlib.sha256(b"x").hexdigest()
    assert Hashes(notes).known(str(file)) is not None


def test_a_file_that_changes_while_it_is_read_has_no_hash(tmp_path: Path) -> None:
    file = tmp_path / "m"
    file.write_bytes(bytes(3 << 20))

    def change(done: int) -> bool:
        os.utime(file, (done, done))
        return True

    assert Hashes(tmp_path / "hashes.json").of(str(file), going_on=change) is None
