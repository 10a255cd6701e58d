"""What was learned survives a restart, and nothing in the file or around it stops a node."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.telemetry.learned import Learned, LearnedValues, Peak


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.json"


def loaded(path: Path) -> LearnedValues:
    values = LearnedValues(path)
    values.load()
    return values


def test_a_round_trip(path: Path) -> None:
    values = loaded(path)
    assert values.profiles == {}
    values.of("m:default").n_ctx = 4096
    values.of("m:default").load_seconds = 1.5
    values.of("n:fast")
    values.save()
    assert loaded(path).profiles == {"m:default": Learned(n_ctx=4096, load_seconds=1.5), "n:fast": Learned()}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@dataclass
class Says:
    n_ctx: int = 0
    n_ctx_slot: int = 0
    n_ctx_train: int = 0


def test_an_engine_s_silence_leaves_its_own_words_only() -> None:
    learned = Learned()
    learned.note_start("one", Says(4096, 2048, 8192), 2, 1.25)
    assert (learned.n_ctx, learned.context_length, learned.n_ctx_train) == (4096, 2048, 8192)
    learned.note_start("one", Says(), 3, 1.0)
    assert (learned.n_ctx, learned.n_slots, learned.load_seconds) == (4096, 3, 1.0)
    assert (learned.slots_on("one"), learned.slots_on("two")) == (3, 0)
    learned.note_start("two", Says(1024), 1, 2.0)
    assert (learned.n_ctx, learned.context_length, learned.n_ctx_train) == (1024, 0, 0)
    # From before there were engines in the file.
    assert Learned(n_slots=4).slots_on("any") == 4


@given(
    st.dictionaries(
        st.text(min_size=1),
        st.builds(Learned, n_ctx=st.integers(0, 1 << 31), tokens_per_second=st.floats(0, 1e6)),
    )
)
def test_any_names(tmp_path_factory: pytest.TempPathFactory, profiles: dict[str, Learned]) -> None:
    path = tmp_path_factory.mktemp("learned") / "metrics.json"
    values = LearnedValues(path)
    values.profiles = dict(profiles)
    values.save()
    assert loaded(path).profiles == profiles


def test_what_a_later_version_wrote_is_kept(path: Path) -> None:
    path.write_text(
        json.dumps({"version": 1, "future": [1], "profiles": {"m:d": {"n_ctx": 5, "colour": "blue"}}})
    )
    values = loaded(path)
    values.of("m:d").n_slots = 2
    values.save()
    assert json.loads(path.read_text()) == {
        "version": 1,
        "future": [1],
        "profiles": {"m:d": {"n_ctx": 5, "n_slots": 2, "colour": "blue"}},
        "peaks": {},
    }


def test_peaks_only_grow_and_the_oldest_are_forgotten(path: Path) -> None:
    values = loaded(path)
    for number in range(600):
        values.note_peak(f"engine {number}", 10, 20)
        values.note_peak("engine 0", number, 5)
    values.save()
    peaks = loaded(path).peaks
    assert len(peaks) == 500
    assert peaks["engine 0"] == Peak(599, 20)
    assert "engine 1" not in peaks


def test_nothing_is_written_when_nothing_changed(path: Path) -> None:
    values = loaded(path)
    values.of("m:d").n_ctx = 5
    values.save()
    os.utime(path, (1, 1))
    values.save()
    assert path.stat().st_mtime == 1
    values.of("m:d").n_ctx = 6
    values.save()
    assert path.stat().st_mtime != 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff",
        b"[]",
        b"{",
        b'{"profiles": []}',
        b'{"profiles": {"m:d": 3}}',
        b'{"profiles": {"good:d": {}}, "peaks": [1]}',
        b'{"profiles": {"good:d": {"n_ctx": 1}, "m:d": {"n_ctx": "many"}}}',
        b'{"a": ' + b"[" * 100_000,
        b'{"profiles": {"m:d": {"n_slots": -1}}}',
        b'{"profiles": {"m:d": {"load_seconds": -0.5}}}',
        b'{"peaks": {"engine": {"vram_mb": -70000}}}',
        b'{"profiles": {"m:d": {"load_seconds": 1e999}}}',
    ],
)
def test_a_broken_file_is_set_aside(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    values = loaded(path)
    assert values.profiles == {}
    assert path.with_name("metrics.json.broken").read_bytes() == content
    values.of("m:d").n_ctx = 1
    values.save()
    assert loaded(path).of("m:d").n_ctx == 1


def test_a_directory_in_its_place_is_left_alone(path: Path) -> None:
    path.mkdir()
    (path / "precious").touch()
    values = loaded(path)
    values.of("m:d").n_ctx = 1
    values.save()
    assert (path / "precious").exists()
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_place_that_cant_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    values = loaded(tmp_path / "file" / "metrics.json")
    values.of("m:d").n_ctx = 1
    values.save()
    assert values.of("m:d").n_ctx == 1


def test_folders_are_made(tmp_path: Path) -> None:
    values = loaded(tmp_path / "new" / "folder" / "metrics.json")
    values.save()
    assert (tmp_path / "new" / "folder" / "metrics.json").exists()


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_let_be(path: Path) -> None:
    dead, own = f"{path.name}.{1 << 30}.part", f"{path.name}.{os.getpid()}.part"
    alive, strange = f"{path.name}.{os.getppid()}.part", f"{path.name}.notes.part"
    for name in (dead, own, alive, strange):
        path.with_name(name).write_text("{")
    loaded(path)
    assert {entry.name for entry in path.parent.iterdir()} == {alive, strange}


def test_a_file_beyond_all_measure_is_set_aside_unread(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)
    assert loaded(path).profiles == {}
    assert path.with_name("metrics.json.broken").stat().st_size == 1 << 30


def test_writing_what_was_encoded_before(path: Path) -> None:
    """As the node does it: encoded in its own thread, written in another."""
    values = loaded(path)
    values.of("m:d").n_ctx = 5
    data = values.encode()
    values.of("m:d").n_ctx = 6
    values.write(data)
    assert loaded(path).of("m:d").n_ctx == 5
    values.save()
    assert loaded(path).of("m:d").n_ctx == 6
