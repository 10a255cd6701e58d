"""A GPU that the engine can't use, and what is said about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llamesh.config.sections import LlamaCpp
from llamesh.core.backends import Machine
from llamesh.local.asking import devices_in
from llamesh.local.builds import doctor as module
from llamesh.local.builds.doctor import doctor, missing_tools, unused_gpus
from llamesh.local.launch import Engine, find_engine

DEVICES = """Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24563 MiB, 24111 MiB free)
  Vulkan1: AMD Radeon (8176 MiB, 8000 MiB free)
"""


def wrapper(tmp_path: Path, devices: str) -> Path:
    path = tmp_path / "llama-server"
    flags = "--ctx-size N\n--host HOST\n--port PORT\n--list-devices\n"
    path.write_text(
        f'#!/bin/sh\ncase "$1" in\n--help) cat <<END\n{flags}END\n;;\n--version) echo "version: 7";;\n'
        f"--list-devices) cat <<END\n{devices}END\n;;\nesac\n"
    )
    path.chmod(0o755)
    return path


def has(monkeypatch: pytest.MonkeyPatch, *gpus: str) -> None:
    found = Machine("Linux", frozenset(gpus), frozenset())
    monkeypatch.setattr(module.machine, "look", lambda environ, **more: found)


def test_names_of_devices() -> None:
    assert devices_in(DEVICES.splitlines()) == ("CUDA0", "Vulkan1")
    assert devices_in(["Available devices:", "  (none)"]) == ()


async def test_a_gpu_that_is_used_and_one_that_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = await find_engine(wrapper(tmp_path, DEVICES))
    has(monkeypatch, "nvidia", "amd")
    assert await unused_gpus(engine, os.environ) == ()
    engine = await find_engine(wrapper(tmp_path, "Available devices:\n  (none)\n"))
    said = await unused_gpus(engine, os.environ)
    assert len(said) == 2
    assert "llamesh build --prebuilt --backend cuda" in "".join(said)
    has(monkeypatch)
    assert await unused_gpus(engine, os.environ) == ()


async def test_the_embedded_engine_and_one_that_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "nvidia")
    [said] = await unused_gpus(Engine(("python",), "embedded", "1"), os.environ)
    assert "a GPU of nvidia that the embedded engine can't use" in said
    assert await unused_gpus(Engine(("/wrapper",), "configured", "unknown"), os.environ) == ()


def test_missing_tools_are_named_with_their_packages(tmp_path: Path) -> None:
    said = missing_tools({"PATH": str(tmp_path)})
    assert [sentence.split()[0] for sentence in said] == ["git", "cmake", "c++", "make"]
    assert "apt install build-essential" in said[2]


def test_what_the_doctor_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    has(monkeypatch, "nvidia")
    settings = LlamaCpp(binary_path=wrapper(tmp_path, DEVICES))
    assert doctor(settings, os.environ) == 0
    said = capsys.readouterr().out
    assert "GPUs: nvidia" in said
    assert "engine: configured, version 7" in said
    assert doctor(LlamaCpp(binary_path=wrapper(tmp_path, "")), os.environ) == 1
    assert "can't use: llamesh build" in capsys.readouterr().out
    assert doctor(LlamaCpp(binary_path=tmp_path / "nothing"), os.environ) == 1
    assert "does not exist" in capsys.readouterr().out
