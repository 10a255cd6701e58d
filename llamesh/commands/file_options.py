"""The options that say which files are meant, and the files behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_PATH = click.Path(path_type=Path)


@dataclass(frozen=True, slots=True)
class FilePaths:
    """What the options say. None: the file of its usual name, if there is one."""

    config: Path | None = None
    secrets: Path | None = None
    cookbook: Path = Path("cookbook.yaml")

    @property
    def config_file(self) -> Path:
        return self.config or Path("config.yaml")

    @property
    def secrets_file(self) -> Path:
        return self.secrets or Path("secrets.yaml")


def file_options(command: F) -> F:
    """--config, --secrets and --cookbook with the program's defaults, as parameters of these names."""
    for name, text in (
        ("--cookbook", "Models (default: cookbook.yaml)."),
        ("--secrets", "Keys (default: secrets.yaml, if any)."),
        ("--config", "Settings (default: config.yaml, if any)."),
    ):
        default = Path("cookbook.yaml") if name == "--cookbook" else None
        command = click.option(name, type=_PATH, metavar="PATH", default=default, help=text)(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
