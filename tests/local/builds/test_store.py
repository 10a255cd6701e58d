"""Builds on disk: one is live, some are kept, none that is used is deleted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.record import Build, build_behind, hold, read_build
from llamesh.local.builds.store import Store
from tests.support.node import clean_environment


class Shelf:
    """A store with builds made of nothing."""

    def __init__(self, folder: Path) -> None:
        self.link = folder / "bin" / "llama-server"
        self.store = Store(folder / "builds", self.link)
        self.folder = folder
        self.store.root.mkdir(parents=True)
        self.number = 0

    def make(self, key: str) -> Build:
        self.number += 1
        products = self.folder / f"products-{self.number}"
        products.mkdir()
        (products / "llama-server").write_text(f"#!/bin/sh\necho {key} {self.number}\n")
        (products / "llama-server").chmod(0o755)
        (products / "libx.so.1").write_text("a library")
        (products / "libx.so").symlink_to("libx.so.1")
        program = self.store.stage(key, products)
        assert program.is_file()
        return self.store.add(Build(key=key, commit=key * 4, built_at=float(self.number)))

    def keys(self) -> set[str]:
        return {build.key for build in self.store.builds()}


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


def test_a_build_is_whole_or_not_there(shelf: Shelf) -> None:
    made = shelf.make("one")
    assert shelf.store.find("one") == made
    assert (shelf.store.folder("one") / "bin" / "libx.so").is_symlink()
    shelf.store.program("one").unlink()
    assert shelf.store.find("one") is None
    assert shelf.store.find("two") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"key": "other", "commit": "x"}', '{"key": 7}'])
def test_a_record_that_is_nonsense(shelf: Shelf, text: str) -> None:
    shelf.make("one")
    (shelf.store.folder("one") / "build.json").write_text(text)
    assert shelf.store.find("one") is None
    assert list(shelf.store.builds()) == []


def test_the_live_one_changes_in_one_step(shelf: Shelf) -> None:
    one, two = shelf.make("one"), shelf.make("two")
    assert shelf.store.live() is None
    shelf.store.make_live("one")
    assert shelf.store.live() == one
    assert build_behind(shelf.link) == (one, shelf.store.program("one").resolve())
    shelf.store.make_live("two")
    assert shelf.store.live() == two
    assert subprocess.run([shelf.link], capture_output=True, text=True, check=True).stdout == "two 2\n"
    assert [path.name for path in shelf.link.parent.iterdir()] == ["llama-server"]


def test_there_is_never_a_moment_without_an_engine(shelf: Shelf) -> None:
    """Another process looks as fast as it can while the live one changes."""
    shelf.make("one")
    shelf.make("two")
    shelf.store.make_live("one")
    program = (
        "import os, sys\n"
        "print('ready', flush=True)\n"
        "while not os.path.exists(sys.argv[2]):\n"
        "    os.close(os.open(sys.argv[1], os.O_RDONLY))\n"
    )
    stop = shelf.folder / "stop"
    looker = subprocess.Popen(
        [sys.executable, "-c", program, str(shelf.link), str(stop)], stdout=subprocess.PIPE, text=True
    )
    assert looker.stdout is not None
    with looker.stdout:
        assert looker.stdout.readline() == "ready\n"
        for number in range(500):
            shelf.store.make_live(("one", "two")[number % 2])
        stop.touch()
        assert looker.wait(20) == 0


def test_a_program_of_the_user_s_is_kept(shelf: Shelf) -> None:
    shelf.link.parent.mkdir(parents=True)
    shelf.link.write_text("mine")
    shelf.make("one")
    shelf.store.make_live("one")
    assert shelf.link.with_name("llama-server.own").read_text() == "mine"
    shelf.link.unlink()
    shelf.link.write_text("mine, too")
    shelf.store.make_live("one")
    kept = sorted(path.read_text() for path in shelf.link.parent.glob("llama-server.own*"))
    assert kept == ["mine", "mine, too"]


def test_back_to_what_was_there(shelf: Shelf) -> None:
    """A build, a program of the user's own, a link of theirs, nothing."""
    shelf.make("one")
    shelf.make("two")
    assert shelf.store.make_live("one") is None
    before = shelf.store.make_live("two")
    assert before == shelf.store.program("one").resolve()
    shelf.store.lead_back(before)
    live = shelf.store.live()
    assert live is not None
    assert live.key == "one"
    shelf.store.lead_back(None)
    assert not os.path.lexists(shelf.link)
    shelf.link.write_text("mine")
    own = shelf.store.make_live("one")
    assert own is not None
    shelf.store.lead_back(own)
    assert shelf.link.read_text() == "mine"
    theirs = shelf.folder / "theirs"
    theirs.write_text("of theirs")
    shelf.link.unlink()
    shelf.link.symlink_to(theirs)
    assert shelf.store.make_live("one") == theirs
    shelf.store.lead_back(theirs)
    assert shelf.link.read_text() == "of theirs"


def test_a_folder_in_the_place_of_the_program(shelf: Shelf) -> None:
    shelf.link.mkdir(parents=True)
    shelf.make("one")
    with pytest.raises(BuildFailed, match="is a folder"):
        shelf.store.make_live("one")


def test_the_oldest_go_and_the_live_one_never(shelf: Shelf) -> None:
    for key in ("a", "b", "c", "d", "e"):
        shelf.make(key)
    shelf.store.make_live("a")
    assert set(shelf.store.prune(2)) == {"b", "c"}
    assert shelf.keys() == {"a", "d", "e"}
    assert set(shelf.store.prune(0)) == {"d", "e"}
    assert shelf.keys() == {"a"}
    assert not shelf.store.folder("d").exists()


def test_what_somebody_runs_stays(shelf: Shelf) -> None:
    for key in ("a", "b"):
        shelf.make(key)
    shelf.store.make_live("b")
    held = hold(str(shelf.store.program("a")))
    assert held is not None
    assert shelf.store.prune(0) == ()
    held.close()
    held.close()
    assert shelf.store.prune(0) == ("a",)
    assert hold(str(shelf.store.program("a"))) is None


def test_what_another_process_runs_stays(shelf: Shelf) -> None:
    for key in ("a", "b"):
        shelf.make(key)
    shelf.store.make_live("b")
    program = (
        "import sys; from llamesh.local.builds.record import hold\n"
        "assert hold(sys.argv[1]) is not None; print('holds', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(shelf.store.program("a"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=clean_environment({}),
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "holds\n"
        assert shelf.store.prune(0) == ()
        holder.communicate()
    assert shelf.store.prune(0) == ("a",)


def test_leftovers_go(shelf: Shelf) -> None:
    shelf.make("a")
    shelf.store.make_live("a")
    (shelf.store.root / "b.part").mkdir()
    (shelf.store.root / "c.old").mkdir()
    shelf.store.prune(3)
    assert shelf.keys() == {"a"}
    assert sorted(path.name for path in shelf.store.root.iterdir()) == [".lock", "a"]


def test_forced_anew_under_the_same_name(shelf: Shelf) -> None:
    shelf.make("a")
    shelf.store.make_live("a")
    shelf.make("a")
    assert subprocess.run([shelf.link], capture_output=True, text=True, check=True).stdout == "a 2\n"


def test_a_rejected_build_says_why(shelf: Shelf) -> None:
    shelf.make("a")
    shelf.store.reject("a", "it can't load anything")
    found = read_build(shelf.store.folder("a"))
    assert found is not None
    assert found.rejected == "it can't load anything"
    shelf.store.reject("nowhere", "x")


async def test_the_lock_is_waited_for(shelf: Shelf) -> None:
    order: list[str] = []
    waiting = trio.Event()

    async def second() -> None:
        async with shelf.store.lock(waiting.set):
            order.append("second")

    async with trio.open_nursery() as nursery, shelf.store.lock(lambda: order.append("waited")):
        nursery.start_soon(second)
        with trio.fail_after(10):
            await waiting.wait()
        order.append("first")
    assert order == ["first", "second"]


async def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "builds").write_text("")
    with pytest.raises(BuildFailed, match="can't be written to"):
        async with Store(tmp_path / "builds", tmp_path / "x").lock(lambda: None):
            pass


async def test_while_somebody_builds_nothing_is_pruned(shelf: Shelf, tmp_path: Path) -> None:
    """What is half made is a `.part`, and what is whole but not live yet counts as old where none is kept."""
    shelf.make("a")
    shelf.store.make_live("a")
    products = tmp_path / "products"
    products.mkdir()
    (products / "llama-server").touch()
    other = Store(shelf.store.root, shelf.link)
    async with shelf.store.lock(lambda: None):
        program = shelf.store.stage("b", products)
        shelf.make("c")
        assert other.prune(0) == ()
        assert program.is_file()
        assert shelf.keys() == {"a", "c"}
    assert other.prune(0) == ("c",)
    assert not program.exists()
