"""The test that every build has to pass: the model it is made with, and that it passes on a real engine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from llamesh.local.builds import smoke
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.smoke import smoke_test
from llamesh.local.builds.tiny_model import tiny_model
from llamesh.local.builds.trial_server import top_gap, trial_server
from llamesh.local.gguf import read_header
from tests.support.fake_project import FakeProject


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model())
    return path


@pytest.fixture
def engine_program(tmp_path: Path, engine_binary: Path | None) -> Path:
    """The engine as one program: the embedded one gets a wrapper."""
    if engine_binary is not None:
        return engine_binary
    import sys

    path = tmp_path / "llama-server"
    root = Path(__file__).resolve().parents[3]
    path.write_text(f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m llamesh.local.engine "$@"\n')
    path.chmod(0o755)
    return path


def test_the_model_is_small_sound_and_always_the_same(model: Path) -> None:
    assert tiny_model() == model.read_bytes()
    assert model.stat().st_size < 400_000
    header = read_header(model)
    assert (header.architecture, header.context_length) == ("llama", 8192)


async def test_a_real_engine_passes(model: Path, engine_program: Path) -> None:
    said: list[str] = []
    assert await smoke_test(engine_program, model, os.environ, said.append) == ()
    assert said == ["loading a tiny model and generating with it", "interleaving conversations and comparing"]


async def test_the_conversations_tell_each_other_apart(model: Path, engine_program: Path) -> None:
    """With half of what was said exchanged for another's words, something else is said: a mix-up shows."""
    async with trial_server(
        engine_program, ["-m", str(model), "-c", "4096", "-np", "1"], os.environ
    ) as server:
        turns = [(await smoke._lead_alone(server, number))[0] for number in range(3)]
        assert len({turn.answer for turn in turns}) == 3
        seen = 0
        for one in turns:
            for other in turns:
                half = len(one.prompt) // 2
                mixed = other.prompt[:half] + one.prompt[half:]
                reply = await server.ask("/completion", smoke._question(mixed, cache=False))
                seen += reply["content"] != one.answer
        assert seen >= 4  # of 6; one mixed with itself says the same


async def test_the_cache_in_host_memory_is_used(model: Path, llama_server: Path) -> None:
    """Else the test would prove nothing about it: conversations come back to a slot that others have had."""
    async with trial_server(llama_server, ["-m", str(model), "-c", "4096", "-np", "2"], os.environ) as server:
        kept = []
        for _ in range(2):
            for number in range(5):
                question = smoke._question(smoke._opening(number) * 2, cache=True)
                kept.append((await server.ask("/completion", question))["timings"]["cache_n"])
    assert min(kept[5:]) > 100


async def test_a_program_that_is_none(tmp_path: Path, model: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    with pytest.raises(BuildFailed) as caught:
        await smoke_test(program, model, os.environ, print)
    assert (caught.value.stage, caught.value.exit_code) == ("testing the build", 9)


@pytest.mark.parametrize(("mixes", "always"), [("cache", ("--cache-ram", "0")), ("", ())])
async def test_mixing_and_how_it_is_told(
    tmp_path: Path, model: Path, mixes: str, always: tuple[str, ...]
) -> None:
    project = FakeProject(tmp_path / "project")
    project.write(version="1", mixes=mixes)
    shutil.copy(project.path / "server.sh", project.path / "llama-server")
    said: list[str] = []
    assert await smoke_test(project.path / "llama-server", model, os.environ, said.append) == always
    assert any("mixes up" in line for line in said) is bool(always)


@pytest.mark.parametrize(
    ("choice", "gap"),
    [
        ({"top_logprobs": [{"logprob": -0.1}, {"logprob": -2.1}]}, 2.0),
        ({"top_logprobs": [{"logprob": -0.1}]}, float("inf")),
        ({"top_logprobs": None}, float("inf")),
        ({}, float("inf")),
    ],
)
def test_how_sure_a_choice_was(choice: dict[str, object], gap: float) -> None:
    assert top_gap(choice) == pytest.approx(gap)
