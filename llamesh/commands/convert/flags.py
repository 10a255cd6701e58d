"""Arguments of llama-server as others write them, taken apart for a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from llamesh.commands.convert.recipe import Recipe
from llamesh.config.model_names import BadName, check_file, split_repo
from llamesh.local.engine.flag import Flag
from llamesh.local.engine.refused import REFUSED
from llamesh.local.engine.table import FLAGS

#: Every spelling that is known, and the row that it belongs to.
KNOWN: dict[str, Flag] = {name: flag for flag in FLAGS for name in flag.names}

_MODEL = frozenset({"-m", "--model"})
_REPO = frozenset({"-hf", "-hfr", "--hf-repo"})
_REPO_FILE = frozenset({"-hff", "--hf-file"})
_PLACE = frozenset({"--host", "--port"})
_SLEEP = frozenset({"--sleep-idle-seconds"})
_KEY = frozenset({"--api-key"})

# Flags with a value that would make an instance unreachable for its node.
_APART = {
    "--api-prefix": "instances are asked at their usual paths",
    "--api-key-file": "the node has to know the key: --api-key KEY",
    "--ssl-key-file": "instances listen on this machine only; see server_tls in config.yaml",
    "--ssl-cert-file": "instances listen on this machine only; see server_tls in config.yaml",
    "--models-dir": "see models_dir in config.yaml",
    "--models-preset": "it names further models: import that file, too",
    "--models-max": "see max_instances_per_node in config.yaml",
}
_APART_SWITCHES = {
    "--models-autoload": "models are always loaded when they are asked for",
    "--no-models-autoload": "models are always loaded when they are asked for",
    "--reuse-port": "every instance has a port of its own",
}
# What may be written with `=` by mistake, and would be read otherwise here.
_SPLIT = _MODEL | _REPO | _REPO_FILE | _PLACE | _SLEEP | _KEY | {"--ctx-size", "--parallel", "--fit"}


def canonical(word: str) -> str:
    """llama-server takes --hf_repo for --hf-repo."""
    return word.replace("_", "-") if word.startswith("--") else word


def takes_value(name: str) -> bool | None:
    """Whether a flag is followed by a value; None when it isn't known."""
    flag = KNOWN.get(name)
    if flag is not None:
        return flag.convert is not None
    if name in _REPO | _REPO_FILE | _PLACE | _KEY | _APART.keys() or name in ("-mu", "--model-url"):
        return True
    return None


def is_known(name: str) -> bool:
    """Whether llama-server has a flag of this spelling, as far as is known here."""
    return name in KNOWN or name in REFUSED or takes_value(name) is not None or name in _APART_SWITCHES


def take_arguments(recipe: Recipe, words: Sequence[str]) -> None:
    """Sort the words after the program's name into the recipe: sources into keys of their own, what the node
    decides itself away, the rest into its arguments."""
    rest = list(_without_equals(words))
    while rest:
        word = rest.pop(0)
        name = canonical(word)
        if name in _APART_SWITCHES:
            recipe.notes.append(f"{name} was left out: {_APART_SWITCHES[name]}")
            continue
        if name not in _MODEL | _REPO | _REPO_FILE | _PLACE | _SLEEP | _KEY and name not in _APART:
            recipe.words.append(word)
            if takes_value(name) and rest:
                recipe.words.append(rest.pop(0))
            continue
        if not rest:
            recipe.notes.append(f"{name} was left out: it has no value")
            return
        _take(recipe, name, word, rest.pop(0))


def _take(recipe: Recipe, name: str, word: str, value: str) -> None:
    if name in _PLACE:
        return  # the node picks them
    if name in _APART:
        recipe.notes.append(f"{name} was left out: {_APART[name]}")
    elif name in _SLEEP:
        if value.isdecimal() and int(value):
            recipe.keys["idle_timeout_seconds"] = int(value)
            recipe.notes.append(f"{name} {value} became idle_timeout_seconds")
    elif name in _KEY:
        if "," in value:
            recipe.notes.append(f"{name} was left out: only the node calls the instance, and with one key")
        else:
            recipe.words += [word, value]
    elif name in _MODEL:
        recipe.keys["model_path"] = value
        if not value.startswith(("/", "~")):
            recipe.notes.append("a relative model_path counts from the folder of this file")
    else:
        _take_from_hub(recipe, name, word, value)


def _take_from_hub(recipe: Recipe, name: str, word: str, value: str) -> None:
    key, check = ("hf_repo", split_repo) if name in _REPO else ("hf_file", check_file)
    try:
        check(value)
    except BadName:
        # llama-server may understand more than the cookbook does.
        recipe.words += [word, value]
    else:
        recipe.keys[key] = value


def settle_sources(recipe: Recipe) -> None:
    """One source remains: a path wins over a repository, as with llama-server."""
    if "model_path" in recipe.keys and "hf_repo" in recipe.keys:
        del recipe.keys["model_path"]
        recipe.notes.append("the model's path was left out: with a repository, it says where to store it")
    if "hf_repo" not in recipe.keys and (file := recipe.keys.pop("hf_file", None)) is not None:
        recipe.words += ["--hf-file", file]


def _without_equals(words: Sequence[str]) -> list[str]:
    split: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        split += [name, value] if equals and canonical(name) in _SPLIT else [word]
    return split
