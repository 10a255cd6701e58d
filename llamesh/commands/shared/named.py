"""A model as somebody names it on the command line: on the hub, at an address, or a file."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from llamesh.commands.shared.failed import Failed
from llamesh.config.cookbook import HubFile, ModelPath, Source, UrlFile
from llamesh.config.model_names import BadName, check_file, check_sha256, check_url, file_of_url, split_repo
from llamesh.core.model_files import later_part, part_names

MODEL_WORDS = "OWNER/NAME[:QUANTISATION] on the hub, the path of a GGUF file, or an https address"


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the options say of a new model. name: what clients ask for; file: of the repository; check: ask
    the hub whether it is there.
    """

    name: str | None = None
    file: str | None = None
    sha256: str | None = None
    args: str = ""
    check: bool = True


def wishes_options(function: Any) -> Any:
    """The options of a new model; the function gets `wishes`."""

    @wraps(function)
    def called(**given: Any) -> Any:
        taken = {name: given.pop(name) for name in ("name", "file", "sha256")}
        wishes = Wishes(**taken, args=given.pop("args") or "", check=not given.pop("no_check"))
        return function(**given, wishes=wishes)

    decorated: Any = called
    for option in (
        click.option("--no-check", is_flag=True, help="don't ask the hub whether it is there"),
        click.option("--args", metavar="FLAGS", help="llama_server_args, in one word: --args='-c 8192'"),
        click.option("--sha256", metavar="HEX", help="of the file at an address; needed there"),
        click.option("--file", metavar="NAME", help="the file of the repository, instead of a quantisation"),
        click.option("--name", help="what clients ask for (default: from the name of the model)"),
    ):
        decorated = option(decorated)
    return decorated


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
