"""`llamesh schema`: what it prints and where it writes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from llamesh.commands.schema import command
from tests.commands.cli import run


@pytest.mark.parametrize("name", ["config", "cookbook", "secrets"])
def test_it_prints_a_schema(name: str) -> None:
    result = run(command, name)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(document)
    assert document["title"] == f"llamesh: {name}.yaml"
    assert document == json.loads(run(command, name, "--json").stdout)


def test_it_writes_one_for_an_editor(tmp_path: Path) -> None:
    output = tmp_path / "cookbook.schema.json"
    for _ in range(2):
        result = run(command, "cookbook", "--output", str(output))
        assert (result.exit_code, result.output) == (0, "")
    assert json.loads(output.read_text())["properties"]["models"]
    refused = run(command, "cookbook", "--output", str(tmp_path / "no" / "where"))
    assert refused.exit_code == 1
    assert "can't be written" in refused.stderr


def test_another_name_is_a_wrong_command_line() -> None:
    assert run(command, "other").exit_code == 2
