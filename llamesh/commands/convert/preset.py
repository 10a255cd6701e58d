"""Presets of llama.cpp's router (`llama-server --models-preset FILE`) as recipes.

An INI file: a section for each model, `[*]` for what holds in all of them, keys that are llama-server's
flags without their dashes (`ctx-size`, `c`) or its environment variables (`LLAMA_ARG_CTX_SIZE`), and
`true` and `false` for flags that are there or not. Two keys are the router's own: load-on-startup and
stop-timeout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from llamesh.commands.convert.flags import KNOWN, is_known, settle_sources, take_arguments, takes_value
from llamesh.commands.convert.recipe import Converted, Recipe, split_name
from llamesh.config.model_names import BadName, split_repo
from llamesh.local.engine.flag import Flag
from llamesh.local.engine.refused import REFUSED

_SECTION = re.compile(r"\[(.*)\]")
_VARIABLE = "LLAMA_ARG_"

_TRUE = frozenset({"true", "1", "on", "enabled", "yes"})
_FALSE = frozenset({"false", "0", "off", "disabled", "no"})

# Variables whose flag isn't simply spelled like them.
_VARIABLES = {
    "N_PARALLEL": "parallel",
    "BATCH": "batch-size",
    "UBATCH": "ubatch-size",
    "ENDPOINT_METRICS": "metrics",
    "ENDPOINT_PROPS": "props",
    "ENDPOINT_SLOTS": "slots",
    "MODEL_DRAFT": "model-draft",
    "DEFRAG_THOLD": "defrag-thold",
}
_ALIAS = frozenset({"-a", "--alias"})


@dataclass(slots=True)
class Section:
    """A section's keys with the lines they stand in; the last one of a key counts."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)


class NotAPreset(ValueError):
    """The text isn't such a file. The message names the line."""


def looks_like_preset(text: str) -> bool:
    """Whether the first line that says something is a section or `key = value`."""
    for line in _lines(text):
        return bool(_SECTION.fullmatch(line[1]) or re.match(r"[\w-]+\s*=", line[1]))
    return False


def read(text: str) -> list[Section]:
    """The sections in their order; the first has no name and what stands before all others."""
    sections = [Section("")]
    for number, line in _lines(text):
        if (found := _SECTION.fullmatch(line)) is not None:
            sections.append(Section(found[1].strip()))
            continue
        key, equals, value = line.partition("=")
        if not equals or not key.strip():
            raise NotAPreset(f"line {number} is neither [section] nor key = value")
        sections[-1].keys[key.strip()] = value.strip()
    return sections


def _lines(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if (plain := line.strip().lstrip("\N{ZERO WIDTH NO-BREAK SPACE}")) and not plain.startswith(
            (";", "#")
        ):
            yield number, plain


def convert(sections: list[Section]) -> Converted:
    """Every section that can be taken over."""
    made = Converted()
    common: dict[str, str] = {}
    for section in sections:
        if section.name == "":
            _note_head(made, section)
        elif section.name == "*":
            common |= section.keys
    for section in sections:
        if section.name not in ("", "*"):
            _convert_section(made, section, common)
    made.notes.append("a router keeps --models-max models loaded; llamesh as many as fit in memory")
    return made


def _note_head(made: Converted, section: Section) -> None:
    for key, value in section.keys.items():
        if key == "version" and value != "1":
            made.notes.append(f"version {value[:20]!r} isn't known; it was read like version 1")
        elif key != "version":
            made.notes.append(f"{key} stands before all sections and was left out")


def _convert_section(made: Converted, section: Section, common: Mapping[str, str]) -> None:
    title, profile, note = split_name(section.name)
    recipe = Recipe(title, profile)
    recipe.notes += [note] if note else []
    words: list[str] = []
    for key, value in _laid_over(common, section.keys).items():
        words += _words(recipe, key, value)
    recipe.keys["idle_timeout_seconds"] = 0  # a router doesn't stop a model for being idle
    take_arguments(recipe, words)
    settle_sources(recipe)
    if not recipe.has_source and not any(canonical in _OWN_SOURCES for canonical in recipe.words):
        try:
            split_repo(section.name)
        except BadName:
            made.leave_out(
                section.name,
                "it names neither a file nor a repository: is it one of the router's --models-dir? then set "
                "models_dir in config.yaml",
            )
            return
        recipe.keys["hf_repo"] = section.name
    made.take(recipe)


# Sources that stay among the arguments.
_OWN_SOURCES = frozenset({"-mu", "--model-url", "-dr", "--docker-repo", "-hf", "-hfr", "--hf-repo"})


def _laid_over(common: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The section's keys over those of all sections, whichever of its spellings a flag has."""
    said = {_meaning(key) for key in own}
    return {key: value for key, value in common.items() if _meaning(key) not in said} | dict(own)


def _meaning(key: str) -> object:
    spelling = _spelling(key)
    flag: Flag | None = KNOWN.get(spelling)
    if flag is None:
        return spelling
    # The two flags of a pair (--mmap, --no-mmap) set the same field.
    return flag.paths or flag.names


def _spelling(key: str) -> str:
    """The flag of a key, as llama-server spells it."""
    if key.startswith(_VARIABLE):
        word = key.removeprefix(_VARIABLE)
        key = _VARIABLES.get(word, word.lower())
    key = key.lstrip("-").replace("_", "-")
    long, short = f"--{key}", f"-{key}"
    if not is_known(long) and is_known(short):
        return short
    return short if len(key) == 1 else long


def _words(recipe: Recipe, key: str, value: str) -> list[str]:
    """The arguments that a key and its value stand for."""
    if key == "load-on-startup":
        if value.lower() in _TRUE:
            recipe.notes.append(
                f"load-on-startup: `min_instances: 1` keeps it loaded, `llamesh prewarm {recipe.name}` loads "
                "it once"
            )
        return []
    if key == "stop-timeout":
        recipe.notes.append("stop-timeout was left out: see shutdown_grace_period_seconds in config.yaml")
        return []
    flag, folded = _spelling(key), value.lower()
    if flag in _ALIAS:
        recipe.aliases += [part.strip() for part in value.split(",") if part.strip()]
        return []
    if flag == "--tags":
        recipe.notes.append("tags were left out: there is no place for them")
        return []
    valued = takes_value(flag)
    if valued is None and flag in REFUSED:
        valued = folded not in ("true", "false")
    if valued is None:
        recipe.notes.append(f"{key} isn't a flag that is known here; it became {flag}")
        valued = folded not in ("true", "false")
    if valued:
        return [flag, value]
    if folded in _TRUE or not value:
        return [flag]
    if folded not in _FALSE:
        recipe.notes.append(f"{key} was left out: it takes true or false")
        return []
    opposite = f"--{flag[5:]}" if flag.startswith("--no-") else f"--no-{flag.lstrip('-')}"
    return [opposite] if opposite in KNOWN else []
