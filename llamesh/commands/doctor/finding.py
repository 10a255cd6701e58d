"""What the doctor sees, and whom it looks at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from llamesh.commands.shared.options import Files
from llamesh.config.cookbook import Cookbook
from llamesh.config.settings import Settings

#: `warn`: it works, but something may be missing; `bad`: it has to be mended.
Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `remedy`: what to do, "" where nothing is to be done. No secret is ever in it."""

    level: Level
    text: str
    remedy: str = ""


def ok(text: str, remedy: str = "") -> Finding:
    return Finding("ok", text, remedy)


def warn(text: str, remedy: str = "") -> Finding:
    return Finding("warn", text, remedy)


def bad(text: str, remedy: str = "") -> Finding:
    return Finding("bad", text, remedy)


@dataclass(frozen=True, slots=True)
class Patient:
    """What is looked at. `settings` and `cookbook` are None where their files can't be read, `mistakes` are
    what is wrong with those; `version`: of the node that answers at listen_addr, "" where none does; `state`:
    its state document, empty where it isn't to be had. `root` is where /etc, /proc, /run and /sys are.
    """

    files: Files
    environ: Mapping[str, str]
    settings: Settings | None = None
    cookbook: Cookbook | None = None
    mistakes: tuple[str, ...] = ()
    version: str = ""
    state: Mapping[str, Any] = field(default_factory=dict)
    root: Path = Path("/")

    @property
    def runs(self) -> bool:
        """Whether a node of these settings runs."""
        return bool(self.version)
