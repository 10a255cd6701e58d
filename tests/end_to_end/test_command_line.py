"""The command: what it prints, what it refuses, and that nothing secret leaves it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

import llamesh
from tests.end_to_end.cookbooks import CHAT, chat, cookbook, profile
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.node import PATIENCE_SECONDS, clean_environment, prepare, running_node


def run(
    tmp_path: Path,
    *arguments: str,
    recipes: Any = None,
    config: Any = None,
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `llamesh` until it ends by itself."""
    command, directory, environment = prepare(tmp_path, recipes or {"models": []}, config, env=env)
    return subprocess.run(
        [*command, *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def test_version_and_help(tmp_path: Path) -> None:
    version = run(tmp_path, "--version")
    assert version.returncode == 0
    assert version.stdout.startswith(f"llamesh {llamesh.__version__}, engine embedded ")
    assert version.stdout.count("\n") == 1
    assert version.stderr == ""
    shown = run(tmp_path, "--help")
    assert shown.returncode == 0
    for word in ("--config", "--cookbook", "--secrets", "--version"):
        assert word in shown.stdout
    nonsense = run(tmp_path, "--nonsense")
    assert nonsense.returncode == 2
    assert "--nonsense" in nonsense.stderr
    assert "Traceback" not in nonsense.stderr


def test_the_version_of_a_configured_engine(tmp_path: Path) -> None:
    version = run(tmp_path, "--version", config={"llama_cpp": {"binary_path": str(FAKE_LLAMA_SERVER)}})
    assert version.stdout.startswith(f"llamesh {llamesh.__version__}, engine configured ")


def test_the_installed_command_is_the_module() -> None:
    command = Path(sys.executable).with_name("llamesh")
    done = subprocess.run(
        [command, "--help"], capture_output=True, text=True, env=clean_environment({}), timeout=60
    )
    assert done.returncode == 0
    assert "--cookbook" in done.stdout


def test_bad_files_are_refused_with_file_and_line(tmp_path: Path) -> None:
    """All that is wrong in both files, at once."""
    tmp_path.mkdir(exist_ok=True)
    command, directory, environment = prepare(tmp_path, {})
    (directory / "config.yaml").write_text(
        "node_id: a b\nlisten_adr: 127.0.0.1:1\nmodel_defaults:\n  max_queue_size_per_model: many\n"
    )
    (directory / "cookbook.yaml").write_text(
        "models:\n  - name: tiny\n    profiles:\n      - id: 'a:b'\n        model_path: x\n"
        "      - id: two\n        model_path: x\n        hf_repo: y/z\n"
    )
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    for pattern in (
        r"config\.yaml:1: node_id: ",
        r"config\.yaml:2: listen_adr: .*listen_addr",
        r"config\.yaml:4: model_defaults\.max_queue_size_per_model: ",
        r"cookbook\.yaml:4: models\[0\]\.profiles\[0\]\.id: ",
        r"cookbook\.yaml:[678]: models\[0\]\.profiles\[1\]",
    ):
        assert re.search(pattern, done.stderr), (pattern, done.stderr)


@pytest.mark.parametrize(
    ("config", "cookbook_text", "parts"),
    [
        ("a: [1,\n", "models: []\n", ["config.yaml:"]),
        ("", "models:\n  - name: x\n   profiles: []\n", ["cookbook.yaml:3"]),
        ("", "- just\n- a list\n", ["cookbook.yaml"]),
        ("", "\x00\x01 binary", ["cookbook.yaml"]),
        ("default_model: nobody\n", "models: []\n", ["default_model", "nobody"]),
        ("auth:\n  enabled: true\n", "models: []\n", ["auth"]),
    ],
)
def test_bad_files(tmp_path: Path, config: str, cookbook_text: str, parts: list[str]) -> None:
    command, directory, environment = prepare(tmp_path, cookbook_text)
    (directory / "config.yaml").write_text(config)
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


def test_a_missing_cookbook(tmp_path: Path) -> None:
    done = run(tmp_path, "--cookbook", "nowhere.yaml")
    assert done.returncode == 1
    assert "nowhere.yaml" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_variable(tmp_path: Path) -> None:
    done = run(tmp_path, env={"LLAMESH_NODE_IT": "x", "LLAMESH_CLUSTER__ENABELD": "true"})
    assert done.returncode == 1
    assert re.search(r"LLAMESH_NODE_IT\b.*node_id", done.stderr, re.IGNORECASE), done.stderr
    assert "LLAMESH_CLUSTER__ENABELD" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run(tmp_path, config={"listen_addr": address})
    assert done.returncode == 1
    assert address in done.stderr
    assert "listen_addr" in done.stderr
    assert "Traceback" not in done.stderr


async def test_the_log_on_a_pipe(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    """A JSON object a line; a request's line says which it was and who answered it."""
    async with running_node(tmp_path, cookbook(tiny=profile(tiny_model)), binary_path=engine_binary) as node:
        reply = await node.client.post(CHAT, json=chat(tokens=4), headers={"x-request-id": "known-1"})
        assert reply.status_code == 200
        entry = await node.wait_event("request", request_id="known-1")
        assert entry["instance"] == "tiny:default#1"
        assert entry["profile"] == "tiny:default"
        assert entry["tokens"] == 4
        refused = await node.client.post(CHAT, json=chat("nobody"), headers={"x-request-id": "known-2"})
        assert refused.headers["x-request-id"] == "known-2"
        assert (await node.wait_event("request", request_id="known-2"))["error"] == "model_not_found"
        assert await node.stop() == 0
        for entry in node.events:
            assert {"time", "level", "event"} <= set(entry), entry
            assert entry["level"] != "unreadable"
        assert node.errors == []


async def test_nothing_secret_is_told(tmp_path: Path, tiny_model: Path, engine_binary: Path | None) -> None:
    """Neither prompts nor answers nor keys: not in logs, metrics, pages, or any process list."""
    secrets = {
        "prompt": "marker-of-a-prompt",
        "client": "marker-of-a-client-key",
        "admin": "marker-of-an-admin-key",
        "child": "marker-of-a-child-key",
        "wrong": "marker-of-a-wrong-key",
    }
    keys = {"enabled": True, "allowed_keys": [secrets["client"]], "admin_keys": [secrets["admin"]]}
    flags = f"-c 1024 --api-key {secrets['child']}"
    recipes = cookbook(
        tiny=profile(tiny_model) | {"llama_server_args": flags},
        broken=profile(tiny_model) | {"llama_server_args": f"{flags} --no-such-flag"},
    )
    settings = {
        "auth": keys,
        "logging": {"enabled": True, "directory": str(tmp_path / "logs"), "compression": False},
    }
    seen: list[str] = []
    async with running_node(tmp_path, recipes, settings, binary_path=engine_binary) as node:
        headers = {"authorization": f"Bearer {secrets['client']}"}
        for body in (
            chat(messages=[{"role": "user", "content": secrets["prompt"]}]),
            chat(messages=[{"role": "user", "content": secrets["prompt"]}], stream=True),
            chat(messages=secrets["prompt"], response_format=secrets["prompt"]),
            chat("broken", messages=[{"role": "user", "content": secrets["prompt"]}]),
        ):
            await node.client.post(CHAT, json=body, headers=headers)
        await node.client.post(CHAT, content=f"{{{secrets['prompt']}", headers=headers)
        await node.client.post(CHAT, json=chat(), headers={"x-api-key": secrets["wrong"]})
        await node.client.get(f"/v1/models/{'x'}", headers={"x-api-key": secrets["wrong"]})
        failed = await node.client.post(CHAT, json=chat("broken"), headers=headers)
        assert failed.status_code == 503
        seen.append(failed.text)
        admin = {"x-api-key": secrets["admin"]}
        assert (await node.client.post("/admin/prewarm", json={"model": "tiny"}, headers=admin)).is_success
        for page in ("/metrics", "/metrics/json", "/v1/models", "/cluster/nodes", "/running"):
            reply = await node.client.get(page, headers=headers)
            assert reply.status_code == 200
            seen.append(reply.text)
        processes = [psutil.Process(node.pid), *node.children()]
        assert len(processes) > 1
        seen += [" ".join(process.cmdline()) for process in processes]
        assert await node.stop() == 0
        seen += [json.dumps(entry) for entry in node.events] + node.errors
    written = [path for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert written
    metrics = tmp_path / "node-metrics.json"
    seen += [path.read_text() for path in (*written, metrics)]
    text = "\n".join(seen)
    assert "tiny:default" in text
    for what, secret in secrets.items():
        assert secret not in text, f"the {what} is told in {[s for s in seen if secret in s]}"


async def test_on_a_terminal_the_log_is_for_people(tmp_path: Path, tiny_model: Path) -> None:
    command, directory, environment = prepare(tmp_path, cookbook(tiny=profile(tiny_model)))
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=directory,
        env={**environment, "TERM": "xterm"},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        text = await trio.to_thread.run_sync(_read_until, master, b"listening")
        process.send_signal(signal.SIGTERM)
        text += await trio.to_thread.run_sync(_read_until, master, b"ended")
        assert await trio.to_thread.run_sync(process.wait, PATIENCE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain != text
    assert re.search(r"listening .*http://127\.0\.0\.1:\d+", plain)
    for line in plain.splitlines():
        assert not line.startswith("{")


def _read_until(terminal: int, word: bytes) -> str:
    text = b""
    while word not in text:
        try:
            data = os.read(terminal, 65_536)
        except OSError:  # Linux says EIO when the other side is closed
            data = b""
        assert data, text
        text += data
    rest = text.partition(word)[2]
    # The rest of that line.
    while b"\n" not in rest:
        data = os.read(terminal, 65_536)
        rest += data
        text += data
    return text.decode()
