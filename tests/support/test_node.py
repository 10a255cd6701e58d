"""What runs a node for the tests, tried on a stand-in that logs, has a child, and obeys or doesn't."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.node import CHECKOUT, Node, clean_environment, prepare, wait_until

STAND_IN = """
import json, signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
def end(*_):
    if "careless" not in sys.argv:
        child.kill()
        child.wait()
    print(json.dumps({"event": "bye"}), flush=True)
    sys.exit(7)
signal.signal(signal.SIGTERM, end)
print("warning: on stderr", file=sys.stderr, flush=True)
print("no JSON", flush=True)
for number in (1, 2):
    print(json.dumps({"event": "listening", "url": "http://127.0.0.1:80", "number": number}), flush=True)
while True:
    signal.pause()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> list[str]:
    """The command of the stand-in."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    return [sys.executable, str(tmp_path / "stand_in.py")]


async def test_events_are_found_and_waited_for(stand_in: list[str], tmp_path: Path) -> None:
    node = Node(stand_in, tmp_path, clean_environment({}))
    try:
        assert (await node.wait_event("listening"))["number"] == 1
        assert (await node.wait_event("listening", after=1))["number"] == 2
        assert (await node.wait_event("listening", number=2))["url"] == "http://127.0.0.1:80"
        assert node.events[0] == {"event": "no JSON", "level": "unreadable"}
        [child] = node.children()
        assert await node.stop() == 7
        assert not child.is_running()
        assert (await node.wait_event("bye"))["event"] == "bye"
        assert node.errors == ["warning: on stderr"]
        with pytest.raises(AssertionError, match="no event 'never'"):
            await node.wait_event("never")
    finally:
        await node.close()


async def test_nothing_outlives_it(stand_in: list[str], tmp_path: Path) -> None:
    node = Node(stand_in, tmp_path, clean_environment({}))
    try:
        await node.wait_event("listening")
        [child] = node.children()
    finally:
        await node.close()
    assert node.returncode == -signal.SIGKILL

    def gone() -> bool:
        return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE

    await wait_until(gone, "the child lives")


async def test_what_is_left_behind_is_noticed_and_killed(
    stand_in: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node([*stand_in, "careless"], tmp_path, clean_environment({}))
    try:
        await wait_until(lambda: bool(node.find_events("listening")), "it doesn't listen")
        [child] = node.children()
        node.send_signal(signal.SIGTERM)
        await wait_until(lambda: node.returncode is not None, "it doesn't end")
        monkeypatch.setattr("tests.support.node.PATIENCE_SECONDS", 0.1)
        with pytest.raises(AssertionError, match="children left"):
            await node.wait_end([child])
    finally:
        await node.close()
    monkeypatch.undo()
    await wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, "it lives")


def test_files_command_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMESH_NODE_ID", "developer")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    (binaries / "llama-server").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin")
    command, directory, environment = prepare(
        tmp_path / "node",
        {"models": []},
        {"listen_addr": "[::1]:0", "cluster": {"enabled": True}},
        binary_path=tmp_path / "x",
        env={"LLAMESH_MAX_VRAM_MB": "0"},
        arguments=["--secrets", "s.yaml"],
    )
    config = json.loads((directory / "config.yaml").read_text())
    assert config["listen_addr"] == "[::1]:0"
    assert config["cluster"] == {"enabled": True, "noise": {"config_dir": str(directory / "keys")}}
    assert config["llama_cpp"]["binary_path"] == str(tmp_path / "x")
    assert json.loads((directory / "cookbook.yaml").read_text()) == {"models": []}
    assert command[1:3] == ["-m", "llamesh"]
    assert command[-2:] == ["--secrets", "s.yaml"]
    assert not {"LLAMESH_NODE_ID", "LLAMA_API_KEY", "HTTPS_PROXY"} & set(environment)
    assert environment["LLAMESH_MAX_VRAM_MB"] == "0"
    assert environment["PATH"] == "/usr/bin"
    assert environment["PYTHONPATH"] == str(CHECKOUT)
