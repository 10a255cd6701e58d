"""A cookbook as text, with comments where something couldn't be taken over."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from llamesh.commands.convert.recipe import Converted, Recipe

_WIDTH = 100
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./+-]*")
_PLAIN_ARGUMENTS = re.compile(r"--?[A-Za-z][A-Za-z0-9_./=,+ -]*")
# What YAML of some version takes for something else than text.
_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "y", "n", "null", "nan", "inf"})


def cookbook_text(made: Converted, origin: str) -> str:
    """The cookbook. `origin` says where it comes from."""
    lines = [*comment(f"Made by `llamesh import` from {origin}. Look it over: `llamesh check`."), "#"]
    for note in made.notes:
        lines += comment(f"- {note}")
    for left in made.left_out:
        lines += comment(f"- {left.name} was left out: {left.reason}")
    if lines[-1] == "#":
        lines.pop()
    lines.append("")
    lines.append("models:" if made.recipes else "models: []")
    for name in dict.fromkeys(recipe.model.casefold() for recipe in made.recipes):
        lines += _model([recipe for recipe in made.recipes if recipe.model.casefold() == name])
    return "\n".join(lines) + "\n"


def config_text(made: Converted, origin: str) -> str:
    """What follows for config.yaml."""
    lines = comment(f"Made by `llamesh import` from {origin}; everything else has a default.")
    for note in made.config_notes:
        lines += comment(note)
    for section, keys in made.config.items():
        lines.append(f"{section}:")
        lines += [f"  {key}: {scalar(value)}" for key, value in keys.items()]
    if not made.config:
        lines.append("{}")
    return "\n".join(lines) + "\n"


def _model(recipes: list[Recipe]) -> Iterator[str]:
    first = recipes[0]
    yield f"  - name: {scalar(first.model)}"
    aliases = [alias for recipe in recipes for alias in recipe.aliases]
    if aliases:
        yield f"    aliases: [{', '.join(scalar(alias) for alias in aliases)}]"
    yield "    profiles:"
    for recipe in recipes:
        yield from _profile(recipe)


def _profile(recipe: Recipe) -> Iterator[str]:
    for note in recipe.notes:
        yield from comment(note, indent=6)
    lead = "      - "
    for key, value in recipe.profile().items():
        yield f"{lead}{key}: {arguments(value) if key == 'llama_server_args' else scalar(value)}"
        lead = "        "


def comment(text: str, indent: int = 0) -> list[str]:
    """The text as lines of a comment."""
    margin = " " * indent
    plain = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    wrapper = textwrap.TextWrapper(
        _WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}#   ", break_on_hyphens=False
    )
    return wrapper.wrap(plain) or [f"{margin}#"]


def arguments(text: str) -> str:
    """Arguments for a shell, quoted for YAML if they have to be."""
    if _PLAIN_ARGUMENTS.fullmatch(text) and not text.endswith(" "):
        return text
    if "'" not in text and text.isprintable():
        return f"'{text}'"
    return _quoted(text)


def scalar(value: Any) -> str:
    """A value on one line of YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(int(value) if value == int(value) else value)
    text = str(value)
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else _quoted(text)


def _quoted(text: str) -> str:
    """In double quotes, as YAML 1.2 (7.3.1) escapes."""
    return '"' + "".join(_escaped(text)) + '"'


def _escaped(text: Iterable[str]) -> Iterator[str]:
    for letter in text:
        code = ord(letter)
        if letter in '"\\':
            yield "\\" + letter
        elif letter.isprintable():
            yield letter
        else:
            yield f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
