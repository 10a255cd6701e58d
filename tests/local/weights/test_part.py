"""A file on its way, and what a journal is believed."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llamesh.local.weights.errors import DiskFull, Unusable
from llamesh.local.weights.part import Part, bytes_there, journal_of


def begun(target: Path, size: int = 300) -> Part:
    part = Part(target, size)
    part.write(memoryview(b"a" * 100), 0)
    part.write(memoryview(b"b" * 50), 200)
    part.save([(0, 100), (200, 250)], 64, "00" * 40)
    part.close()
    return Part(target, size)


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    part = begun(tmp_path / "f")
    assert list(part.ranges) == [(0, 100), (200, 250)]
    assert (part.hashed, part.state) == (64, "00" * 40)
    assert bytes_there(tmp_path / "f") == 150
    part.write(memoryview(b"c" * 100), 100)
    part.write(memoryview(b"d" * 50), 250)
    part.finish()
    part.close()
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"a" * 100 + b"c" * 100 + b"b" * 50 + b"d" * 50


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"size": 299},
        {"part": [0, 0]},
        {"ranges": [[0, 301]]},
        {"ranges": [[0, 260]]},  # beyond what is on the disk
        {"ranges": [[-5, 3]]},
        {"ranges": [["a", 3]]},
        {"ranges": None},
        {"hashed": "x"},
    ],
)
def test_a_journal_that_doesnt_fit_counts_for_nothing(tmp_path: Path, change: dict[str, Any]) -> None:
    begun(tmp_path / "f").close()
    journal = journal_of(tmp_path / "f")
    journal.write_text(json.dumps({**json.loads(journal.read_text()), **change}))
    part = Part(tmp_path / "f", 300)
    assert list(part.ranges) == []
    assert part.state is None
    assert os.fstat(part.fd).st_size == 0
    part.close()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0" * 100, "[" * 100_000])
def test_a_broken_journal_is_none(tmp_path: Path, text: str) -> None:
    begun(tmp_path / "f").close()
    journal_of(tmp_path / "f").write_text(text)
    part = Part(tmp_path / "f", 300)
    assert part.ranges.total == bytes_there(tmp_path / "f") == 0
    part.close()


def test_a_hash_of_what_isnt_there_isnt_believed(tmp_path: Path) -> None:
    begun(tmp_path / "f").close()
    journal = journal_of(tmp_path / "f")
    journal.write_text(json.dumps({**json.loads(journal.read_text()), "hashed": 128}))
    part = Part(tmp_path / "f", 300)
    assert part.ranges.total == 150
    assert part.state is None
    part.close()


def test_a_part_that_was_replaced_is_begun_anew(tmp_path: Path) -> None:
    part = begun(tmp_path / "f")
    part.close()
    other = part.path.with_name("other")
    other.write_bytes(b"x" * 300)
    other.rename(part.path)
    part = Part(tmp_path / "f", 300)
    assert part.ranges.total == 0
    part.close()


def test_discarded_nothing_is_left(tmp_path: Path) -> None:
    part = begun(tmp_path / "f")
    part.discard()
    part.close()
    part.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(tmp_path / "f", 300)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(DiskFull, match=r"the disk of .* is full .*HF_HUB_CACHE"):
            part.write(memoryview(b"x"), 0)
    part.close()


def test_a_folder_that_cant_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unusable, match="can't be used: Not a directory"):
        Part(tmp_path / "file" / "f", 300)
