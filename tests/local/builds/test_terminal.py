"""`llamesh build` from outside, and `scripts/build_llama`, which is the same."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamesh.config.sections import LlamaCpp
from llamesh.local.builds import terminal
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.maker import Progress
from llamesh.local.builds.terminal import Screen, Wanted, as_wanted
from tests.end_to_end.cookbooks import wait_alone
from tests.support.fake_project import FakeProject, settings_for
from tests.support.node import CHECKOUT, PATIENCE_SECONDS, clean_environment, wait_until


def command(tmp_path: Path, settings: dict[str, Any], *words: str) -> list[str]:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"llama_cpp": settings}))
    return [sys.executable, "-m", "llamesh", "build", "--config", str(config), *words]


def run(tmp_path: Path, settings: dict[str, Any], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(tmp_path, settings, *words),
        env=clean_environment({}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_build_and_another_that_is_not_needed(tmp_path: Path) -> None:
    project = FakeProject(tmp_path / "upstream")
    commit = project.commit(version="7")
    settings = settings_for(project, tmp_path / "engine")
    done = run(tmp_path, settings)
    assert done.returncode == 0, done.stderr
    program = Path(done.stdout.strip())
    assert program.is_file()
    assert program == (tmp_path / "engine" / "bin" / "llama-server").resolve()
    assert commit[:12] in str(program)
    lines = done.stderr.splitlines()
    assert [line for line in lines if not line.startswith(" ")][:5] == [
        "looking for a newer version",
        "fetching the source",
        "configuring",
        "compiling",
        "testing the build",
    ]
    assert any(line.strip().endswith("%") for line in lines)
    again = run(tmp_path, settings)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert "nothing to do" in again.stderr


def test_a_failure_and_a_loud_success(tmp_path: Path) -> None:
    project = FakeProject(tmp_path / "upstream")
    project.commit(version="1", compile="fail")
    settings = settings_for(project, tmp_path / "engine")
    failed = run(tmp_path, settings)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "llamesh: compiling: cmake ended with exit code 1" in failed.stderr
    assert "command: " in failed.stderr
    assert "expected ';' before the end of the world" in failed.stderr
    assert "the engine in use is as it was" in failed.stderr
    assert "Traceback" not in failed.stderr
    project.commit(version="2", mixes="cache")
    done = run(tmp_path, settings)
    assert done.returncode == 0
    assert "WARNING: this build mixes up conversations" in done.stderr


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--repo-url", "--upload-pack=x"], "would take it for an option"),
        (["--repo-url=--upload-pack=x"], "would take it for an option"),
        (["--repo-url", "ext::sh -c x"], "blanks"),
        (["--branch=--output=x"], "no branch, tag or commit has such a name"),
        (["--backend", "gpu"], None),
        (["--backend", "metal"], "Metal is for macOS only"),
    ],
)
def test_hostile_and_impossible_words(tmp_path: Path, words: list[str], complaint: str | None) -> None:
    project = FakeProject(tmp_path / "upstream")
    done = run(tmp_path, settings_for(project, tmp_path / "engine"), *words)
    assert done.returncode == (2 if complaint is None else 1)
    if complaint is not None:
        assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "engine").exists()


async def test_interrupted_nothing_is_left(tmp_path: Path) -> None:
    project = FakeProject(tmp_path / "upstream")
    project.commit(version="1", gate=str(tmp_path / "never"))
    words = command(tmp_path, settings_for(project, tmp_path / "engine"))
    with subprocess.Popen(
        words, env=clean_environment({}), cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as ours:
        work = tmp_path / "engine" / "builds" / "work"
        await wait_until(lambda: bool(list(work.glob("*/step8"))), "it doesn't compile")
        ours.send_signal(signal.SIGINT)
        _, said = ours.communicate(timeout=PATIENCE_SECONDS)
    assert ours.returncode == 1
    assert "interrupted; the engine in use is as it was" in said
    await wait_alone(tmp_path)


def test_the_script_is_the_same(tmp_path: Path) -> None:
    text = (CHECKOUT / "scripts" / "build_llama").read_text()
    assert '-m llamesh build "$@"' in text
    told = subprocess.run(
        [CHECKOUT / "scripts" / "build_llama", "--help"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert told.returncode == 0
    assert "--prebuilt" in told.stdout


def test_the_command_line_over_the_configuration() -> None:
    settings = LlamaCpp(build_args=("-DGGML_CUDA=ON", "-DGGML_NATIVE=OFF"))
    cpu = as_wanted(settings, Wanted(backend="cpu", branch="b1"), os.environ)
    assert cpu.build_args == ("-DGGML_METAL=OFF", "-DGGML_NATIVE=OFF")
    assert cpu.branch == "b1"
    auto = as_wanted(settings, Wanted(backend="auto"), os.environ)
    assert auto.build_args == ("-DGGML_NATIVE=OFF",)
    assert as_wanted(settings, Wanted(), os.environ) == settings


def test_a_missing_toolkit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal.machine, "look", lambda environ: terminal.machine.Machine("Linux"))
    with pytest.raises(
        BuildFailed, match="cuda can't be built here: nvcc is missing; it comes with the CUDA"
    ):
        as_wanted(LlamaCpp(), Wanted(backend="cuda"), os.environ)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_moves() -> None:
    progress, out = Progress(), Terminal()
    Screen(progress, out)
    progress.enter("compiling")
    progress.line("[1/4] a line")
    progress.advance(0.25)
    progress.enter("testing the build")
    progress.enter("")
    assert out.getvalue().endswith("testing the build\n")
    assert "compiling" in out.getvalue()
    assert out.getvalue().count("\n") == 2
