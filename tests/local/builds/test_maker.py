"""A build from start to end, on a tiny cmake project with a fake llama-server as its product."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.config.sections import LlamaCpp
from llamesh.local.builds.failure import BuildFailed, TriedBefore
from llamesh.local.builds.maker import Made, Progress, make
from llamesh.local.builds.record import build_behind
from llamesh.local.builds.store import Store
from llamesh.local.launch import find_engine
from tests.support.fake_project import FakeProject, plan_for


@pytest.fixture
def project(tmp_path: Path) -> FakeProject:
    return FakeProject(tmp_path / "upstream")


async def build(settings: LlamaCpp, progress: Progress | None = None, **more: Any) -> Made:
    store = Store(settings.build_path, settings.binary_path)
    return await make(settings, store, os.environ, progress or Progress(), **more)


async def failed(settings: LlamaCpp) -> BuildFailed:
    with pytest.raises(BuildFailed) as caught:
        await build(settings)
    return caught.value


async def test_it_is_fetched_compiled_tested_and_live(tmp_path: Path, project: FakeProject) -> None:
    commit = project.commit(version="0.6 (build 1)")
    settings = plan_for(project, tmp_path)
    progress, stages, percents = Progress(), [], []

    def note() -> None:
        stages.append(progress.stage)
        percents.append(progress.percent)

    progress.changed = note
    made = await build(settings, progress)
    assert made.changed
    assert (made.build.commit, made.build.version, made.build.always) == (commit, "0.6 (build 1)", ())
    assert made.build.key.startswith(commit[:12])
    assert list(dict.fromkeys(stages)) == [
        "looking for a newer version",
        "fetching the source",
        "configuring",
        "compiling",
        "testing the build",
        "",
    ]
    assert [p for p in percents if p is not None][-1] == 100
    assert len({p for p in percents if p is not None}) > 5
    binary = settings.binary_path
    assert binary.is_symlink()
    assert binary.resolve() == settings.build_path / made.build.key / "bin" / "llama-server"
    engine = await find_engine(binary)
    assert (engine.version, engine.build) == ("0.6 (build 1)", made.build.key)
    assert engine.command == (str(binary.resolve()),)
    # Nothing is left of the test.
    assert sorted(p.name for p in settings.build_path.iterdir()) == [".lock", made.build.key, "work"]


async def test_an_unchanged_commit_is_a_question_and_nothing_else(
    tmp_path: Path, project: FakeProject
) -> None:
    project.commit(version="1")
    settings = plan_for(project, tmp_path)
    first = await build(settings)
    inode = settings.binary_path.lstat().st_ino
    again = await build(settings)
    assert (again.build, again.changed) == (first.build, False)
    assert settings.binary_path.lstat().st_ino == inode


async def test_a_new_commit_and_back_again(tmp_path: Path, project: FakeProject) -> None:
    first = project.commit(version="1")
    settings = plan_for(project, tmp_path)
    one = await build(settings)
    project.commit(version="2")
    two = await build(settings)
    assert (two.changed, two.build.version) == (True, "2")
    # What was built is only made live again.
    (tmp_path / "upstream" / "gone").mkdir()
    back = await build(plan_for(project, tmp_path, branch=first))
    assert (back.changed, back.build) == (True, one.build)
    assert build_behind(settings.binary_path) == (one.build, settings.binary_path.resolve())


async def test_other_arguments_make_another_build(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="1")
    one = await build(plan_for(project, tmp_path))
    two = await build(plan_for(project, tmp_path, build_args=["-DGGML_CUDA=OFF"]))
    more_jobs = await build(
        plan_for(project, tmp_path, build_args=["-DGGML_CUDA=OFF"], build_command_args=["-j", "3"])
    )
    assert two.changed
    assert two.build.key != one.build.key
    assert two.build.commit == one.build.commit
    assert not more_jobs.changed


@pytest.mark.parametrize("name", ["release", "v1", "short", "whole"])
async def test_a_branch_a_tag_or_a_commit(tmp_path: Path, project: FakeProject, name: str) -> None:
    old = project.commit(version="old")
    project.git("branch", "release")
    project.git("branch", "other/release")
    project.git("tag", "--annotate", "--message", "one", "v1")
    project.commit(version="new")
    wanted = {"short": old[:9], "whole": old}.get(name, name)
    made = await build(plan_for(project, tmp_path, branch=wanted))
    assert (made.build.commit, made.build.version) == (old, "old")


async def test_history_comes_without_its_files(tmp_path: Path, project: FakeProject) -> None:
    """From a server that can leave them out, as the real place does; each commit still builds."""
    project.git("config", "uploadpack.allowFilter", "true")
    for number in range(3):
        project.commit(version=f"old {number}")
    settings = plan_for(f"file://{project.path}", tmp_path)
    first = await build(settings)
    clone = FakeProject.__new__(FakeProject)
    clone.path = settings.repo_path
    assert clone.git("rev-list", "--count", "HEAD") == "3"
    missing = clone.git("rev-list", "--objects", "--missing=print", "HEAD")
    assert missing.count("?") >= 2
    project.commit(version="new")
    second = await build(settings)
    assert (first.build.version, second.build.version) == ("old 2", "new")


async def test_a_name_that_nothing_has(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="1")
    error = await failed(plan_for(project, tmp_path, branch="nowhere"))
    assert "has no branch and no tag 'nowhere'" in str(error)
    error = await failed(plan_for(project, tmp_path, branch="abcdef1"))
    assert "has no branch, tag or commit 'abcdef1'" in str(error)


@pytest.mark.parametrize(
    ("behaviour", "stage", "code", "words"),
    [
        ({"configure": "fail"}, "configuring", 1, "this project can't be configured, as told"),
        ({"compile": "fail"}, "compiling", 1, "expected ';' before the end of the world"),
        ({"smoke": "exit"}, "testing the build", 4, "illegal instruction, said the processor"),
        ({"smoke": "silent"}, "testing the build", None, ""),
        ({"mixes": "always"}, "testing the build", None, ""),
    ],
)
async def test_a_failure_tells_all_and_changes_nothing(
    tmp_path: Path, project: FakeProject, behaviour: dict[str, str], stage: str, code: int | None, words: str
) -> None:
    project.commit(version="1")
    settings = plan_for(project, tmp_path)
    good = await build(settings)
    project.commit(version="2", **behaviour)
    error = await failed(settings)
    assert (error.stage, error.exit_code) == (stage, code)
    assert words in "\n".join(error.last_lines)
    assert ("llama-server" if stage.startswith("testing") else "cmake") in (error.command or str(error))
    assert build_behind(settings.binary_path) == (good.build, settings.binary_path.resolve())
    assert sorted(p.name for p in settings.build_path.iterdir()) == [".lock", good.build.key, "work"]
    # Put right, it is built.
    project.commit(version="3")
    assert (await build(settings)).build.version == "3"


async def test_a_build_that_mixes_up_conversations_runs_without_the_cache(
    tmp_path: Path, project: FakeProject
) -> None:
    project.commit(version="1", mixes="cache")
    settings = plan_for(project, tmp_path)
    progress = Progress()
    made = await build(settings, progress)
    assert made.build.always == ("--cache-ram", "0")
    assert any("mixes up conversations" in line for line in progress.tail)
    assert (await find_engine(settings.binary_path)).always == ("--cache-ram", "0")


async def test_what_was_tried_before_is_not_tried_again(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="1")
    settings = plan_for(project, tmp_path)
    with pytest.raises(TriedBefore):
        await build(settings, may_use=lambda build, key: False)
    assert not (tmp_path / "clone").exists()


async def test_forced_it_is_built_anew(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="1")
    settings = plan_for(project, tmp_path)
    first = await build(settings)
    again = await build(settings, force=True)
    assert again.build.key == first.build.key
    assert again.build.built_at > first.build.built_at


async def test_from_a_folder(tmp_path: Path, project: FakeProject) -> None:
    project.write(version="1")
    folder = tmp_path / "plain"
    folder.mkdir()
    for file in project.path.iterdir():
        if file.is_file():
            file.rename(folder / file.name)
    settings = plan_for(folder, tmp_path)
    one = await build(settings)
    assert not (await build(settings)).changed
    (folder / "behaviour.json").write_text('{"version": "two of them"}')
    two = await build(settings)
    assert (one.build.version, two.build.version) == ("1", "two of them")


async def test_from_an_archive(tmp_path: Path, project: FakeProject) -> None:
    project.write(version="1")
    archive = tmp_path / "llama.cpp-1.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.add(project.path, "llama.cpp-1", filter=lambda m: None if ".git" in m.name else m)
    settings = plan_for(archive, tmp_path)
    one = await build(settings)
    assert one.build.version == "1"
    assert not (await build(settings)).changed


async def test_two_at_once_build_once(tmp_path: Path, project: FakeProject) -> None:
    gate = tmp_path / "gate"
    project.commit(version="1", gate=str(gate))
    settings = plan_for(project, tmp_path)
    made: list[Made] = []
    first, second = Progress(), Progress()

    async def run(progress: Progress) -> None:
        made.append(await build(settings, progress))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run, first)
            while first.stage != "compiling":
                await trio.sleep(0.01)
            nursery.start_soon(run, second)
            while second.stage != "waiting for another build":
                await trio.sleep(0.01)
            gate.touch()
    assert made[0].build == made[1].build
    assert "compiling" not in "".join(second.tail)


async def test_cancelled_it_leaves_no_process_and_no_build(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="1", gate=str(tmp_path / "never"))
    settings = plan_for(project, tmp_path)
    progress = Progress()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(build, settings, progress)
            while progress.percent is None or progress.stage != "compiling":
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    from tests.end_to_end.cookbooks import processes_in

    assert processes_in(tmp_path) == []
    assert build_behind(settings.binary_path) is None


async def test_changes_in_a_clone_of_the_user_s_are_kept(tmp_path: Path, project: FakeProject) -> None:
    project.commit(version="1")
    settings = plan_for(project, tmp_path)
    project.git("clone", "--quiet", str(project.path), str(settings.repo_path))
    (settings.repo_path / "behaviour.json").write_text('{"version": "mine"}')
    project.commit(version="2")
    error = await failed(settings)
    assert "has changes of yours" in str(error)
    assert (settings.repo_path / "behaviour.json").read_text() == '{"version": "mine"}'
