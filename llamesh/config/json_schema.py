"""JSON Schemas (draft 2020-12) of the files, for editors: made from the models that read them.

What a schema can't say, the loader still checks: rules between keys of different sections, names that
are there twice, quotes that don't close. So a file that an editor finds fine may be refused, but none
that is fine is marked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from llamesh.config.cookbook_schema import CookbookFile
from llamesh.config.descriptions import COOKBOOK, SETTINGS
from llamesh.config.settings import Settings
from llamesh.config.values import Address

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Name = Literal["config", "cookbook", "secrets"]

# How pydantic names limits where a check of ours stands before its own.
_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}

# No limit that anybody would come near.
_LARGEST = 2**53

_TITLES: dict[Name, tuple[str, str]] = {
    "config": (
        "llamesh: config.yaml",
        "Settings of a node. MB means MiB. A key without a value: its default.",
    ),
    "cookbook": ("llamesh: cookbook.yaml", "The models, and how each is run."),
    "secrets": (
        "llamesh: secrets.yaml",
        "Settings that nobody else should read: the keys of config.yaml, which these win over.",
    ),
}


def json_schema(name: Name) -> dict[str, Any]:
    """The schema of a file as plain data."""
    model: type[BaseModel] = CookbookFile if name == "cookbook" else Settings
    texts = COOKBOOK if name == "cookbook" else SETTINGS
    made = model.model_json_schema(mode="validation")
    root = _Maker(made.get("$defs", {}), texts).object(made, "")
    if name == "cookbook":
        _add_rules(root["properties"]["models"]["items"])
    title, description = _TITLES[name]
    # An empty file is a valid one.
    root |= {"type": ["object", "null"]}
    return {"$schema": DIALECT, "title": title, "description": description, **_without(root, "description")}


class _Maker:
    """Writes what the models are made of in place of references to it, so that each key has its own text."""

    def __init__(self, definitions: Mapping[str, Any], texts: Mapping[str, str]) -> None:
        self._definitions = definitions
        self._texts = texts

    def object(self, node: Mapping[str, Any], path: str) -> dict[str, Any]:
        """A section at a dotted path, "" for the whole file."""
        properties = {
            key: self._key(value, f"{path}.{key}" if path else key, key in node.get("required", ()))
            for key, value in node["properties"].items()
        }
        made: dict[str, Any] = {"type": "object", "additionalProperties": False, "properties": properties}
        if node.get("required"):
            made["required"] = list(node["required"])
        return made

    def _key(self, node: Mapping[str, Any], path: str, required: bool) -> dict[str, Any]:
        made = self._value(node, path)
        if not required:
            made = _or_nothing(made)  # a key without a value means its default
        default = node.get("default")
        if isinstance(default, dict) and set(default) == {"host", "port"}:
            default = str(Address(**default))
        if default is not None and "properties" not in made:
            made["default"] = default
        described = {"description": self._texts[path]} if path in self._texts else {}
        return {**described, **_without(made, "description")}

    def _value(self, node: Mapping[str, Any], path: str) -> dict[str, Any]:
        if (reference := node.get("$ref")) is not None:
            return self._value(self._definitions[reference.rpartition("/")[2]], path)
        if "properties" in node and "title" in node:
            return self.object(node, path)
        made = {
            _LIMITS.get(key, key): value for key, value in node.items() if key not in ("title", "default")
        }
        if made.get("maximum") == _LARGEST:
            del made["maximum"]
        if "anyOf" in made:
            choices = [self._value(choice, path) for choice in made["anyOf"]]
            made["anyOf"] = choices
            if len(choices) == 2 and choices[1] == {"type": "null"}:
                made = {**_without(made, "anyOf"), **_or_nothing(choices[0])}
        if "items" in made:
            made["items"] = self._value(made["items"], f"{path}[]")
        if "writeOnly" in made:
            # Editors hide such values, or call them an error in a file that is read.
            made = {"type": "string", "minLength": 1}
        return made


def _or_nothing(node: dict[str, Any]) -> dict[str, Any]:
    """The same, or no value."""
    kind = node.get("type")
    if "anyOf" in node:
        choices = node["anyOf"]
        return node if {"type": "null"} in choices else {**node, "anyOf": [*choices, {"type": "null"}]}
    if kind is None or kind == "null" or (isinstance(kind, list) and "null" in kind):
        return node
    made = {**node, "type": [*(kind if isinstance(kind, list) else [kind]), "null"]}
    if "enum" in made:
        made["enum"] = [*made["enum"], None]
    return made


def _add_rules(model: dict[str, Any]) -> None:
    """Of the cookbook: every model has a profile, and every profile says where its weights are."""
    model["required"] = ["name", "profiles"]
    profiles = model["properties"]["profiles"]
    profiles |= {"type": "array", "minItems": 1}
    profile = profiles["items"]
    profile["anyOf"] = [{"required": [key]} for key in ("model_path", "hf_repo", "url", "llama_server_args")]
    profile["allOf"] = [
        {"if": _says(key), "then": _says(with_it)}
        for key, with_it in (("hf_file", "hf_repo"), ("url", "sha256"), ("sha256", "url"))
    ]
    for node in (
        model["properties"]["name"],
        model["properties"]["aliases"]["items"],
        profile["properties"]["id"],
    ):
        node["pattern"] = "^[^:]+$"


def _says(key: str) -> dict[str, Any]:
    return {"required": [key], "properties": {key: {"type": "string"}}}


def _without(node: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != key}
