"""Start and end the programs that are measured: mock, llama-server, its router, nginx, a node.

Each `start_*` takes the ExitStack of its row and puts the end of the process there, so nothing is left
when a row ends, however it ends. Processes are ended by the handle of what was started here, never by
name. Everything listens on 127.0.0.1 on a port of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.build import HERE, BenchError
from benchmarks.client import wait_healthy

MODEL = "bench"
# The same for llama-server alone, behind its router and behind a node. One thread: two cores are shared
# by everybody here, and the model is so small that a second thread only waits.
ENGINE_FLAGS = ("-c", "8192", "-np", "8", "-t", "1", "--fit", "off")
START_SECONDS = 30.0
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running program: its process, port and log file."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path


def free_port() -> int:
    """A port that nobody uses now. (Another program could take it before us; the start then fails.)"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started: ask, wait a little, then make sure of it."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        with contextlib.suppress(psutil.Error):
            child.kill()  # checks the start time: never a stranger with a reused id


def launch(
    stack: contextlib.ExitStack, log: Path, argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `argv` with its output in `log`; it ends with the stack."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=environ,
        )
    stack.callback(end, process)
    return process


def _last_words(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-15:])


@contextlib.contextmanager
def _explained(what: str, log: Path) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise BenchError(f"{what} did not start: {error}\n{_last_words(log)}") from None


def start_mock(stack: contextlib.ExitStack, folder: Path, binary: Path) -> Server:
    """The compiled stand-in."""
    log, port = folder / "mock.log", free_port()
    process = launch(stack, log, [str(binary), "--port", str(port)])
    with _explained("the mock upstream", log):
        wait_healthy(port, 0.01, START_SECONDS)
    return Server(process, port, log)


def start_engine(stack: contextlib.ExitStack, folder: Path, binary: Path, model: Path) -> Server:
    """llama-server by itself: the yardstick."""
    log, port = folder / "llama-server.log", free_port()
    argv = [str(binary), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *ENGINE_FLAGS]
    process = launch(stack, log, argv)
    with _explained("llama-server", log):
        wait_healthy(port, 0.02, START_SECONDS)
    return Server(process, port, log)


def start_router(stack: contextlib.ExitStack, folder: Path, binary: Path, model: Path) -> Server:
    """llama-server's own router over a folder of models; it passes its engine flags to its children."""
    log, port = folder / "router.log", free_port()
    argv = [str(binary), "--models-dir", str(model.parent), "--models-max", "1"]
    process = launch(stack, log, [*argv, "--host", "127.0.0.1", "--port", str(port), *ENGINE_FLAGS])
    with _explained("llama-server's router", log):
        wait_healthy(port, 0.02, START_SECONDS)
    return Server(process, port, log)


def start_nginx(stack: contextlib.ExitStack, folder: Path, upstream: int) -> Server | None:
    """nginx with one worker in front of `upstream`; None where there is no nginx."""
    binary = shutil.which("nginx")
    if binary is None:
        return None
    home, port = folder / "nginx", free_port()
    home.mkdir()
    temporary = "".join(
        f"{kind}_temp_path {home / kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (home / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {home / 'pid'}; error_log {home / 'error.log'};\n"
        "events { worker_connections 1024; }\n"
        f"http {{ access_log off; {temporary} keepalive_requests 1000000;\n"
        f"  upstream mock {{ server 127.0.0.1:{upstream}; keepalive 64; keepalive_requests 1000000; }}\n"
        f"  server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://mock;\n"
        '    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; } } }\n'
    )
    log = folder / "nginx.log"
    process = launch(stack, log, [binary, "-e", str(home / "error.log"), "-c", str(home / "nginx.conf")])
    with _explained("nginx", log):
        wait_healthy(port, 0.02, START_SECONDS)
    return Server(process, port, log)


def _listening_port(log: Path, process: subprocess.Popen[bytes]) -> int:
    """Wait for the node's `listening` event, a JSON line with its `url`. Raises BenchError."""
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        for line in log.read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict) and event.get("event") == "listening":
                    return int(str(event["url"]).rsplit(":", 1)[1].strip("/"))
        time.sleep(0.01)
    raise BenchError(f"the node did not start (exit code {process.poll()}):\n{_last_words(log)}")


def start_node(
    stack: contextlib.ExitStack,
    folder: Path,
    name: str,
    *,
    engine: Path,
    model: Path,
    flags: Sequence[str] = ENGINE_FLAGS,
    idle_seconds: float = 0,
    cluster: bool = False,
    models: Sequence[str] = (MODEL,),
    settings: Mapping[str, Any] | None = None,
    variables: Mapping[str, str] | None = None,
) -> Server:
    """A llamesh node on the default configuration, with one model named `bench`, or with `models`.

    `engine` is the llama-server (or mock) that it starts on demand. With `cluster` the mesh is on, seen
    on loopback only, with a key store of its own. `settings` are first-level keys of config.yaml that
    replace those here, `variables` more of the environment.
    """
    home = folder / name
    home.mkdir()
    config: dict[str, Any] = {
        "node_id": name,
        "listen_addr": "127.0.0.1:0",
        "metrics_path": str(home / "node-metrics.json"),
        "llama_cpp": {"binary_path": str(engine)},
    }
    if cluster:
        config["cluster"] = {
            "enabled": True,
            "discovery": {"interfaces": ["127.0.0.1"]},
            "noise": {"config_dir": str(home / "keys")},
        }
    config |= settings or {}
    profile = {
        "id": "default",
        "model_path": str(model),
        "llama_server_args": " ".join(flags),
        "idle_timeout_seconds": idle_seconds,
    }
    # JSON is YAML too.
    (home / "config.yaml").write_text(json.dumps(config))
    cookbook = {"models": [{"name": model_name, "profiles": [profile]} for model_name in models]}
    (home / "cookbook.yaml").write_text(json.dumps(cookbook))
    environ = {key: value for key, value in os.environ.items() if not key.startswith("LLAMESH_")}
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), environ.get("PYTHONPATH", "")]))
    environ |= variables or {}
    command = [sys.executable, "-m", "llamesh", "--config", "config.yaml", "--cookbook", "cookbook.yaml"]
    log = home / "node.log"
    process = launch(stack, log, command, environ)
    return Server(process, _listening_port(log, process), log)
