"""`llamesh check`: both files, real model files, and nothing that is started or told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from llamesh.commands.check import command
from llamesh.commands.check.look import for_people, learned_values
from llamesh.config.settings import Settings
from llamesh.core.readings import Device
from llamesh.local import memory
from llamesh.local.launch import Engine
from llamesh.local.sensors import Sensors
from tests.commands.cli import run
from tests.support.node import running_node
from tests.support.tiny_model import write_tiny_model

FLAGS = "--model --ctx-size --fit --alias --host --port --parallel --embedding --device --hf-token"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, where an engine is that would leave a trace if it were started for real."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("LLAMESH_API_KEY", "HF_HUB_CACHE", "HF_ASSETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
    engine = tmp_path / "llama.cpp" / "bin" / "llama-server"
    engine.parent.mkdir(parents=True)
    help_ = "\n".join(f"{flag} X" for flag in FLAGS.split())
    engine.write_text(
        f'#!/bin/sh\ncase "$1" in\n--help) cat <<END\n{help_}\nEND\n;;\n'
        f'--version) echo "version: 7 (abc)";;\n'
        f"*) touch {tmp_path}/started;;\nesac\n"
    )
    engine.chmod(0o755)
    return tmp_path


def write(name: str, document: Any) -> None:
    Path(name).write_text(json.dumps(document))


def cookbook(**profiles: dict[str, Any]) -> None:
    models = [{"name": name, "profiles": [{"id": "default", **one}]} for name, one in profiles.items()]
    write("cookbook.yaml", {"models": models})


def plan(*arguments: str) -> dict[str, Any]:
    result = run(command, "--json", *arguments)
    document: dict[str, Any] = json.loads(result.stdout)
    assert (result.exit_code == 0) is not bool(document["problems"] or document["errors"])
    assert not Path("started").exists()
    return document


def test_a_model_that_is_here(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf", context=32_768)
    write("config.yaml", {"node_id": "here"})
    cookbook(tiny={"model_path": "tiny.gguf", "llama_server_args": "--parallel 2 --api-key s3cret"})
    document = plan()
    [profile] = document["profiles"]
    assert document["node_id"] == "here"
    assert document["engine"]["version"] == "7 (abc)"
    assert profile["verdict"] == "fits"
    assert profile["source"]["state"] == "here"
    assert profile["source"]["size_bytes"] == (tmp_path / "tiny.gguf").stat().st_size
    assert profile["context"] == {"asked": None, "used": 32_768, "trained": 32_768, "reduced": False}
    assert profile["memory"]["from"] == "estimate"
    assert profile["memory"]["sysmem_mb"] > 0
    assert document["budget"]["sysmem_mb"] > 0
    words = profile["command"]
    assert words[0] == "LLAMA_API_KEY=***"
    assert words[1].endswith("llama.cpp/bin/llama-server")
    assert words[2:4] == ["-m", str(tmp_path / "tiny.gguf")]
    assert words[-2:] == ["--port", "PORT"]
    assert document["warnings"] == []
    assert "s3cret" not in json.dumps(document)


async def test_a_node_starts_just_that(tmp_path: Path) -> None:
    """The command line that is shown is the one that the node then runs."""
    Path("llama.cpp/bin/llama-server").unlink()  # with the embedded engine
    write_tiny_model(tmp_path / "tiny.gguf", context=1024)
    arguments = "--parallel 2 --api-key s3cret --chat-template-kwargs '{\"a b\": 1}'"
    profile = {"id": "default", "model_path": "tiny.gguf", "llama_server_args": arguments}
    recipes = {"models": [{"name": "tiny", "profiles": [profile]}]}
    async with running_node(tmp_path, recipes) as node:
        reply = await node.client.post(
            "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1}
        )
        assert reply.status_code == 200
        [child] = [one for one in node.children() if "llamesh.local.engine" in " ".join(one.cmdline())]
        started = child.cmdline()
        assert "s3cret" not in started
        shown = (await trio.to_thread.run_sync(plan, "--config", "config.yaml"))["profiles"][0]["command"]
    assert shown[0] == "LLAMA_API_KEY=***"
    assert [*shown[1:-1], started[-1]] == started


def test_the_same_in_words(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf")
    cookbook(tiny={"model_path": "tiny.gguf", "llama_server_args": "--api-key s3cret"})
    result = run(command)
    assert result.exit_code == 0
    assert "version 7" in result.output
    assert f"LLAMA_API_KEY=*** {tmp_path}/llama.cpp/bin/llama-server -m {tmp_path}/tiny.gguf" in result.output
    assert "s3cret" not in result.output
    assert "\x1b" not in result.output
    assert "--port" not in run(command, "--no-commands").output


def test_a_context_that_has_to_be_smaller(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "long.gguf", context=1_048_576)
    write("config.yaml", {"max_sysmem_mb": 120, "max_vram_mb": 0})
    cookbook(
        long={"model_path": "long.gguf"}, all={"model_path": "long.gguf", "llama_server_args": "-c 2000000"}
    )
    document = plan()
    long, all_ = document["profiles"]
    assert long["context"]["reduced"]
    assert 8192 <= long["context"]["used"] < 1_048_576
    assert str(long["context"]["used"]) in long["command"]
    assert all_["verdict"] == "never"
    assert "120 MiB may be used here (max_sysmem_mb)" in all_["why"]
    assert any("instead of 1048576" in warning for warning in document["warnings"])
    assert any("-c 2000000 is more than" in warning for warning in document["warnings"])
    assert "all:default can't start here" in document["errors"][0]


def test_weights_that_are_not_here(tmp_path: Path) -> None:
    Path("broken.gguf").write_bytes(b"no model")
    cookbook(
        gone={"model_path": "gone.gguf"},
        broken={"model_path": "broken.gguf"},
        hub={"hf_repo": "some/model-GGUF:Q4_K_M"},
        web={"url": "https://example.org/a.gguf?token=s3cret", "sha256": "0" * 64},
        own={"llama_server_args": "-mu https://user:s3cret@example.org/a.gguf?sig=s3cret --hf-token s3cret"},
    )
    document = plan()
    assert [one["verdict"] for one in document["profiles"]] == [
        "missing",
        "missing",
        "download",
        "download",
        "unknown",
    ]
    assert document["profiles"][2]["command"][1:3] == ["-m", "DOWNLOADED/some/model-GGUF:Q4_K_M"]
    assert f"there is no file {tmp_path / 'gone.gguf'}" in document["errors"][0]
    assert "s3cret" not in json.dumps(document)
    assert "s3cret" not in run(command).output
    write("config.yaml", {"cluster": {"enabled": True}})
    assert plan()["errors"] == []  # another node may have them


def test_what_the_cookbook_says_of_memory_is_believed() -> None:
    cookbook(hub={"hf_repo": "some/model", "estimated_sysmem_mb": 7, "estimated_vram_mb": 0})
    [profile] = plan()["profiles"]
    assert profile["memory"] == {"vram_mb": 0, "sysmem_mb": 7, "from": "cookbook"}
    assert profile["verdict"] == "fits"


def test_what_a_node_has_measured_counts_and_its_file_is_left_alone(tmp_path: Path) -> None:
    Path("metrics.json").write_text("damaged")
    before = sorted(tmp_path.iterdir())
    settings = Settings.model_validate({"metrics_path": str(tmp_path / "metrics.json")})
    assert learned_values(settings).peaks == {}
    assert sorted(tmp_path.iterdir()) == before


def test_every_mistake_of_both_files_at_once() -> None:
    write("config.yaml", {"max_hop": 1, "listen_addr": "nowhere"})
    write("cookbook.yaml", {"models": [{"name": "a:b", "profiles": [{"id": "x"}]}]})
    result = run(command)
    assert result.exit_code == 1
    for word in ("config.yaml:1: max_hop: unknown key (nearest: max_hops)", "listen_addr", "cookbook.yaml:1"):
        assert word in result.output
    problems = json.loads(run(command, "--json").stdout)["problems"]
    paths = {problem["path"] for problem in problems}
    assert paths == {"max_hop", "listen_addr", "models[0].name", "models[0].profiles[0]"}
    assert run(command, "--config", "elsewhere.yaml").exit_code == 1


def test_an_engine_that_is_not_there_and_flags_that_it_lacks(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf")
    cookbook(tiny={"model_path": "tiny.gguf", "llama_server_args": "--no_such_flag 3"})
    assert plan()["warnings"] == ["tiny:default: --no-such-flag isn't among the flags that this engine lists"]
    write("config.yaml", {"llama_cpp": {"binary_path": "nothing/here"}})
    document = plan()
    assert document["engine"] is None
    assert "does not exist" in document["errors"][0]
    assert document["profiles"][0]["verdict"] == "fits"


def test_flags_that_the_embedded_engine_refuses() -> None:
    Path("llama.cpp/bin/llama-server").unlink()
    cookbook(hub={"llama_server_args": "-hf a/b --override_kv x=y"})
    document = plan()
    assert document["profiles"][0]["verdict"] == "never"
    [error] = document["errors"]
    assert "the engine refuses -hf: the embedded engine doesn't download" in error


class Gpu:
    """A sensor of one GPU with 24 GiB, 2 of them in use."""

    problem = None

    def read(self, trees: Any, now: float) -> tuple[Device, ...]:
        return (Device(0, "GPU-a", "Fake", "nvidia", total_bytes=24 << 30, used_bytes=2 << 30),)

    def close(self) -> None:
        pass


def test_room_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "Sensors", lambda: Sensors(gpus=[Gpu()]))
    big, small = (
        {"hf_repo": "a/b", "estimated_vram_mb": 20_000},
        {"hf_repo": "a/b", "estimated_vram_mb": 1000},
    )
    cookbook(one=big, two=big, three=small, four={**small, "estimated_vram_mb": 30_000})
    document = plan()
    assert document["budget"]["vram_mb"] == 22_118  # 24 GiB less a tenth
    assert document["budget"]["vram_now_mb"] < 22_118
    found = {one["name"]: one["verdict"] for one in document["profiles"]}
    assert found == {"one": "eviction", "two": "eviction", "three": "eviction", "four": "never"}
    assert "22118 MiB may be used here (max_vram_mb)" in document["errors"][0]
    cookbook(one=big, three=small)
    assert [one["verdict"] for one in plan()["profiles"]] == ["fits", "fits"]


def test_arguments_that_put_the_child_out_of_reach(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf")
    cookbook(tiny={"model_path": "tiny.gguf", "llama_server_args": "--port any"})
    document = plan()
    assert document["profiles"][0]["verdict"] == "never"
    assert "--port needs a number" in document["errors"][0]


def test_models_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name in ("one", "two"):
        path = write_tiny_model(tmp_path / "models" / f"{name}.gguf")
        os.utime(path, (1, 1))
    write("config.yaml", {"models_dir": "models"})
    write("cookbook.yaml", {"models": []})
    assert [profile["name"] for profile in plan()["profiles"]] == ["one", "two"]
    write("config.yaml", {"models_dir": "elsewhere"})
    assert plan()["errors"] == ["models_dir elsewhere isn't a folder"]


def test_a_port_of_the_configured_ones_is_shown(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.gguf")
    write("config.yaml", {"llama_cpp_ports": {"ports": [18091, 18090]}})
    cookbook(tiny={"model_path": "tiny.gguf"})
    assert plan()["profiles"][0]["command"][-1] == "18090"


def test_rich_is_not_imported_for_a_pipe() -> None:
    write("cookbook.yaml", {"models": []})
    program = (
        "import sys; from llamesh.commands.check import command\n"
        "try: command.main(['--json'])\n"
        "except SystemExit: print('rich' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr == "False\n"


def test_the_embedded_engine_is_named() -> None:
    engine = Engine(("/opt/python", "-P", "-c", "import x; x.run()", "/opt"), "embedded", "1")
    words = [*engine.command, "-m", "two  words.gguf"]
    assert for_people(words, engine) == "llama-server (embedded) -m 'two  words.gguf'"
    keyed = ["LLAMA_API_KEY=***", *words]
    assert for_people(keyed, engine) == "LLAMA_API_KEY=*** llama-server (embedded) -m 'two  words.gguf'"
    other = replace(engine, origin="path", command=("/usr/bin/llama-server",))
    assert for_people(["/usr/bin/llama-server", "-c", "0"], other) == "/usr/bin/llama-server -c 0"
