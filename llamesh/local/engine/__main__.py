"""`python -m llamesh.local.engine`: one llama.cpp server in one process, driven like llama-server.

What is the same as with llama-server:
    The flags (as far as the binding has them, see `table`), `LLAMA_API_KEY`, the routes and replies,
    the log on stderr. The port opens before the model is loaded and `/health` says 503 until it is.
    A start that fails is exit code 1 with the reason in the output.

What differs:
    SIGTERM and SIGINT end the process at once, by the signal's default action, also in the middle of a
    load. llama.cpp's own shutdown would wait for running requests, and a Python handler could not even
    run while the binding loads a model with the interpreter locked. Nothing is lost by it: the log is
    written line by line, and who sends the signal has already waited for the requests he cares about.

    The process ends when the one that started it does (checked twice a second, on any platform). During
    a load it notices only afterwards, for the reason above; where the system can tie a child to its
    parent, whoever starts it should do that as well.

    Three lines on stdout say, whatever the log level: `n_ctx = N` (tokens that one slot can hold),
    `n_slots = N` and `listening on URL`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from typing import Any, NoReturn

from llamesh.local.engine.command_line import FlagError, Request, help_text, read

PARENT_POLL_SECONDS = 0.5


def main() -> NoReturn:
    """Serve until killed; or print what was asked for, or what is wrong, and exit."""
    # First of all: should the parent die during the imports, its number has changed when we look again.
    parent = os.getppid()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    try:
        request = read(sys.argv[1:], os.environ)
        for warning in request.warnings:
            _say(f"warning: {warning}", sys.stderr)
        if request.action == "serve":
            serve(request, parent)
        _say({"help": help_text, "version": version, "devices": devices}[request.action]())
    except FlagError as error:
        _say(f"error: {error}", sys.stderr)
        _leave(1)
    _leave(0)


def serve(request: Request, parent: int) -> NoReturn:
    """Load the model and serve it until the process numbered `parent` is gone. Raises `FlagError`."""
    binding = _binding()
    params = binding.CommonParams()
    request.apply(params, binding)
    try:
        # Returns when the model is loaded; the server runs on threads of llama.cpp's own.
        server = binding.Server(params)
    except (RuntimeError, ValueError) as error:
        raise FlagError(
            f"llama.cpp couldn't serve {request.model}; its reason stands above ({error})"
        ) from None
    address = server.listening_address
    for name, value in _learn(address, params.api_prefix, list(params.api_keys)).items():
        _say(f"{name} = {value}")
    _say(f"listening on {address}")
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)
    _leave(1)


def version() -> str:
    """The line that `--version` prints. Doesn't load the engine."""
    import importlib.metadata

    try:
        return f"llamesh embedded engine: xllamacpp {importlib.metadata.version('xllamacpp')}"
    except importlib.metadata.PackageNotFoundError:
        raise FlagError("the embedded engine isn't installed: pip install xllamacpp") from None


def devices() -> str:
    """The devices that llama.cpp can offload to, one a line, with their memory in MiB."""
    lines = [
        f"  {device['name']}: {device['description']} "
        f"({device['memory_total'] >> 20} MiB, {device['memory_free'] >> 20} MiB free)"
        for device in _binding().get_device_info()
        if device["name"] != "CPU"
    ]
    return "\n".join(["Available devices:", *(lines or ["  (none)"])])


def _binding() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        raise FlagError(f"the embedded engine can't be loaded: {error}") from None
    return xllamacpp


def _learn(address: str, prefix: str, keys: list[str]) -> dict[str, int]:
    """What the server says about itself on `/props`; nothing where it speaks TLS (its log has it too)."""
    scheme, _, place = address.partition("://")
    if scheme == "https":
        return {}
    lines = [f"GET {prefix}/props HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"Authorization: Bearer {key}" for key in keys[:1]]
    try:
        with _connect(scheme, place) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            with connection.makefile("rb") as file:
                reply = file.read()
        properties = json.loads(reply.partition(b"\r\n\r\n")[2])
        return {
            "n_ctx": properties["default_generation_settings"]["n_ctx"],
            "n_slots": properties["total_slots"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        # The model is served all the same.
        _say(f"warning: the server didn't tell its slots: {error!r}", sys.stderr)
        return {}


def _connect(scheme: str, place: str) -> socket.socket:
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(place)
        return connection
    host, _, port = place.rpartition(":")
    host = host.strip("[]")
    # A server on all addresses is asked on the loopback one.
    return socket.create_connection(({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), int(port)), 10)


def _say(line: str, stream: Any = None) -> None:
    # A pipe that nobody reads any more is no reason to stop: the parent watch decides that.
    with contextlib.suppress(BrokenPipeError):
        print(line, file=stream or sys.stdout, flush=True)


def _leave(code: int) -> NoReturn:
    """End without the interpreter's tear-down, which would wait for llama.cpp's threads."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
