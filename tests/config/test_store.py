"""Files that change under a running node: taken in whole, or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from llamesh.config import check
from llamesh.config import store as store_module
from llamesh.config.problems import ConfigError
from llamesh.config.store import Change, Files, Store, runs_the_same

PATIENCE_SECONDS = 20.0


def recipe(*names: str, arguments: str = "-c 1024", more: str = "") -> str:
    """A cookbook with these models."""
    lines = ["models:"] if names else ["models: []"]
    for name in names:
        lines += [f"- name: {name}", "  profiles:", "  - id: default", "    model_path: /models/x.gguf"]
        lines += [f"    llama_server_args: {arguments}", *([f"    {more}"] if more else [])]
    return "\n".join(lines) + "\n"


def replace_file(path: Path, text: str) -> None:
    """What most editors and tools do: a new file takes the name."""
    new = path.with_name("new~")
    new.write_text(text)
    new.replace(path)


class Watched:
    """A store, and what it told."""

    def __init__(self, folder: Path, environ: dict[str, str] | None = None) -> None:
        self.config, self.cookbook = folder / "config.yaml", folder / "cookbook.yaml"
        self.secrets = folder / "secrets.yaml"
        if not self.cookbook.exists():
            self.cookbook.write_text(recipe("a", "b"))
        self.store = Store(Files(self.config, self.cookbook, self.secrets), environ or {})
        self.changes: list[Change] = []
        self.problems: list[ConfigError] = []
        self.store.on_change = self.changes.append
        self.store.on_problem = self.problems.append

    @property
    def keys(self) -> list[str]:
        return [profile.key for profile in self.store.current.cookbook.profiles]

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE_SECONDS):
            while not condition():
                await trio.sleep(0.005)

    async def refused(self) -> str:
        """Reload, which must fail and change nothing; the problem."""
        before = self.store.current.settings, self.store.current.cookbook
        with pytest.raises(ConfigError) as caught:
            await self.store.reload()
        assert (self.store.current.settings, self.store.current.cookbook) == before
        assert self.store.problems is caught.value
        assert self.problems[-1] is caught.value
        return str(caught.value)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(store_module, "_SETTLE_SECONDS", 0.02)


@pytest.fixture
async def watched(tmp_path: Path, nursery: trio.Nursery, quick: None) -> AsyncIterator[Watched]:
    """One that watches."""
    made = Watched(tmp_path)
    nursery.start_soon(made.store.watch)
    yield made
    nursery.cancel_scope.cancel()


# Ways to change a file.


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def by_rename_away(path: Path, text: str) -> None:
    path.rename(path.with_name("backup~"))
    path.write_text(text)


@pytest.mark.parametrize("change", [in_place, replace_file, by_rename_away])
async def test_an_edit_is_taken_in(watched: Watched, change: Callable[[Path, str], None]) -> None:
    change(watched.cookbook, recipe("b", "c"))
    await watched.until(lambda: bool(watched.changes))
    assert watched.keys == ["b:default", "c:default"]
    assert watched.changes == [Change(added=("c:default",), removed=("a:default",))]
    assert watched.store.problems is None


async def test_files_behind_links_of_a_mounted_folder(
    tmp_path: Path, nursery: trio.Nursery, quick: None
) -> None:
    """As Kubernetes mounts a ConfigMap: the file is a link into `..data`, which is a link that is swapped."""
    for version, names in (("..1", ("a",)), ("..2", ("a", "z"))):
        (tmp_path / version).mkdir()
        (tmp_path / version / "cookbook.yaml").write_text(recipe(*names))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "cookbook.yaml").symlink_to("..data/cookbook.yaml")
    watched = Watched(tmp_path)
    nursery.start_soon(watched.store.watch)
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    await watched.until(lambda: watched.keys == ["a:default", "z:default"])
    nursery.cancel_scope.cancel()


async def test_a_link_into_another_folder_whose_target_is_replaced(
    tmp_path: Path, nursery: trio.Nursery, quick: None
) -> None:
    far, near = tmp_path / "far", tmp_path / "near"
    far.mkdir()
    near.mkdir()
    (far / "book").write_text(recipe("a"))
    (near / "cookbook.yaml").symlink_to(far / "book")
    watched = Watched(near)
    nursery.start_soon(watched.store.watch)
    replace_file(far / "book", recipe("b"))
    await watched.until(lambda: watched.keys == ["b:default"])
    nursery.cancel_scope.cancel()


async def test_an_editor_that_empties_the_file_first(watched: Watched) -> None:
    with watched.cookbook.open("w") as file:
        await watched.until(lambda: bool(watched.problems))
        assert watched.keys == ["a:default", "b:default"]
        assert watched.changes == []
        assert "is empty now" in str(watched.store.problems)
        file.write(recipe("b"))
    await watched.until(lambda: watched.keys == ["b:default"])
    assert watched.store.problems is None
    assert watched.store.refusals == 1


async def test_a_bad_edit_is_told_once_and_a_mended_one_clears_it(watched: Watched) -> None:
    watched.cookbook.write_text(recipe("a", more="idle_timeout_seconds: soon"))
    await watched.until(lambda: bool(watched.problems))
    [problem] = watched.problems[0].problems
    assert (problem.line, problem.path) == (7, "models[0].profiles[0].idle_timeout_seconds")
    assert watched.store.problems is watched.problems[0]
    looks = watched.store.refusals
    watched.cookbook.write_text(recipe("a", "b", more="idle_timeout_seconds: 7"))
    await watched.until(lambda: watched.store.problems is None)
    assert (looks, watched.store.refusals, len(watched.problems)) == (1, 1, 1)
    assert {p.idle_timeout_seconds for p in watched.store.current.cookbook.profiles} == {7}
    assert watched.changes == [Change(changed=("a:default", "b:default"))]


async def test_back_to_what_it_was_clears_the_problem_and_changes_nothing(watched: Watched) -> None:
    before = watched.cookbook.read_text()
    watched.cookbook.write_text("models: {")
    await watched.until(lambda: bool(watched.problems))
    watched.cookbook.write_text(before)
    await watched.until(lambda: watched.store.problems is None)
    assert watched.changes == []


# What is refused, whole.


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_hundred_megabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(100 << 20)


def a_bomb(path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path.write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "doesn't exist"),
        (a_directory, "is a directory"),
        (a_pipe, "isn't a regular file"),
        (a_hundred_megabytes, "is larger than"),
        (a_bomb, "holds more than"),
        (lambda path: path.write_bytes(b""), "is empty now"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "isn't UTF-8"),
        (lambda path: path.write_text("models: [[[\n"), "not valid YAML"),
    ],
)
@pytest.mark.parametrize("name", ["config", "cookbook", "secrets"])
async def test_what_is_no_such_file_any_more(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], words: str
) -> None:
    (tmp_path / "config.yaml").write_text("max_hops: 3\n")
    (tmp_path / "secrets.yaml").write_text("auth: {enabled: true, allowed_keys: [secret-key]}\n")
    watched = Watched(tmp_path)
    spoil(tmp_path / f"{name}.yaml")
    problem = await watched.refused()
    assert words in problem
    assert f"{name}.yaml" in problem
    assert "secret-key" not in problem
    assert watched.store.current.settings.auth.enabled


async def test_nothing_of_a_bad_edit_is_taken_in(tmp_path: Path) -> None:
    """Neither the good half of a file, nor a good file beside a bad one."""
    watched = Watched(tmp_path)
    watched.config.write_text("max_hops: 3\n")
    watched.cookbook.write_text(recipe("a") + "- nmae: b\n")
    assert "cookbook.yaml:7" in await watched.refused()
    assert watched.store.current.settings.max_hops == 10
    watched.cookbook.write_text(recipe("a"))
    assert await watched.store.reload() == Change(removed=("b:default",), settings=("max_hops",))


async def test_a_default_model_must_stay(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("default_model: b\n")
    watched = Watched(tmp_path)
    watched.cookbook.write_text(recipe("a"))
    assert "default_model" in await watched.refused()


async def test_a_file_that_comes_later(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.secrets.write_text("auth: {enabled: true, allowed_keys: [k]}\n")
    assert (await watched.store.reload()).settings == ("auth",)
    watched.secrets.unlink()
    assert "secrets.yaml" in await watched.refused()


# Settings.


async def test_settings_that_wait_for_a_restart(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.config.write_text("listen_addr: 127.0.0.1:1\nmax_vram_mb: 5\nhttp: {idle_timeout_seconds: 9}\n")
    change = await watched.store.reload()
    assert (change.settings, change.needs_restart) == (("max_vram_mb",), ("listen_addr", "http"))
    settings = watched.store.current.settings
    assert (settings.max_vram_mb, settings.listen_addr.port) == (5, 8080)
    assert settings.http.idle_timeout_seconds == 120
    # They still do, and are still said to.
    assert (await watched.store.reload()).needs_restart == ("listen_addr", "http")
    assert len(watched.changes) == 1
    watched.config.write_text("max_vram_mb: 5\nmax_hops: 2\n")
    assert await watched.store.reload() == Change(settings=("max_hops",))


async def test_an_alias_is_a_change(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.cookbook.write_text(recipe("a", "b").replace("- name: a", "- name: a\n  aliases: [best]"))
    assert await watched.store.reload() == Change(aliases=("best",))
    assert watched.store.current.cookbook.find("BEST") is not None
    assert len(watched.changes) == 1


# The reading itself.


async def test_a_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(tmp_path)
    watched.cookbook.write_text(recipe("half"))
    real = check.load_files
    reads: list[object] = []

    def load(*arguments: object, **options: object) -> object:
        loaded = real(*arguments, **options)  # type: ignore[arg-type]
        if not reads:
            watched.cookbook.write_text(recipe("whole", "really"))
        reads.append(loaded)
        return loaded

    monkeypatch.setattr(store_module, "load_files", load)
    await watched.store.reload()
    assert watched.keys == ["whole:default", "really:default"]
    assert len(watched.changes) == 1


async def test_a_file_that_never_holds_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path)
    real = check.load_files
    count = 0

    def load(*arguments: object, **options: object) -> object:
        nonlocal count
        count += 1
        watched.cookbook.write_text(recipe("a", arguments=f"-c {1024 * count}") + "#" * count)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module, "load_files", load)
    assert "changes while it is read" in await watched.refused()
    monkeypatch.undo()
    await watched.store.reload()
    assert watched.keys == ["a:default"]


async def test_a_defect_of_the_reader_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(tmp_path)

    def load(*arguments: object, **options: object) -> object:
        raise RuntimeError("with a secret-key in it")

    monkeypatch.setattr(store_module, "load_files", load)
    problem = await watched.refused()
    assert "RuntimeError" in problem
    assert "secret-key" not in problem


async def test_two_at_once_are_one_after_the_other(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.cookbook.write_text(recipe("a", "b", "c"))
    found: list[Change] = []

    async def reload() -> None:
        found.append(await watched.store.reload())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(reload)
    assert sorted(map(bool_of, found)) == [False, False, False, False, True]
    assert watched.changes == [Change(added=("c:default",))]


def bool_of(change: Change) -> bool:
    return change != Change()


async def test_the_loop_runs_while_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever gives up waiting for it is free at once."""
    watched = Watched(tmp_path)
    go = threading.Event()
    real = check.load_files

    def load(*arguments: object, **options: object) -> object:
        assert go.wait(PATIENCE_SECONDS)
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(store_module, "load_files", load)
    watched.cookbook.write_text(recipe("c"))
    with trio.move_on_after(0.01) as scope:
        await watched.store.reload()
    assert scope.cancelled_caught
    assert watched.keys == ["a:default", "b:default"]
    go.set()
    await watched.store.reload()
    assert watched.keys == ["c:default"]


def test_what_makes_an_instance_another(tmp_path: Path) -> None:
    base = Watched(tmp_path).store.current.cookbook.profiles[0]
    for index, (arguments, more, same) in enumerate(
        [
            ("-c 1024", "idle_timeout_seconds: 9", True),
            ("-c 1024", "max_queue_size: 9", True),
            ("-c 1024", "max_instances: 2", True),
            ("-c 2048", "", False),
            ("-c 1024 --embedding", "", False),
            ("-c 1024 --api-key k", "", False),
        ]
    ):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "cookbook.yaml").write_text(recipe("a", arguments=arguments, more=more))
        other = Watched(folder).store.current.cookbook.profiles[0]
        assert runs_the_same(base, other) is same, (arguments, more)
