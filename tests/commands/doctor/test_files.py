"""Configuration, keys, weights and the room on the disk."""

from __future__ import annotations

import os
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llamesh.commands.doctor import files
from llamesh.commands.doctor.files import look_at_files as look_at_configuration
from llamesh.commands.doctor.files import look_at_weights
from llamesh.commands.doctor.finding import Finding, Patient
from tests.commands.doctor.patients import SECRET, patient, said
from tests.support.tiny_model import write_tiny_model

Usage = namedtuple("Usage", "free")


@pytest.fixture(autouse=True)
def _much_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_usage", lambda path: Usage(100 << 30))


async def look_at_files(ill: Patient) -> list[Finding]:
    return [*await look_at_configuration(ill), *await look_at_weights(ill)]


async def levels(ill: Patient) -> set[str]:
    return {one.level for one in await look_at_files(ill)}


async def test_a_disk_that_is_away_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_model(tmp_path / "there.gguf")
    back = threading.Event()
    look = Path.stat

    def hanging(path: Path, **more: Any) -> Any:
        if path.name == "away.gguf":
            back.wait(60)
        return look(path, **more)

    models = [
        {"name": name, "profiles": [{"id": "default", "model_path": str(tmp_path / f"{name}.gguf")}]}
        for name in ("away", "there")
    ]
    ill = patient(tmp_path, {}, models)
    monkeypatch.setattr(files, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(Path, "stat", hanging)
    try:
        found = await look_at_weights(ill)
    finally:
        back.set()
    assert found[0].level == "bad"
    assert "away.gguf doesn't answer: is its disk away?" in found[0].text


async def test_all_is_well(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf")
    model = {"name": "m", "profiles": [{"id": "default", "model_path": str(tmp_path / "tiny.gguf")}]}
    hub = {"name": "h", "profiles": [{"id": "default", "hf_repo": "a/b"}]}
    found = await look_at_files(patient(tmp_path, {}, [model, hub]))
    assert {one.level for one in found} == {"ok"}
    for words in (
        "config.yaml is fine",
        "2 profiles",
        "100.0 GiB",
        "weights of 1 profile ",
        "those of 1 are",
    ):
        assert words in said(found)


async def test_mistakes_in_the_files(tmp_path: Path) -> None:
    ill = replace(
        patient(tmp_path), settings=None, cookbook=None, mistakes=("config.yaml:1: max_hop: unknown",)
    )
    [found] = await look_at_files(ill)
    assert (found.level, found.text) == ("bad", "config.yaml:1: max_hop: unknown")


@pytest.mark.parametrize(("cluster", "level"), [(False, "bad"), (True, "warn")])
async def test_weights_that_are_not_here(tmp_path: Path, cluster: bool, level: str) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"x")
    models = [
        {"name": name, "profiles": [{"id": "default", "model_path": str(tmp_path / f"{name}.gguf")}]}
        for name in ("gone", "broken")
    ]
    found = await look_at_files(patient(tmp_path, {"cluster": {"enabled": cluster}}, models))
    wrong = [one for one in found if one.level != "ok"]
    assert [one.level for one in wrong] == [level, level]
    assert "there is no file" in wrong[0].text


async def test_a_hundred_missing_files_take_no_longer_than_one(tmp_path: Path) -> None:
    models = [
        {"name": f"m{number}", "profiles": [{"id": "default", "model_path": "gone.gguf"}]}
        for number in range(100)
    ]
    found = await look_at_files(patient(tmp_path, {}, models))
    assert sum("there is no file" in one.text for one in found) == 100


async def test_keys_that_others_can_read(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o700)
    (keys / "node.key").write_text(SECRET)
    (keys / "node.key").chmod(0o600)
    assert await levels(patient(tmp_path)) == {"ok"}
    (keys / "node.key").chmod(0o644)
    (keys / "cluster_token").write_text(SECRET)
    (keys / "cluster_token").chmod(0o640)
    found = await look_at_files(patient(tmp_path))
    assert [one.remedy for one in found if one.level == "bad"] == [
        f"chmod 600 {keys / 'node.key'}",
        f"chmod 600 {keys / 'cluster_token'}",
    ]
    keys.chmod(0o755)
    assert f"chmod 700 {keys}" in said(await look_at_files(patient(tmp_path)))
    assert SECRET not in said(found)


async def test_keys_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").mkdir(mode=0o700)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    [found] = [one for one in await look_at_files(patient(tmp_path)) if one.level != "ok"]
    assert (found.level, "sudo -u" in found.remedy) == ("warn", True)
    assert "chown" not in found.remedy


async def test_keys_of_the_api_in_a_file_for_everybody(tmp_path: Path) -> None:
    ill = patient(tmp_path, {"auth": {"enabled": True, "allowed_keys": [SECRET]}})
    config = tmp_path / "config.yaml"
    config.chmod(0o644)
    found = [one for one in await look_at_files(ill) if one.level == "warn"]
    assert [one.remedy for one in found] == [f"chmod 600 {config}"]
    assert SECRET not in said(found)
    config.chmod(0o640)  # the group of a service may read it
    assert await levels(ill) == {"ok"}
    hashed = patient(tmp_path, {"auth": {"enabled": True, "allowed_keys": ["sha256:" + "0" * 64]}})
    config.chmod(0o644)
    assert await levels(hashed) == {"ok"}


async def test_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = [{"name": "h", "profiles": [{"id": "default", "hf_repo": "a/b"}]}]
    for free, cookbook, level in ((5, hub, "warn"), (0, hub, "bad"), (0, [], "warn"), (5, [], "ok")):
        monkeypatch.setattr(psutil, "disk_usage", lambda path, free=free: Usage(free << 30))
        found = await look_at_files(patient(tmp_path, {}, cookbook))
        [room] = [one for one in found if "GiB are free" in one.text]
        assert room.level == level


async def test_places_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: "locked" not in str(path))
    (tmp_path / "locked").mkdir()
    places = {"directory": str(tmp_path / "locked" / "logs"), "enabled": True}
    ill = patient(tmp_path, {"logging": places, "metrics_path": str(tmp_path / "locked" / "m.json")})
    found = [one for one in await look_at_files(ill) if one.level != "ok"]
    assert [one.level for one in found] == ["bad", "warn"]
    assert "logging.directory" in found[0].text
    assert "nothing is learned" in found[1].text
