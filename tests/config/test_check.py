"""All files in one go: problems of both at once, and what only both sides know."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llamesh.config.check import load_files
from llamesh.config.cookbook import Cookbook
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings

COOKBOOK = """
models:
  - name: chat
    aliases: [gpt]
    profiles: [{id: default, model_path: /m}, {id: long, model_path: /m}]
  - name: off
    enabled: false
    profiles: [{id: default, model_path: /m}]
"""


def load(tmp_path: Path, config: str, cookbook: str = COOKBOOK, **environ: str) -> tuple[Settings, Cookbook]:
    (tmp_path / "config.yaml").write_text(config)
    (tmp_path / "cookbook.yaml").write_text(cookbook)
    return load_files(tmp_path / "config.yaml", tmp_path / "cookbook.yaml", None, environ)


def said(tmp_path: Path, config: str, cookbook: str = COOKBOOK, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, config, cookbook, **environ)
    return str(caught.value).replace(f"{tmp_path}/", "")


@pytest.mark.parametrize("name", ["chat", "CHAT:LONG", "gpt", "gpt:long"])
def test_a_default_model_of_the_cookbook(tmp_path: Path, name: str) -> None:
    settings, cookbook = load(tmp_path, f"default_model: {name}")
    assert settings.default_model == name
    assert len(cookbook.profiles) == 2


@pytest.mark.parametrize("name", ["chatt", "chat:short", "off"])
def test_a_default_model_that_the_cookbook_lacks(tmp_path: Path, name: str) -> None:
    text = said(tmp_path, f"\ndefault_model: {name}")
    assert text.startswith(
        f"config.yaml:2: default_model: the cookbook has no enabled '{name}' (nearest: chat"
    )
    # A peer may have it.
    load(tmp_path, f"default_model: {name}\ncluster: {{enabled: true}}")


def test_the_place_is_the_one_that_set_it(tmp_path: Path) -> None:
    assert said(tmp_path, "default_model: chat", "", LLAMESH_DEFAULT_MODEL="x") == (
        "environment variable LLAMESH_DEFAULT_MODEL: default_model: the cookbook has no enabled 'x'"
        " (the cookbook has no enabled model)"
    )


def test_both_files_are_told_at_once(tmp_path: Path) -> None:
    assert said(tmp_path, "max_hop: 1", "models: 5").splitlines() == [
        "config.yaml:1: max_hop: unknown key (nearest: max_hops)",
        "cookbook.yaml:1: models: must be a list, not 5 (a list, such as [a, b])",
    ]


def test_a_file_of_something_else_is_not_told_line_by_line(tmp_path: Path) -> None:
    lines = said(tmp_path, "".join(f"key{number}: 1\n" for number in range(500))).splitlines()
    assert len(lines) == 101
    assert lines[-1] == "... and 400 more"


def test_reading_configuration_stays_light() -> None:
    """What a node doesn't need before its first request isn't imported to read two files."""
    heavy = ["gguf", "numpy", "huggingface_hub", "mcp", "rich", "httpx", "email_validator", "cryptography"]
    program = (
        "import sys; from llamesh.config.check import load_files\n"
        "from llamesh.config.settings import load_settings; load_settings(None, None, {})\n"
        f"print([name for name in {heavy!r} + ['pydantic_settings', 'trio'] if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    output = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert output.stdout.strip() == "[]"
