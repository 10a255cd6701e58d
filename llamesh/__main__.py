"""The command line: `llamesh --config PATH --cookbook PATH [--secrets PATH]` runs a node."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import llamesh


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node until it is told to end; the exit code: 0, or 1 for a bad file or a taken port."""
    options = _parser().parse_args(arguments)
    # Late: `--help` and a bad option are answered without importing the server.
    import trio

    from llamesh.config.check import load_files
    from llamesh.config.problems import ConfigError
    from llamesh.config.settings import load_settings
    from llamesh.local.launch import EngineNotFound, find_engine
    from llamesh.telemetry.logs import configure

    config, secrets = options.config or Path("config.yaml"), options.secrets or Path("secrets.yaml")
    needed = {"secrets_required": options.secrets is not None}
    try:
        if options.version:
            settings = load_settings(
                config, secrets, os.environ, required=options.config is not None, **needed
            )
            engine = trio.run(find_engine, settings.llama_cpp.binary_path)
            sys.stdout.write(f"llamesh {llamesh.__version__}, engine {engine.origin} {engine.version}\n")
            return 0
        settings, cookbook = load_files(
            config,
            options.cookbook,
            secrets,
            os.environ,
            config_required=options.config is not None,
            **needed,
        )
        engine = trio.run(find_engine, settings.llama_cpp.binary_path)
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
        return serve(settings, cookbook, engine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamesh",
        description="Runs llama-server per model when a request needs it, behind one OpenAI API.",
        epilog="example: llamesh --config config.yaml --cookbook cookbook.yaml",
    )
    parser.add_argument("--config", type=Path, metavar="PATH", help="settings (default: config.yaml, if any)")
    parser.add_argument(
        "--cookbook", type=Path, metavar="PATH", default=Path("cookbook.yaml"), help="models (%(default)s)"
    )
    parser.add_argument("--secrets", type=Path, metavar="PATH", help="keys (default: secrets.yaml, if any)")
    parser.add_argument(
        "--version", action="store_true", help="print this program's and the engine's version"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
