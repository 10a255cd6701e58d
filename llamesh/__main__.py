"""`llamesh --config PATH --cookbook PATH [--secrets PATH]` runs a node; `llamesh COMMAND` does something
else, see `llamesh.cli`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import llamesh
from llamesh.cli import command_line, run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node until it is told to end, or a command; the exit code."""
    return run(command_line(run_node), arguments)


def run_node(config: Path | None, cookbook: Path, secrets: Path | None, version: bool) -> int:
    """Run a node, or only print versions. The exit code: 0, or 1 for a bad file or a taken port.

    None: that file has its usual name, and may be missing.
    """
    # Late: commands, `--help` and a bad option are answered without importing the server.
    import trio

    from llamesh.config.problems import ConfigError
    from llamesh.config.settings import load_settings
    from llamesh.config.store import Files, Store
    from llamesh.local.launch import EngineNotFound, find_engine
    from llamesh.telemetry.logs import configure

    config_path, secrets_path = config or Path("config.yaml"), secrets or Path("secrets.yaml")
    required = {"config_required": config is not None, "secrets_required": secrets is not None}
    try:
        if version:
            settings = load_settings(
                config_path,
                secrets_path,
                os.environ,
                required=config is not None,
                secrets_required=secrets is not None,
            )
            wanted = settings.llama_cpp
            engine = trio.run(partial(find_engine, wanted.binary_path, will_be_built=wanted.enabled))
            sys.stdout.write(f"llamesh {llamesh.__version__}, engine {engine.origin} {engine.version}\n")
            return 0
        store = Store(Files(config_path, cookbook, secrets_path, **required), os.environ)
        settings = store.current.settings
        wanted = settings.llama_cpp
        engine = trio.run(partial(find_engine, wanted.binary_path, will_be_built=wanted.enabled))
    except (ConfigError, EngineNotFound) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    from llamesh.node import serve

    try:
        log_writer = configure(settings.logging)
    except OSError as error:
        sys.stderr.write(f"llamesh: logging.directory {settings.logging.directory} can't be used: {error}\n")
        return 1
    with log_writer:
        return serve(store, engine)


if __name__ == "__main__":
    sys.exit(main())
