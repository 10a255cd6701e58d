"""GPUs, engine, clock, limits and the service, on machines that are folders and scripts."""

from __future__ import annotations

import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamesh.commands.doctor import machine
from llamesh.commands.doctor.machine import (
    look_at_clock,
    look_at_engine,
    look_at_gpus,
    look_at_limits,
    look_at_service,
)
from llamesh.core.readings import Reading
from tests.commands.doctor.patients import patient, said, script


async def test_a_gpu_without_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "Sensors", NoSensors)
    ill = patient(tmp_path)
    assert "no GPU was found" in said(await look_at_gpus(ill))
    for folder in ("proc/driver/nvidia/version", "dev/kfd"):
        (ill.root / folder).mkdir(parents=True)
    found = await look_at_gpus(ill)
    assert [one.level for one in found] == ["warn", "warn"]
    assert "a GPU of nvidia is here, but can't be measured: NVML is away" in found[1].text
    assert "--gpus all" in found[1].remedy


class NoSensors:
    """Sensors of a machine whose drivers say nothing."""

    def __init__(self, **_: Any) -> None:
        pass

    def sample(self, pids: Any, *, now: float) -> Any:
        return Reading(now, (), 1 << 30, 1 << 30, {}, {}, {}, ("NVML is away",))

    def close(self) -> None:
        pass


async def test_the_engine(tmp_path: Path) -> None:
    path = script(tmp_path / "bin", "llama-server", 'echo "version: 7 (abc)"').split(":")[0]
    binary = {"llama_cpp": {"binary_path": f"{path}/llama-server"}}
    found = await look_at_engine(patient(tmp_path, binary))
    assert {one.level for one in found} == {"ok"}
    assert "engine: configured, version 7 (abc)" in said(found)
    missing = await look_at_engine(patient(tmp_path, {"llama_cpp": {"binary_path": "/nothing/here"}}))
    assert [one.level for one in missing].count("bad") == 1
    assert "does not exist" in said(missing)


async def test_a_clock_that_follows_and_one_that_does_not(tmp_path: Path) -> None:
    def asking(answer: str) -> Any:
        path = script(tmp_path / "bin", "timedatectl", answer)
        return patient(tmp_path, environ={"PATH": path})

    assert [one.level for one in await look_at_clock(asking("echo yes"))] == ["ok"]
    [found] = await look_at_clock(asking("echo no"))
    assert (found.level, found.remedy) == ("warn", "timedatectl set-ntp true")
    [found] = await look_at_clock(asking("exit 1"))
    assert (found.level, "can't be told" in found.text) == ("ok", True)
    ill = asking("echo no")
    (ill.root / "run/systemd/timesync").mkdir(parents=True)
    (ill.root / "run/systemd/timesync/synchronized").touch()
    assert [one.level for one in await look_at_clock(ill)] == ["ok"]


async def test_a_clock_of_1970(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    assert [one.level for one in await look_at_clock(patient(tmp_path))] == ["bad"]


async def test_peers_that_tell_of_the_future(tmp_path: Path) -> None:
    now = time.time()
    state = {
        "node_id": "me",
        "nodes": [
            {"id": "me", "self": True, "started": now + 999},
            {"id": "fast", "started": now + 100},
            {"id": "right", "started": now - 5},
            {"id": "new", "started": None},
        ],
        "events": [{"node": "right", "time": now - 1}, {"node": "also", "time": now + 60}],
    }
    found = [
        one for one in await look_at_clock(replace(patient(tmp_path), state=state)) if one.level == "warn"
    ]
    assert [one.text.split(" is ")[0] for one in found] == ["the clock of also", "the clock of fast"]


async def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: 1024, resource.RLIMIT_MEMLOCK: 8 << 20}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], limits[which]))
    model = {"name": "m", "profiles": [{"id": "d", "model_path": "x", "llama_server_args": "--mlock"}]}
    found = await look_at_limits(patient(tmp_path, {"max_sysmem_mb": 1 << 40}, [model]))
    assert [one.level for one in found] == ["warn", "warn", "bad"]
    for words in ("1024 open files", "8 MiB are allowed", "less than max_sysmem_mb"):
        assert words in said(found)
    limits |= {resource.RLIMIT_NOFILE: 65_536, resource.RLIMIT_MEMLOCK: resource.RLIM_INFINITY}
    assert {one.level for one in await look_at_limits(patient(tmp_path, {}, [model]))} == {"ok"}


@pytest.mark.parametrize(
    ("shown", "level", "words"),
    [
        ("LoadState=not-found ActiveState=inactive", "ok", "isn't a service"),
        ("LoadState=loaded ActiveState=active UnitFileState=enabled NRestarts=0", "ok", "runs"),
        (
            "LoadState=loaded ActiveState=active UnitFileState=enabled NRestarts=9",
            "warn",
            "restarted 9 times",
        ),
        ("LoadState=loaded ActiveState=active UnitFileState=disabled", "warn", "won't at the next start"),
        ("LoadState=loaded ActiveState=failed", "bad", "has failed"),
        ("LoadState=loaded ActiveState=inactive", "warn", "is inactive"),
        ("", "ok", "isn't a service"),
    ],
)
async def test_the_service(tmp_path: Path, shown: str, level: str, words: str) -> None:
    lines = "\n".join(f"echo {word}" for word in shown.split())
    ill = patient(tmp_path, environ={"PATH": script(tmp_path / "bin", "systemctl", lines)})
    assert "systemd doesn't run here" in said(await look_at_service(ill))
    (ill.root / "run/systemd/system").mkdir(parents=True)
    [found] = await look_at_service(ill)
    assert (found.level, words in found.text) == (level, True)


async def test_a_tool_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_TOOL_SECONDS", 0.1)
    ill = patient(tmp_path, environ={"PATH": script(tmp_path / "bin", "timedatectl", "exec sleep 60")})
    assert [one.level for one in await look_at_clock(ill)] == ["ok"]
