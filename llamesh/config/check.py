"""All files together: read them in one go, and check what only both sides know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llamesh.config.cookbook import Cookbook, load_cookbook
from llamesh.config.problems import ConfigError, Problem, nearest, shown
from llamesh.config.settings import Settings, load_settings


def load_files(
    config: Path | None,
    cookbook: Path,
    secrets: Path | None,
    environ: Mapping[str, str],
    *,
    config_required: bool = True,
    secrets_required: bool = True,
) -> tuple[Settings, Cookbook]:
    """Everything a node starts from. ConfigError has the problems of all files at once."""
    problems: list[Problem] = []
    settings = recipes = None
    try:
        settings = load_settings(
            config, secrets, environ, required=config_required, secrets_required=secrets_required
        )
    except ConfigError as error:
        problems += error.problems
    try:
        recipes = load_cookbook(cookbook)
    except ConfigError as error:
        problems += error.problems
    if settings is None or recipes is None:
        raise ConfigError(problems)
    cross_check(settings, recipes)
    return settings, recipes


def cross_check(settings: Settings, cookbook: Cookbook) -> None:
    """Raise ConfigError when configuration and cookbook, each fine alone, don't fit together."""
    name = settings.default_model
    # With a cluster, a peer may have it; what models_dir holds is seen later.
    if (
        name is None
        or settings.cluster.enabled
        or settings.models_dir is not None
        or cookbook.find(name) is not None
    ):
        return
    names = [profile.public_name for profile in cookbook.listed()]
    hint = f"nearest: {nearest(name, names)}" if names else "the cookbook has no enabled model"
    place = settings.origin("default_model")
    message = f"the cookbook has no enabled {shown(name)}"
    raise ConfigError([Problem(place.file, place.line, "default_model", message, hint)])
