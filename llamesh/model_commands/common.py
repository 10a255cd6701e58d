"""What the commands share: words on the terminal, and the files of a node."""

from __future__ import annotations

import argparse
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from llamesh.config.check import load_files
from llamesh.config.cookbook import Cookbook, HubFile, ModelPath, Source, UrlFile
from llamesh.config.model_names import BadName, check_file, check_sha256, check_url, file_of_url, split_repo
from llamesh.config.settings import Settings
from llamesh.core.model_files import later_part, part_names


class Failed(Exception):
    """The command can't be done; the message says why, and what to do."""


def say(words: str) -> None:
    """To the one who called the command."""
    sys.stdout.write(f"{words}\n")


def fail(reason: object) -> int:
    """Say why not; the exit code."""
    sys.stderr.write(f"llamesh: {reason}\n")
    return 1


def cookbook_path(options: argparse.Namespace) -> Path:
    """Of the cookbook that is meant."""
    return Path(options.cookbook)


def read_files(options: argparse.Namespace) -> tuple[Settings, Cookbook]:
    """Configuration and cookbook, as a node would read them. Raises ConfigError."""
    return load_files(
        options.config or Path("config.yaml"),
        cookbook_path(options),
        options.secrets or Path("secrets.yaml"),
        os.environ,
        config_required=options.config is not None,
        secrets_required=options.secrets is not None,
    )


@dataclass(frozen=True, slots=True)
class Named:
    """A model as somebody named it, and what it may be called."""

    source: Source
    name: str


def read_model(text: str, *, file: str | None = None, sha256: str | None = None) -> Named:
    """What MODEL on a command line means. A path becomes absolute. Raises Failed."""
    try:
        if "://" in text:
            if sha256 is None:
                raise Failed("an address needs --sha256: what `sha256sum` says of the file")
            url = check_url(text)
            return Named(UrlFile(url, check_sha256(sha256)), _name_of_file(file_of_url(url)))
        if _looks_like_a_path(text):
            return _path(text)
        repo, _ = split_repo(text)
        if file is not None:
            check_file(file)
        return Named(HubFile(text, file), _name_of_repo(repo))
    except BadName as error:
        raise Failed(str(error)) from None


def _looks_like_a_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.lower().endswith(".gguf") or os.path.exists(text)


def _path(text: str) -> Named:
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise Failed(f"there is no file {path}")
    if later_part(path.name):
        raise Failed(f"{path.name} isn't the first part of its model: name {part_names(path.name)[0]}")
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise Failed(f"{path} isn't a GGUF file")
    return Named(ModelPath(str(path)), _name_of_file(path.name))


def _name_of_repo(repo: str) -> str:
    return _plain(re.sub(r"[-_.]gguf$", "", repo.partition("/")[2], flags=re.IGNORECASE))


def _name_of_file(name: str) -> str:
    stem = re.sub(r"\.gguf$", "", name, flags=re.IGNORECASE)
    return _plain(re.sub(r"-\d{5}-of-\d{5}$", "", stem))


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+@-]+", "-", name).strip("-.").lower() or "model"
