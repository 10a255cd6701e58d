"""A download out of a source that the test plays: pieces, failures, resuming, and the end."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llamesh.core.ranges import Ranges
from llamesh.local.weights import digest
from llamesh.local.weights import download as module
from llamesh.local.weights.download import TRIES, Download
from llamesh.local.weights.errors import (
    DiskFull,
    NotFound,
    Stopped,
    Unreachable,
    WholeOnly,
    WrongContent,
)
from llamesh.local.weights.part import Part, journal_of

PIECE = 1 << 20
CONTENT = random.Random(1).randbytes(8 * PIECE + 12_345)


@dataclass
class Played:
    """A source: its content, and `trouble(start, end)`, which may raise, or give how many bytes come before
    the connection ends."""

    content: bytes = CONTENT
    trouble: Callable[[int, int], int | None] = lambda start, end: None
    ranges: bool = True
    name: str = "a source"
    asked: list[tuple[int, int]] = field(default_factory=list)
    sent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    cuts: int = 0
    cut_off: threading.Event = field(default_factory=threading.Event)

    def channel(self) -> Played:
        return self

    def open(self, start: int, end: int) -> PlayedBody:
        with self.lock:
            self.asked.append((start, end))
            most = self.trouble(start, end)
        return PlayedBody(self, start, end, most)

    def close(self) -> None:
        pass

    def cut(self) -> None:
        self.cut_off.set()


class PlayedBody:
    def __init__(self, source: Played, start: int, end: int, most: int | None) -> None:
        self.source, self.at, self.end = source, start, end
        self.stop = None if most is None else start + most

    def readinto(self, buffer: memoryview) -> int:
        if self.stop is not None and self.at >= self.stop:
            raise Unreachable("it broke off")
        end = min(self.end, self.at + len(buffer), self.stop or self.end)
        piece = self.source.content[self.at : end]
        buffer[: len(piece)] = piece
        self.at = end
        with self.source.lock:
            self.source.sent += len(piece)
        return len(piece)

    def close(self) -> None:
        pass


def download(
    folder: Path, source: Played, *, connections: int = 1, content: bytes = CONTENT, size: int | None = None
) -> Download:
    part = Part(folder / "f", len(content) if size is None else size)
    return Download(
        source,
        part,
        digest.sha256,
        expected=hashlib.sha256(content).hexdigest(),
        what="the model",
        connections=connections,
        piece=PIECE,
        first_pause=0.001,
        join_after=0.0,
    )


def run(one: Download) -> None:
    try:
        one.run()
    finally:
        one._part.close()


@pytest.mark.parametrize("connections", [1, 3])
def test_all_of_it_comes_and_nothing_twice(tmp_path: Path, connections: int) -> None:
    source = Played()
    run(download(tmp_path, source, connections=connections))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert source.sent == len(CONTENT)
    assert len(source.asked) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    breaks = iter([100_000, 0, 300_000, 5])
    source = Played(trouble=lambda start, end: next(breaks, None))
    run(download(tmp_path, source))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert source.sent == len(CONTENT)


def test_several_connections_that_break_at_random(tmp_path: Path) -> None:
    chance = random.Random(7)

    def trouble(start: int, end: int) -> int | None:
        return chance.choice([None, None, 0, chance.randrange(1, PIECE)])

    source = Played(trouble=trouble)
    run(download(tmp_path, source, connections=4))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert source.sent == len(CONTENT)


def test_a_source_that_never_answers_is_given_up(tmp_path: Path) -> None:
    def trouble(start: int, end: int) -> int | None:
        raise Unreachable("nobody is there")

    source = Played(trouble=trouble)
    with pytest.raises(Unreachable, match="nobody is there"):
        run(download(tmp_path, source))
    assert len(source.asked) == TRIES


def test_one_that_says_no_isnt_asked_again(tmp_path: Path) -> None:
    def trouble(start: int, end: int) -> int | None:
        raise NotFound("no such file")

    source = Played(trouble=trouble)
    with pytest.raises(NotFound):
        run(download(tmp_path, source))
    assert len(source.asked) == 1


def test_what_came_is_there_the_next_time(tmp_path: Path) -> None:
    def trouble(start: int, end: int) -> int | None:
        if start >= 4 * PIECE:
            raise NotFound("gone")
        return None

    first = Played(trouble=trouble)
    with pytest.raises(NotFound):
        run(download(tmp_path, first))
    assert journal_of(tmp_path / "f").exists()
    second = Played()
    one = download(tmp_path, second)
    assert one.have == 4 * PIECE
    run(one)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert first.sent + second.sent == len(CONTENT)


def test_the_hash_of_what_was_there_isnt_read_again(tmp_path: Path) -> None:
    """Proven by a disk that has something else there now: only who reads it would notice."""
    part = Part(tmp_path / "f", len(CONTENT))
    part.write(memoryview(CONTENT[: 4 * PIECE]), 0)
    saved = digest.sha256()
    saved.update(memoryview(bytearray(CONTENT[: 4 * PIECE])))
    part.save([(0, 4 * PIECE)], saved.size, saved.save())
    part.write(memoryview(b"x"), 17)
    part.close()
    run(download(tmp_path, Played()))
    assert (tmp_path / "f").read_bytes()[17:18] == b"x"


def test_other_content_than_promised_is_thrown_away(tmp_path: Path) -> None:
    wrong = bytearray(CONTENT)
    wrong[5 * PIECE] ^= 1
    with pytest.raises(WrongContent, match=r"the model isn't what it should be: its hash is \w{64}, not \w"):
        run(download(tmp_path, Played(bytes(wrong)), connections=3))
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_ranges_gives_the_whole(tmp_path: Path) -> None:
    whole = Played()

    def trouble(start: int, end: int) -> int | None:
        if (start, end) != (0, len(CONTENT)):
            whole.ranges = False
            raise WholeOnly("whole files only")
        return None

    whole.trouble = trouble
    run(download(tmp_path, whole, connections=3))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert whole.asked.count((0, len(CONTENT))) == 1


def test_a_source_without_ranges_that_always_breaks_off_is_given_up(tmp_path: Path) -> None:
    source = Played(trouble=lambda start, end: PIECE, ranges=False)
    with pytest.raises(Unreachable, match="it broke off"):
        run(download(tmp_path, source))
    assert len(source.asked) == TRIES


def test_stopped_in_the_middle(tmp_path: Path) -> None:
    one: list[Download] = []

    def trouble(start: int, end: int) -> int | None:
        if start >= 2 * PIECE:
            one[0].stop()
        return None

    source = Played(trouble=trouble)
    one.append(download(tmp_path, source))
    with pytest.raises(Stopped):
        run(one[0])
    assert source.cut_off.is_set()
    assert 2 * PIECE <= one[0].have < len(CONTENT)
    run(download(tmp_path, Played()))
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_stopped_before_it_began(tmp_path: Path) -> None:
    one = download(tmp_path, Played())
    one.stop()
    with pytest.raises(Stopped):
        run(one)


def test_a_disk_that_fills_up_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = download(tmp_path, Played(), connections=3)
    real = os.pwrite

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        if offset >= 3 * PIECE:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        with pytest.raises(DiskFull, match="is full"):
            run(one)
    # With room again it goes on.
    again = Played()
    run(download(tmp_path, again))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert again.sent < len(CONTENT)


def test_an_unforeseen_defect_isnt_swallowed(tmp_path: Path) -> None:
    def trouble(start: int, end: int) -> int | None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(download(tmp_path, Played(trouble=trouble)))


def test_a_small_file_with_git_s_hash(tmp_path: Path) -> None:
    content = b"small" * 10
    expected = hashlib.sha1(b"blob 50\0" + content).hexdigest()
    part = Part(tmp_path / "f", len(content))
    one = Download(
        Played(content), part, lambda state: digest.git_sha1(50), expected=expected, what="it", piece=PIECE
    )
    run(one)
    assert (tmp_path / "f").read_bytes() == content


def test_no_range_is_asked_for_that_is_there(tmp_path: Path) -> None:
    part = Part(tmp_path / "f", len(CONTENT))
    there = Ranges([(PIECE, 2 * PIECE), (3 * PIECE + 5, 3 * PIECE + 6)])
    for start, end in there:
        part.write(memoryview(CONTENT[start:end]), start)
    part.save(list(there), 0, None)
    part.close()
    source = Played()
    run(download(tmp_path, source, connections=2))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert source.sent == len(CONTENT) - there.total


@dataclass
class Counted(Played):
    """Counts its connections, and sends nothing before there are `least`."""

    least: int = 1
    channels: int = 0
    enough: threading.Event = field(default_factory=threading.Event)

    def channel(self) -> Played:
        with self.lock:
            self.channels += 1
            if self.channels >= self.least:
                self.enough.set()
        return self

    def open(self, start: int, end: int) -> PlayedBody:
        assert self.enough.wait(20), "no more connections came"
        return super().open(start, end)


def test_a_slow_source_gets_more_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FAST_RATE", 1e18)
    source = Counted(least=3)
    run(download(tmp_path, source, connections=3))
    assert source.channels == 3


def test_a_fast_source_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FAST_RATE", -1.0)
    source = Counted()
    run(download(tmp_path, source, connections=3))
    assert source.channels == 1
