"""The command as a whole: what it prints, how it ends, and that it always does."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from llamesh.commands.doctor import command, examination
from llamesh.commands.doctor.examination import examine_all
from llamesh.commands.doctor.finding import Finding, Patient, ok
from llamesh.commands.doctor.running import version_at
from llamesh.commands.shared.options import Files
from llamesh.config.settings import Settings, load_settings
from tests.commands.cli import run
from tests.commands.doctor.patients import SECRET
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.node import running_node


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, with a node's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("LLAMESH_API_KEY", "CLUSTER_TOKEN", "NODE_PRIVATE_KEY"):
        monkeypatch.delenv(name, raising=False)
    auth = {"enabled": True, "allowed_keys": [SECRET]}
    noise = {"noise": {"config_dir": str(tmp_path / "keys")}}
    write("config.yaml", {"listen_addr": "127.0.0.1:0", "auth": auth, "cluster": noise})
    write("cookbook.yaml", {"models": []})
    return tmp_path


def write(name: str, document: Any) -> None:
    Path(name).write_text(json.dumps(document))
    Path(name).chmod(0o600)


def test_the_whole_examination() -> None:
    result = run(command, "--json")
    document = json.loads(result.stdout)
    sections = [line["section"] for line in document["findings"]]
    for name in ("files", "ports", "multicast", "gpu", "engine", "clock", "limits", "service"):
        assert name in sections
    assert document["ok"] is (result.exit_code == 0)
    assert SECRET not in result.output
    shown = run(command)
    assert shown.exit_code == result.exit_code
    assert "files\n  ok    config.yaml is fine" in shown.output
    assert "\x1b" not in shown.output


def test_mistakes_are_told_and_the_rest_is_looked_at() -> None:
    write("config.yaml", {"max_hop": 1})
    result = run(command, "--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    assert document["ok"] is False
    sections = {line["section"] for line in document["findings"]}
    assert {"files", "gpu", "limits", "service"} <= sections
    assert "ports" not in sections
    told = [line for line in document["findings"] if line["level"] == "bad"]
    assert "max_hop: unknown key" in told[0]["text"]


def test_remedies_stand_below() -> None:
    write("cookbook.yaml", {"models": [{"name": "m", "profiles": [{"id": "default", "model_path": "gone"}]}]})
    result = run(command)
    assert result.exit_code == 1
    assert "there is no file" in result.output
    assert "\n        -> correct model_path" in result.output


async def test_a_section_that_hangs_or_breaks_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def hangs(_: Patient) -> list[Finding]:
        await trio.sleep_forever()

    async def breaks(_: Patient) -> list[Finding]:
        raise RuntimeError("what nobody foresaw")

    async def works(_: Patient) -> list[Finding]:
        return [ok("fine")]

    sections = {"hangs": (hangs, 3.0), "breaks": (breaks, 3.0), "works": (works, 3.0)}
    monkeypatch.setattr(examination, "SECTIONS", sections)
    found = await examine_all(Files(), {}, tmp_path)
    assert trio.current_time() < 10
    assert found["hangs"][0].level == "warn"
    assert "what nobody foresaw" in found["breaks"][0].text
    assert found["works"] == [ok("fine")]


async def test_with_a_node_that_runs(tmp_path: Path) -> None:
    directory = tmp_path / "node"
    config = {"auth": {"enabled": True, "allowed_keys": [SECRET]}}
    async with running_node(directory, {"models": []}, config, binary_path=FAKE_LLAMA_SERVER) as node:
        document = json.loads((directory / "config.yaml").read_text())
        document["listen_addr"] = f"127.0.0.1:{node.port}"
        write(str(directory / "config.yaml"), document)
        paths = Files.named(directory / "config.yaml", None, directory / "cookbook.yaml")
        found = await examine_all(paths, {"PATH": "/nowhere", "HOME": str(tmp_path)}, tmp_path)
        assert "a llamesh node runs there, version" in found["ports"][0].text
        settings = load_settings(directory / "config.yaml", None, {})
        assert await trio.to_thread.run_sync(version_at, settings)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]", b"SSH-2.0\r\n", b""])
def test_another_program_at_the_address(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        assert version_at(Settings.model_validate({"listen_addr": address})) == ""
        thread.join(10)
