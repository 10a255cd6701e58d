"""The command line: `llamesh --config PATH --cookbook PATH [--secrets PATH]` runs a node, and
`llamesh pause [TIME]` has a running one leave the machine to its owner."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import llamesh
from llamesh.model_commands import add_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node until it is told to end; the exit code: 0, or 1 for a bad file or a taken port."""
    options = _parser().parse_args(arguments)
    if (model_command := getattr(options, "model_command", None)) is not None:
        return int(model_command(options))
    if options.command is not None:
        return _tell(options)
    # Late: `--help` and a bad option are answered without importing the server.
    import trio

    from llamesh.config.problems import ConfigError
    from llamesh.config.settings import load_settings
    from llamesh.config.store import Files, Store
    from llamesh.local.launch import EngineNotFound, find_engine
    from llamesh.telemetry.logs import configure

    config, secrets = options.config or Path("config.yaml"), options.secrets or Path("secrets.yaml")
    try:
        if options.version:
            settings = load_settings(
                config,
                secrets,
                os.environ,
                required=options.config is not None,
                secrets_required=options.secrets is not None,
            )
            engine = trio.run(find_engine, settings.llama_cpp.binary_path)
            sys.stdout.write(f"llamesh {llamesh.__version__}, engine {engine.origin} {engine.version}\n")
            return 0
        files = Files(
            config,
            options.cookbook,
            secrets,
            config_required=options.config is not None,
            secrets_required=options.secrets is not None,
        )
        store = Store(files, os.environ)
        settings = store.current.settings
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
        return serve(store, engine)


def _tell(options: argparse.Namespace) -> int:
    """Do a command that talks to a running node."""
    from llamesh.command import pause
    from llamesh.config.problems import ConfigError
    from llamesh.config.settings import load_settings

    try:
        settings = load_settings(
            options.config or Path("config.yaml"),
            options.secrets or Path("secrets.yaml"),
            os.environ,
            required=options.config is not None,
            secrets_required=options.secrets is not None,
        )
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return pause(settings, options.time, os.environ)


def _seconds(text: str) -> float:
    from llamesh.command import pause_seconds

    return pause_seconds(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llamesh",
        description="Runs llama-server per model when a request needs it, behind one OpenAI API.",
        epilog="example: llamesh --config config.yaml --cookbook cookbook.yaml",
    )
    _add_files(parser)
    parser.add_argument(
        "--cookbook", type=Path, metavar="PATH", default=Path("cookbook.yaml"), help="models (%(default)s)"
    )
    parser.add_argument(
        "--version", action="store_true", help="print this program's and the engine's version"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    pause = commands.add_parser(
        "pause",
        help="leave the machine to its owner for a while",
        description="Has the node end its instances and take no requests. The node is the one of the "
        "configuration's listen_addr; a key comes from LLAMESH_API_KEY or from that configuration.",
    )
    pause.add_argument(
        "time",
        type=_seconds,
        nargs="?",
        metavar="TIME",
        help="how long: 90 (seconds), 30m, 2h; `off` ends it; nothing: until `off`",
    )
    add_commands(commands, _add_files)
    # After the command, too; what stands before it counts unless it is said again.
    _add_files(pause, default=argparse.SUPPRESS)
    return parser


def _add_files(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    options: tuple[tuple[str, str], ...] = (
        ("--config", "settings (default: config.yaml, if any)"),
        ("--secrets", "keys (default: secrets.yaml, if any)"),
    )
    for name, text in options:
        parser.add_argument(name, type=Path, metavar="PATH", default=default, help=text)


if __name__ == "__main__":
    sys.exit(main())
