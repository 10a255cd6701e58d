"""What builds are called, which ones go, and how far one is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.builds import (
    Kept,
    Recipe,
    boot_pause,
    build_key,
    jobs,
    progress_of,
    to_delete,
    with_jobs,
    without_jobs,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def recipe(arguments: str = "", command: str = "-j", processor: str = "x") -> Recipe:
    return Recipe(tuple(arguments.split()), tuple(command.split()), processor)


def test_a_key_is_commit_and_recipe() -> None:
    key = build_key(COMMIT, recipe())
    assert key == f"0123456789ab-{recipe().name}"
    assert len(recipe().name) == 8


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (recipe(command="-j 4"), True),
        (recipe(command="--parallel=9"), True),
        (recipe(command=""), True),
        (recipe("-DGGML_CUDA=ON"), False),
        (recipe(command="-j --target ggml-rpc-server"), False),
        (recipe(processor="y"), False),
    ],
)
def test_what_decides_the_outcome_decides_the_name(other: Recipe, same: bool) -> None:
    assert (other.name == recipe().name) is same


def test_arguments_do_not_run_into_each_other() -> None:
    assert Recipe(("a", "b"), (), "").name != Recipe(("a",), ("b",), "").name


@pytest.mark.parametrize(
    ("command", "cut", "filled"),
    [
        ("", "", ""),
        ("-j", "", "-j 3"),
        ("-j 8", "", "-j 8"),
        ("-j8 -v", "-v", "-j8 -v"),
        ("--parallel -v", "-v", "--parallel 3 -v"),
        ("--parallel=2 --target x", "--target x", "--parallel=2 --target x"),
    ],
)
def test_jobs_in_a_command(command: str, cut: str, filled: str) -> None:
    assert without_jobs(command.split()) == cut.split()
    assert with_jobs(command.split(), 3) == filled.split()


@pytest.mark.parametrize(
    ("cores", "free", "count"), [(8, None, 8), (8, 100_000, 8), (16, 6144, 4), (4, 1000, 1), (1, 0, 1)]
)
def test_memory_limits_the_compilers(cores: int, free: int | None, count: int) -> None:
    assert jobs(cores, free) == count


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("[0/8] Building", 0.0),
        ("[3/12] Linking CXX executable bin/llama-server", 0.25),
        ("[12/12] x", 1.0),
        ("[ 50%] Building CXX object", 0.5),
        ("[100%] Built target llama-server", 1.0),
        ("[5/0] x", None),
        ("/usr/include/x.h:3: [4/5]", None),
        ("", None),
    ],
)
def test_progress(line: str, part: float | None) -> None:
    assert progress_of(line) == part


builds = st.lists(st.builds(Kept, st.text("abc", min_size=1), st.floats(0, 100)), unique_by=lambda b: b.key)


@given(builds, st.sets(st.text("abc", min_size=1)), st.integers(0, 5))
def test_the_newest_stay_and_what_is_used(kept: list[Kept], used: set[str], keep: int) -> None:
    gone = to_delete(kept, used, keep)
    stays = [b for b in kept if b.key not in gone]
    assert not used & set(gone)
    others = [b for b in stays if b.key not in used]
    assert len(others) <= keep
    if gone:
        assert len(others) == keep
        oldest = min((b.built_at for b in others), default=float("inf"))
        assert all(b.built_at <= oldest for b in kept if b.key in gone)


def test_pauses_grow_to_half_an_hour() -> None:
    pauses = [boot_pause(failures) for failures in range(1, 20)]
    assert pauses[:3] == [10, 20, 40]
    assert pauses == sorted(pauses)
    assert pauses[-1] == boot_pause(1000) == 1800
