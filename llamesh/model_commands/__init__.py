"""Commands about models on this machine: `llamesh init`, `add`, `pull`, `models`, `rm`.

They work on the files (configuration, cookbook, cache), whether a node runs or not; one that runs takes
a changed cookbook in by itself. Exit codes: 0 when it is done, 1 with the reason on stderr, 2 for a
bad command line.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

# argparse's own, which has no public name.
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_MODEL = "OWNER/NAME[:QUANTISATION] on the hub, or the path of a GGUF file, or an https address"


def add_commands(commands: _Commands) -> None:
    """Add the commands to `llamesh`'s, which gives each of them --config and --secrets.

    The parsed options have `model_command`: call it with them, and it returns the exit code.
    """
    init = _parser(commands, "init", "write config.yaml and cookbook.yaml for this machine", _init)
    init.add_argument("model", nargs="?", metavar="MODEL", help=f"a first model: {_MODEL}")
    init.add_argument("--models-dir", type=Path, metavar="PATH", help="serve every GGUF file in this folder")
    _about_profile(init)

    add = _parser(commands, "add", "add a model to the cookbook", _add)
    add.add_argument("model", metavar="MODEL", help=_MODEL)
    _about_profile(add)

    pull = _parser(commands, "pull", "fetch the weights of models now", _pull)
    pull.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="OWNER/NAME[:QUANTISATION], or a model of the cookbook; nothing: all of the cookbook",
    )

    models = _parser(commands, "models", "show which models are on this disk", _models)
    models.add_argument("--hash", action="store_true", help="work out hashes that aren't known yet")
    models.add_argument("--json", action="store_true", help="print JSON")

    rm = _parser(commands, "rm", "remove downloaded weights from this disk", _rm)
    rm.add_argument(
        "models", nargs="+", metavar="MODEL", help="as `llamesh models` names it, or of the cookbook"
    )
    rm.add_argument("-y", "--yes", action="store_true", help="don't ask")


def _parser(
    commands: _Commands,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    parser.add_argument(
        "--cookbook", type=Path, metavar="PATH", default=argparse.SUPPRESS, help="models (cookbook.yaml)"
    )
    parser.set_defaults(model_command=run)
    return parser


def _about_profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", help="what clients ask for (default: from the name of the model)")
    parser.add_argument(
        "--file", metavar="NAME", help="the file of the repository, instead of a quantisation"
    )
    parser.add_argument("--sha256", metavar="HEX", help="of the file at an address; needed there")
    parser.add_argument("--args", metavar="FLAGS", help="llama_server_args, in one word: --args='-c 8192'")
    parser.add_argument("--no-check", action="store_true", help="don't ask the hub whether it is there")


# Each imports its part when it is called: `llamesh --help` needs none of them.


def _init(options: argparse.Namespace) -> int:
    from llamesh.model_commands.init import init

    return init(options)


def _add(options: argparse.Namespace) -> int:
    from llamesh.model_commands.add import add

    return add(options)


def _pull(options: argparse.Namespace) -> int:
    from llamesh.model_commands.pull import pull

    return pull(options)


def _models(options: argparse.Namespace) -> int:
    from llamesh.model_commands.shelf import models

    return models(options)


def _rm(options: argparse.Namespace) -> int:
    from llamesh.model_commands.shelf import remove

    return remove(options)
