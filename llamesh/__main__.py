"""The command line: `llamesh --config PATH --cookbook PATH [--secrets PATH]` runs a node; `llamesh
pause [TIME]` has a running one leave the machine to its owner; `token`, `key`, `invite` and `join` make
several machines a mesh; `build` and `doctor` see to the engine."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import llamesh
from llamesh.model_commands import add_commands


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a node until it is told to end; the exit code: 0, or 1 for a bad file or a taken port."""
    options = _parser().parse_args(arguments)
    if (model_command := getattr(options, "model_command", None)) is not None:
        return int(model_command(options))
    if options.command is not None:
        return _command(options)
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
            wanted = settings.llama_cpp
            engine = trio.run(partial(find_engine, wanted.binary_path, will_be_built=wanted.enabled))
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


def _command(options: argparse.Namespace) -> int:
    """Do what isn't running a node; the exit code."""
    from llamesh.mesh.key_files import IdentityError

    try:
        return _join(options) if options.command == "join" else _with_settings(options)
    except IdentityError as error:
        sys.stderr.write(f"llamesh: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _join(options: argparse.Namespace) -> int:
    from llamesh.commands.join import Files, join

    files = Files(
        options.config or Path("config.yaml"),
        options.secrets or Path("secrets.yaml"),
        secrets_required=options.secrets is not None,
    )
    return join(options.line, files, os.environ, options.force)


def _with_settings(options: argparse.Namespace) -> int:
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
    match options.command:
        case "pause":
            from llamesh.command import pause

            return pause(settings, options.time, os.environ)
        case "invite":
            from llamesh.commands.invite import invite

            return invite(settings, os.environ)
        case "build":
            from llamesh.local.builds.terminal import Wanted, build

            wanted = Wanted(
                options.backend, options.repo_url, options.branch, options.prebuilt, options.force
            )
            return build(settings.llama_cpp, wanted, os.environ)
        case "doctor":
            from llamesh.local.builds.doctor import doctor

            return doctor(settings.llama_cpp, os.environ)
        case _:
            from llamesh.commands import keys

            show = keys.token if options.command == "token" else keys.key
            return show(settings, os.environ, options.rotate)


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
        help="have the running node leave the machine to its owner for a while",
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
    add_commands(commands)
    _add_mesh_commands(commands)
    _add_build_command(commands)
    # After the command, too; what stands before it counts unless it is said again.
    for command in commands.choices.values():
        _add_files(command, default=argparse.SUPPRESS)
    return parser


def _add_mesh_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    token = commands.add_parser(
        "token",
        help="print the cluster token, the secret that all nodes of a mesh share",
        description="Prints the cluster token, and makes one where there is none.",
    )
    key = commands.add_parser(
        "key",
        help="print this node's public key",
        description="Prints this node's public key as cluster.noise.allowed_keys of other nodes takes it.",
    )
    for command in (token, key):
        command.add_argument(
            "--rotate", action="store_true", help="make a new one; the former one is accepted for a while"
        )
    commands.add_parser(
        "invite",
        help="print one line that lets another machine join",
        description="Prints a line for `llamesh join`: where this node is, its public key, and the cluster "
        "token. The line is a secret.",
    )
    join = commands.add_parser(
        "join",
        help="make this machine's node a part of the mesh that an invitation comes from",
        description="Takes over the token and the key of an invitation, sets cluster.enabled and "
        "cluster.peers in the configuration, and looks whether the mesh can be reached. Exit code 3: all is "
        "set up, but nobody was reached.",
    )
    join.add_argument(
        "line", metavar="LINE", help="what `llamesh invite` printed; `-` asks for it or reads it"
    )
    join.add_argument("--force", action="store_true", help="replace another token or key that is here")


def _add_build_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = commands.add_parser(
        "build",
        help="build llama.cpp, test it, and have llama_cpp.binary_path lead to it",
        description="Builds llama.cpp as the section llama_cpp of the configuration says, tests it, and "
        "makes it the engine in one step; a node that runs takes it over. Prints the path of the engine. "
        "When anything goes wrong, the engine in use stays.",
    )
    backends = ("auto", "cpu", "cuda", "metal", "vulkan", "hip")
    build.add_argument(
        "--backend", choices=backends, help="what computes; auto: the best that can be built on this machine"
    )
    build.add_argument(
        "--repo-url", metavar="SOURCE", help="a git repository, or a folder or an archive with the source"
    )
    build.add_argument("--branch", metavar="NAME", help="a branch, a tag or a commit")
    build.add_argument(
        "--prebuilt",
        action="store_true",
        help="install a release of llama.cpp, checked by sha256, instead of compiling",
    )
    build.add_argument("--force", action="store_true", help="build even what is built already")
    commands.add_parser(
        "doctor",
        help="say how it stands with the engine on this machine",
        description="Says which engine is used, which GPUs it leaves unused, and what is missing to build "
        "another. Exit code 1 when something is wrong.",
    )


def _add_files(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    options: tuple[tuple[str, str], ...] = (
        ("--config", "settings (default: config.yaml, if any)"),
        ("--secrets", "keys (default: secrets.yaml, if any)"),
    )
    for name, text in options:
        parser.add_argument(name, type=Path, metavar="PATH", default=default, help=text)


if __name__ == "__main__":
    sys.exit(main())
