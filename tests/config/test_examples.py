"""The example files: valid, complete, and true about the defaults."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamesh.config.access_keys import AccessKey
from llamesh.config.check import load_files
from llamesh.config.cookbook import FromArguments, HubFile, ModelPath
from llamesh.config.cookbook_schema import CookbookFile, ProfileEntry
from llamesh.config.schema import keys_of
from llamesh.config.settings import Settings
from llamesh.config.yaml_source import read_yaml

ROOT = Path(__file__).parents[2]
CONFIG, COOKBOOK = ROOT / "config.example.yaml", ROOT / "cookbook.example.yaml"


def written_keys(data: Any, above: str = "") -> Iterator[str]:
    """The keys of a document in the form of `keys_of`."""
    if isinstance(data, dict):
        for key, value in data.items():
            here = f"{above}.{key}" if above else key
            yield here
            yield from written_keys(value, here)
    elif isinstance(data, list):
        for item in data:
            yield from written_keys(item, f"{above}[]")


@pytest.mark.parametrize(("path", "schema"), [(CONFIG, Settings), (COOKBOOK, CookbookFile)])
def test_every_key_of_the_schema_is_shown_and_no_other(
    path: Path, schema: type[Settings | CookbookFile]
) -> None:
    # Entries of lists that are empty by default are shown in comments, see below.
    keys = {key for key in keys_of(schema) if not re.match(r"auth\.\w+_keys\[\]", key)}
    assert set(written_keys(read_yaml(path).data)) == keys


def test_a_key_is_shown_with_all_that_it_may_say(tmp_path: Path) -> None:
    shown = re.search(r"  #   allowed_keys:\n((?:  #     .*\n)+)", CONFIG.read_text())
    assert shown is not None
    entry = re.sub("(?m)^  #", "", shown[1]).replace("sha256:...", "sha256:" + "a" * 64)
    (tmp_path / "config.yaml").write_text(f"auth:\n  enabled: true\n  allowed_keys:\n{entry}")
    settings, _ = load_files(tmp_path / "config.yaml", COOKBOOK, None, {})
    (key,) = settings.auth.allowed_keys
    assert key.model_fields_set == set(AccessKey.model_fields)
    pattern = key.models_pattern()
    assert pattern is not None
    assert pattern.fullmatch("qwen3-8b:long")


def test_the_examples_load_together() -> None:
    settings, cookbook = load_files(CONFIG, COOKBOOK, None, {})
    assert settings.llama_cpp_ports.all_ports() == (18090, 18091, *range(18100, 18200))
    assert {profile.kind for profile in cookbook.listed()} == {"text", "embedding"}
    assert {type(profile.source) for profile in cookbook.listed()} == {ModelPath, HubFile, FromArguments}
    assert cookbook.find("gpt-4o-mini:LONG") is cookbook.find("qwen3-8b:long")
    assert cookbook.find("bge-reranker-v2-m3") is None


def test_the_config_example_shows_the_defaults() -> None:
    settings, _ = load_files(CONFIG, COOKBOOK, None, {})
    plain = Settings().model_dump()
    shown = settings.model_dump()
    # The one section that says of itself that it isn't the default.
    del plain["llama_cpp_ports"], shown["llama_cpp_ports"]
    assert shown == plain


def test_the_cookbook_example_shows_the_defaults() -> None:
    model = read_yaml(COOKBOOK).data["models"][0]
    profile = next(profile for profile in model["profiles"] if profile["id"] == "long")
    own = {"id", "description", "model_path", "llama_server_args"}
    defaults = ProfileEntry(id="long").model_dump(exclude=own)
    shown = {key: value for key, value in profile.items() if key not in own}
    assert shown == {key: defaults[key] for key in shown}
    assert set(defaults) - set(shown) <= {"hf_repo", "hf_file", "url", "sha256"}


def test_each_key_is_explained_near_by() -> None:
    for path in (CONFIG, COOKBOOK):
        lines = path.read_text().splitlines()
        assert sum(bool(re.match(r"\s*#", line)) for line in lines) > len(lines) / 5
        assert all(len(line) <= 110 for line in lines)
