"""The environment as a layer of configuration: `LLAMESH_CLUSTER__ENABLED=true`.

pydantic-settings reads the variables by the schema; what it doesn't do is told here: a variable
that means no key is an error, lists may be comma-separated, and each value knows its variable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llamesh.config.layers import paths_in
from llamesh.config.problems import KeyPath, Place, Problem, nearest
from llamesh.config.schema import is_list, keys_of, place_of

if TYPE_CHECKING:
    from llamesh.config.settings import Settings

PREFIX = "LLAMESH_"
#: Variables that begin like ours and mean something to tests and CI, not to a node.
IGNORED_PREFIXES = ("LLAMESH_TEST_", "LLAMESH_CI_")
#: For commands that talk to a node: the key that they send, and where it is.
KEY_VARIABLE = "LLAMESH_API_KEY"
URL_VARIABLE = "LLAMESH_URL"
_FOR_COMMANDS = (KEY_VARIABLE, URL_VARIABLE)


def variable_name(key: str) -> str:
    """The variable of a key: `cluster.noise.tofu` is `LLAMESH_CLUSTER__NOISE__TOFU`."""
    return PREFIX + key.upper().replace(".", "__")


def read_environment(
    environ: Mapping[str, str], schema: type[Settings]
) -> tuple[dict[str, Any], dict[KeyPath, Place], list[Problem]]:
    """What the environment sets: nested data, the variable of each path, and what nobody knows.

    Names don't depend on case; an empty variable sets nothing. Lists are JSON or comma-separated,
    whole sections JSON.
    """
    known = {variable_name(key): key for key in keys_of(schema) if "[]" not in key}
    places: dict[KeyPath, Place] = {}
    problems: list[Problem] = []
    ours: dict[str, str] = {}
    # Sorted, so that a section's own variable comes before those of its keys, which refine it.
    for name in sorted(environ):
        upper = name.upper()
        if not upper.startswith(PREFIX) or upper.startswith(IGNORED_PREFIXES) or upper in _FOR_COMMANDS:
            continue
        source = f"environment variable {name}"
        key = known.get(upper)
        if key is None:
            problems.append(Problem(source, None, "", "sets no known key", _suggestion(upper, known)))
        elif environ[name] != "":
            ours[name] = environ[name]
            places[tuple(key.split("."))] = Place(source, None)
    # Left alone where nothing is set: the package costs 70 ms to import.
    data = _decoded(ours, schema) if ours else {}
    within = {path: place_of(path, places, "environment") for path in paths_in(data, ()) if path}
    return data, within, problems


def _suggestion(name: str, known: Mapping[str, str]) -> str:
    # Compared without the prefix, which would make every name resemble every other.
    close = nearest(name.removeprefix(PREFIX), (known_name.removeprefix(PREFIX) for known_name in known))
    return f"nearest: {PREFIX}{close}, for {known[PREFIX + close]}"


def _decoded(variables: Mapping[str, str], schema: type[Settings]) -> dict[str, Any]:
    from pydantic.fields import FieldInfo
    from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict

    class Readable(schema, BaseSettings):  # type: ignore[misc, valid-type]
        """The schema in the shape that the source wants. It is never filled."""

        model_config = SettingsConfigDict(env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid")

    class Source(EnvSettingsSource):
        """Reads the given variables instead of the process's own."""

        def _load_env_vars(self) -> Mapping[str, str | None]:
            return {name.lower(): value for name, value in variables.items()}

        def decode_complex_value(self, field_name: str, field: FieldInfo | None, value: Any) -> Any:
            # What isn't JSON stays text, and validation says what it should have been.
            text = str(value).strip()
            if text.startswith(("[", "{")):
                try:
                    return json.loads(text)
                except (ValueError, RecursionError):
                    return text
            if field is not None and is_list(field):
                return [part.strip() for part in text.split(",") if part.strip()]
            return text

    return Source(Readable)()
