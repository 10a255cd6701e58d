"""Rotation by size and by day, on real files with a clock that the test turns."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path

import pytest

from llamesh.telemetry.log_files import RotatingFile

DAY = 86_400.0
NOON = 20_000 * DAY + DAY / 2


class Rotated:
    """A rotating file with a clock that the test turns."""

    def __init__(
        self, directory: Path, *, keep: int = 3, compress: bool = True, rotate_at: int = 1000
    ) -> None:
        self.now = time.time()
        self.directory = directory
        self._options = {"keep": keep, "compress": compress, "rotate_at": rotate_at}
        self.open()

    def open(self) -> None:
        options = self._options
        self.file = RotatingFile(
            self.directory,
            "proxy.log",
            keep=options["keep"],
            compress=bool(options["compress"]),
            rotate_at=options["rotate_at"],
            clock=lambda: self.now,
        )

    def settle(self) -> list[str]:
        """Closes the file; opens it once more, which makes up for what is missing; names what is there."""
        self.file.close(timeout=30)
        self.open()
        self.file.close(timeout=30)
        return sorted(path.name for path in self.directory.iterdir())


def content(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


@pytest.mark.parametrize("compress", [True, False])
def test_rotation_by_size_keeps_the_newest(tmp_path: Path, compress: bool) -> None:
    rotated = Rotated(tmp_path, compress=compress)
    for number in range(10):
        rotated.file.write(b"%d" % number * 599 + b"\n")
    names = rotated.settle()
    old = rotated.file.old_files()
    assert len(names) == 4
    assert names[0] == "proxy.log"
    assert [path.suffix == ".gz" for path in old] == [compress] * 3
    assert [content(path)[:1] for path in [*old, tmp_path / "proxy.log"]] == [b"6", b"7", b"8", b"9"]
    assert all(path.stat().st_mode & 0o007 == 0 for path in tmp_path.iterdir())


def test_rotation_at_midnight_utc(tmp_path: Path) -> None:
    rotated = Rotated(tmp_path, compress=False)
    midnight = (rotated.now // DAY + 1) * DAY
    rotated.now = midnight - 0.1
    rotated.file.write(b"today\n")
    rotated.now = midnight + 0.1
    rotated.file.write(b"tomorrow\n")
    rotated.file.write(b"tomorrow, too\n")
    assert len(rotated.settle()) == 2
    assert [content(path) for path in rotated.file.old_files()] == [b"today\n"]
    assert (tmp_path / "proxy.log").read_bytes() == b"tomorrow\ntomorrow, too\n"


def test_a_file_left_from_an_earlier_day_is_rotated_first(tmp_path: Path) -> None:
    path = tmp_path / "proxy.log"
    path.write_bytes(b"old\n")
    os.utime(path, (NOON, NOON))
    rotated = Rotated(tmp_path)
    rotated.file.write(b"new\n")
    rotated.settle()
    assert path.read_bytes() == b"new\n"
    assert [content(path) for path in rotated.file.old_files()] == [b"old\n"]


def test_keeping_none_deletes_old_files_and_nothing_else(tmp_path: Path) -> None:
    stranger = tmp_path / "proxy.log.bak"
    stranger.write_text("mine")
    rotated = Rotated(tmp_path, keep=0)
    rotated.file.write(b"a" * 900)
    rotated.file.write(b"b" * 900)
    assert rotated.settle() == ["proxy.log", "proxy.log.bak"]


def test_interrupted_compression_is_made_up_for(tmp_path: Path) -> None:
    (tmp_path / "proxy.log.20200101T000000.000").write_bytes(b"whole\n")
    (tmp_path / "proxy.log.20200101T000000.000.gz.part").write_bytes(b"half")
    names = Rotated(tmp_path).settle()
    assert names == ["proxy.log", "proxy.log.20200101T000000.000.gz"]
    assert content(tmp_path / names[1]) == b"whole\n"


def test_a_moved_or_deleted_file_is_opened_again(tmp_path: Path) -> None:
    rotated = Rotated(tmp_path / "logs")
    path = tmp_path / "logs" / "proxy.log"
    rotated.file.write(b"1\n")
    path.rename(tmp_path / "moved")
    rotated.file.write(b"2\n")
    path.unlink()
    path.parent.rmdir()
    rotated.file.write(b"3\n")
    assert path.read_bytes() == b"3\n"
    rotated.file.close()
