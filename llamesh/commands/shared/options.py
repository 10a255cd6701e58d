"""Options that several commands have, and what they come to."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamesh.cli import FILE_WORDS, Command, file_option
from llamesh.commands.shared.failed import BadFiles

if TYPE_CHECKING:
    from llamesh.config.cookbook import Cookbook
    from llamesh.config.settings import Settings
    from llamesh.config.store import Files as StoredFiles

_USUAL = {"config": "config.yaml", "secrets": "secrets.yaml", "cookbook": "cookbook.yaml"}


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a node. One that was named must exist, as a cookbook must always."""

    config: Path = Path("config.yaml")
    secrets: Path = Path("secrets.yaml")
    cookbook: Path = Path("cookbook.yaml")
    config_required: bool = False
    secrets_required: bool = False

    @classmethod
    def named(cls, config: Path | None, secrets: Path | None, cookbook: Path | None = None) -> Files:
        """Those that the options name; None: the usual one."""
        given = {"config": config, "secrets": secrets, "cookbook": cookbook}
        paths = {name: path or Path(_USUAL[name]) for name, path in given.items()}
        return cls(**paths, config_required=config is not None, secrets_required=secrets is not None)

    def settings(self) -> Settings:
        """The configuration, as a node would read it. Raises BadFiles."""
        from llamesh.config.problems import ConfigError
        from llamesh.config.settings import load_settings

        try:
            return load_settings(
                self.config,
                self.secrets,
                os.environ,
                required=self.config_required,
                secrets_required=self.secrets_required,
            )
        except ConfigError as error:
            raise BadFiles(str(error)) from None

    def for_store(self) -> StoredFiles:
        """The same for `config.store`, which goes on looking at them."""
        from llamesh.config.store import Files as StoredFiles

        return StoredFiles(
            self.config, self.cookbook, self.secrets, self.config_required, self.secrets_required
        )

    def read(self) -> tuple[Settings, Cookbook]:
        """Configuration and cookbook, as a node would read them. Raises ConfigError."""
        from llamesh.config.check import load_files

        return load_files(
            self.config,
            self.cookbook,
            self.secrets,
            os.environ,
            config_required=self.config_required,
            secrets_required=self.secrets_required,
        )


def files_options(*, cookbook: bool = False) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """`--config`, `--secrets` and, where it is wanted, `--cookbook`; the function gets `files`."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        @wraps(function)
        def called(**given: Any) -> int:
            named = {name: given.pop(name, None) for name in _USUAL}
            return function(**given, files=Files.named(**named))

        result: Any = called
        for name in (*(("cookbook",) if cookbook else ()), "secrets", "config"):
            result = file_option(name, FILE_WORDS[name])(result)
        decorated: Callable[..., int] = result
        return decorated

    return decorate


def command(
    *examples: tuple[str, str], epilog: str | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """A command that its function's docstring explains; `examples` are lines and what they do."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        made = click.command(cls=Command, examples=examples, epilog=epilog)(function)
        assert isinstance(made, click.Command)  # noqa: S101
        return made

    return decorate


json_option = click.option("--json", "as_json", is_flag=True, help="print JSON")
