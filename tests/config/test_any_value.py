"""Whatever a file holds, the answer is a configuration or a ConfigError with a place for each problem."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llamesh.config.cookbook import parse_cookbook
from llamesh.config.cookbook_schema import CookbookFile
from llamesh.config.problems import ConfigError, Problem
from llamesh.config.schema import keys_of
from llamesh.config.settings import Settings, load_settings
from llamesh.config.yaml_source import parse_yaml

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(
        ["-m x", "a:1", "default", "sha256:", "~", "~nobody/x", "/", "noise25519:", "[::1]:1", "-"]
    )
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def planted(schema: type[Settings | CookbookFile]) -> st.SearchStrategy[dict[str, Any]]:
    """Documents with anything at known keys, so that the depths of the schema are reached."""

    def plant(choices: list[tuple[str, Any]]) -> dict[str, Any]:
        root: dict[str, Any] = {}
        for key, value in choices:
            at = root
            *above, last = key.split(".")
            for part in above:
                name = part.removesuffix("[]")
                inner = at.get(name)
                if part.endswith("[]"):
                    if not isinstance(inner, list) or not inner or not isinstance(inner[0], dict):
                        inner = at[name] = [{}]
                    at = inner[0]
                else:
                    if not isinstance(inner, dict):
                        inner = at[name] = {}
                    at = inner
            at[last] = value
        return root

    pairs = st.tuples(st.sampled_from(list(keys_of(schema))), ANYTHING)
    return st.lists(pairs, min_size=1, max_size=6).map(plant)


def check(read: Callable[[], object]) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        read()
    except ConfigError as error:
        problems = error.problems
    assert all(problem.line and problem.message and problem.hint for problem in problems)
    assert all("\n" not in str(problem) for problem in problems)


@given(planted(CookbookFile))
@settings(deadline=None)
def test_any_cookbook(data: dict[str, Any]) -> None:
    document = parse_yaml(json.dumps(data), "cookbook.yaml")
    check(lambda: parse_cookbook(document, Path("/models")))


@given(planted(Settings))
@settings(deadline=None)
def test_any_configuration(tmp_path_factory: Any, data: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(json.dumps(data))
    check(lambda: load_settings(path, None, {}))
