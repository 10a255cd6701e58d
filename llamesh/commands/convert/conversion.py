"""From a file to a cookbook: read, recognise, convert, check, write, report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from llamesh.commands.convert import llama_swap, preset
from llamesh.commands.convert.recipe import Converted
from llamesh.commands.convert.render import config_text, cookbook_text
from llamesh.commands.shared import exit_codes
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.saying import aside, out
from llamesh.commands.shared.words import one_line
from llamesh.config.cookbook import parse_cookbook
from llamesh.config.problems import ConfigError
from llamesh.config.yaml_source import MAX_BYTES, parse_yaml

Kind = Literal["llama-swap", "llama.cpp"]


class CannotImport(Exception):
    """Why nothing comes of a file."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where the results go (None: the cookbook to stdout, the settings nowhere), and how it is told."""

    output: Path | None = None
    config_output: Path | None = None
    force: bool = False
    as_json: bool = False


def import_file(file: Path, kind: Kind | None, wanted: Wanted) -> int:
    """Convert, write and report; the exit code."""
    try:
        text = _read(file)
        kind = kind or kind_of(text, file)
        made = convert(text, kind, file, os.environ)
        origin = f"{file.name} ({kind})"
        cookbook, config = cookbook_text(made, origin), config_text(made, origin)
        _must_load(cookbook)
        files = [
            (path, text) for path, text in ((wanted.output, cookbook), (wanted.config_output, config)) if path
        ]
        for path, _ in files if not wanted.force else ():
            if os.path.lexists(path):
                raise CannotImport(f"{path} is there already; --force overwrites it")
        for path, content in files if made.recipes else ():
            _write(path, content, wanted.force)
    except (CannotImport, ConfigError) as error:
        raise Failed(str(error)) from None
    if wanted.as_json:
        out(json.dumps({"from": kind, "cookbook": cookbook, "config": config, **_report(made)}, indent=1))
    else:
        if wanted.output is None:
            out(cookbook.rstrip("\n"))
        _say(made)
    return exit_codes.OK if made.recipes else exit_codes.FAILED


def kind_of(text: str, file: Path) -> Kind:
    """Which of the two it is. Raises CannotImport, or ConfigError when it is neither YAML nor a preset."""
    if preset.looks_like_preset(text):
        return "llama.cpp"
    data = parse_yaml(text, str(file)).data
    if llama_swap.looks_like_llama_swap(data):
        return "llama-swap"
    if isinstance(data, dict) and isinstance(data.get("models"), list):
        raise CannotImport(f"{file} is a cookbook already, or something like it: its models are a list")
    raise CannotImport(
        f"{file} is neither llama-swap's YAML (models: ...) nor a preset ([model], key = value)"
    )


def convert(text: str, kind: Kind, file: Path, environ: Mapping[str, str]) -> Converted:
    """What the text becomes. Raises CannotImport or ConfigError."""
    if kind == "llama.cpp":
        try:
            return preset.convert(preset.read(text))
        except preset.NotAPreset as error:
            raise CannotImport(f"{file}: {error}") from None
    data = parse_yaml(text, str(file)).data
    if not llama_swap.looks_like_llama_swap(data):
        raise CannotImport(f"{file} has no `models:` with an id for each")
    return llama_swap.convert(data, environ)


def _must_load(text: str) -> None:
    """Whatever was written is read again before anybody gets it."""
    try:
        parse_cookbook(parse_yaml(text, "the cookbook that was made"), Path("/"))
    except ConfigError as error:
        raise CannotImport(f"this would make no cookbook that can be used:\n{error}") from None


def _read(file: Path) -> str:
    try:
        with file.open("rb") as source:
            raw = source.read(MAX_BYTES + 1)
    except OSError as error:
        raise CannotImport(f"{file} can't be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise CannotImport(f"{file} is larger than {MAX_BYTES // 1024} KiB; is it the right file?")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CannotImport(f"{file} isn't UTF-8 text") from None


def _write(path: Path, text: str, force: bool) -> None:
    try:
        # Arguments may hold keys of instances.
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if force else os.O_EXCL)
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise CannotImport(f"{path} is there already; --force overwrites it") from None
    except OSError as error:
        raise CannotImport(f"{path} can't be written: {error.strerror}") from None


def _report(made: Converted) -> dict[str, object]:
    return {
        "taken": [{"name": one.name, "aliases": one.aliases, "notes": one.notes} for one in made.recipes],
        "left_out": [asdict(one) for one in made.left_out],
        "notes": made.notes,
    }


def _say(made: Converted) -> None:
    aside(f"{len(made.recipes)} taken over, {len(made.left_out)} left out")
    for note in made.notes:
        aside(one_line(f"note: {note}"))
    for recipe in made.recipes:
        for note in recipe.notes:
            aside(one_line(f"{recipe.name}: {note}"))
    for left in made.left_out:
        aside(one_line(f"left out: {left.name}: {left.reason}"))
