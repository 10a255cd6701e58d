"""The schemas for editors: true about the files, and as strict as the loader where they can be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.cookbook import parse_cookbook
from llamesh.config.cookbook_schema import CookbookFile, ProfileEntry
from llamesh.config.descriptions import COOKBOOK, SETTINGS
from llamesh.config.json_schema import Name, json_schema
from llamesh.config.problems import ConfigError
from llamesh.config.schema import keys_of
from llamesh.config.settings import Settings
from llamesh.config.yaml_source import Document, read_yaml

ROOT = Path(__file__).parents[2]
NAMES: tuple[Name, ...] = ("config", "cookbook", "secrets")


def validator(name: Name) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json_schema(name))


def errors(name: Name, data: Any) -> list[str]:
    return [error.json_path for error in validator(name).iter_errors(data)]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_schema(name: Name) -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema(name))
    assert "$ref" not in str(json_schema(name))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("config", "config.example.yaml"),
        ("secrets", "config.example.yaml"),
        ("cookbook", "cookbook.example.yaml"),
        ("config", "deploy/etc/config.yaml"),
        ("cookbook", "deploy/etc/cookbook.yaml"),
        ("secrets", "deploy/etc/secrets.yaml"),
    ],
)
def test_the_examples_are_fine(name: Name, path: str) -> None:
    assert errors(name, read_yaml(ROOT / path).data) == []


def test_every_key_is_described_and_no_other() -> None:
    assert set(SETTINGS) == set(keys_of(Settings))
    assert set(COOKBOOK) == set(keys_of(CookbookFile))
    for name, model in (("config", Settings), ("cookbook", CookbookFile)):
        for key in keys_of(model):
            node: Any = json_schema(name)
            for part in key.split("."):
                word = part.removesuffix("[]")
                node = node["properties"][word]
                found = node
                node = node.get("items", node) if part.endswith("[]") else node
                node = next((one for one in node.get("anyOf", ()) if "properties" in one), node)
            assert found["description"], key


def test_units_are_said() -> None:
    for key, text in {**SETTINGS, **COOKBOOK}.items():
        if key.endswith("_mb"):
            assert "MiB" in text, key
        elif key.endswith("_ms"):
            assert "illiseconds" in text, key
        elif key.endswith(("_seconds", "_secs")):
            assert "econds" in text, key


def test_defaults_are_those_of_the_loader() -> None:
    schema = json_schema("config")
    assert schema["properties"]["listen_addr"]["default"] == "127.0.0.1:8080"
    assert schema["properties"]["max_hops"]["default"] == Settings().max_hops
    breaker = schema["properties"]["cluster"]["properties"]["circuit_breaker"]["properties"]
    assert breaker["failure_threshold"]["default"] == 5
    profile = json_schema("cookbook")["properties"]["models"]["items"]["properties"]["profiles"]["items"]
    assert profile["properties"]["idle_timeout_seconds"]["default"] == 300
    assert profile["additionalProperties"] is False


@pytest.mark.parametrize(
    "data",
    [
        {"max_hop": 1},
        {"max_hops": -1},
        {"max_hops": "many"},
        {"max_instances_per_node": 0},
        {"listen_addr": "8080"},
        {"node_id": "a b"},
        {"cluster": {"gossip_interval_seconds": 0}},
        {"cluster": {"version_mismatch_action": "shout"}},
        {"cluster": {"peers": [{"adress": "a:1"}]}},
        {"llama_cpp_ports": {"ranges": [{"start": 1}]}},
        {"llama_cpp_ports": {"ports": [70000]}},
        {"auth": ["key"]},
        [],
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_configuration(data: Any) -> None:
    assert errors("config", data)


PROFILE = {"id": "default", "model_path": "a.gguf"}


@pytest.mark.parametrize(
    "model",
    [
        {"profiles": [PROFILE]},
        {"name": "m"},
        {"name": "m", "profiles": []},
        {"name": "m:x", "profiles": [PROFILE]},
        {"name": "m", "profiles": [{"id": "default"}]},
        {"name": "m", "profiles": [{"model_path": "a.gguf"}]},
        {"name": "m", "profiles": [PROFILE | {"hf_file": "x.gguf"}]},
        {"name": "m", "profiles": [{"id": "default", "url": "https://example.org/x.gguf"}]},
        {"name": "m", "profiles": [PROFILE | {"idle_timeout": 3}]},
        {"name": "m", "profiles": [PROFILE | {"startup_timeout_seconds": 0}]},
        {"name": "m", "aliases": "a", "profiles": [PROFILE]},
    ],
)
def test_what_is_wrong_in_a_cookbook(model: dict[str, Any]) -> None:
    assert errors("cookbook", {"models": [model]})
    with pytest.raises(ConfigError):
        parse_cookbook(Document("cookbook.yaml", {"models": [copy.deepcopy(model)]}, {}), Path("/"))


_NUMBERS = st.one_of(st.integers(-2, 3), st.floats(-1, 3, allow_nan=False), st.none(), st.just("x"))
_KEYS = [key for key in ProfileEntry.model_fields if key not in ("id", "model_path", "sha256", "url")]


@given(st.dictionaries(st.sampled_from(_KEYS), st.one_of(_NUMBERS, st.booleans(), st.just("a/b"))))
def test_what_the_loader_takes_an_editor_does_not_mark(more: dict[str, Any]) -> None:
    data = {"models": [{"name": "m", "profiles": [PROFILE | more]}]}
    try:
        parse_cookbook(Document("cookbook.yaml", copy.deepcopy(data), {}), Path("/"))
    except ConfigError:
        return
    assert [path for path in errors("cookbook", data) if not _read_by_leniency(data, path)] == []


def _read_by_leniency(data: dict[str, Any], path: str) -> bool:
    """The loader reads 1.0 as 1 and 1 as true, as pydantic does; a schema needn't."""
    key = path.rpartition(".")[2]
    value = data["models"][0]["profiles"][0].get(key)
    return key == "enabled" and not isinstance(value, bool)
