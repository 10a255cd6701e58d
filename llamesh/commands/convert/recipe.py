"""What a foreign configuration becomes: recipes, what was left out, and why."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamesh.config.cookbook import DEFAULT_PROFILE, parse_cookbook
from llamesh.config.problems import ConfigError
from llamesh.config.yaml_source import Document

_SOURCES = ("model_path", "hf_repo", "hf_file", "url", "sha256")


@dataclass(slots=True)
class Recipe:
    """One profile to be. `keys` are those of a profile in the cookbook but `id`, `llama_server_args` and
    `description`; `words` its arguments; `notes` what is to be said where it stands."""

    model: str
    id: str = DEFAULT_PROFILE
    description: str = ""
    aliases: list[str] = field(default_factory=list)
    keys: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.model if self.id == DEFAULT_PROFILE else f"{self.model}:{self.id}"

    @property
    def has_source(self) -> bool:
        return any(key in self.keys for key in _SOURCES)

    def profile(self) -> dict[str, Any]:
        """The profile as plain data, in the order to write it."""
        made: dict[str, Any] = {"id": self.id}
        if self.description:
            made["description"] = self.description
        made |= {key: self.keys[key] for key in _SOURCES if key in self.keys}
        if self.words:
            made["llama_server_args"] = shlex.join(self.words)
        return made | {key: value for key, value in self.keys.items() if key not in _SOURCES}


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A model that can't be taken over, and why not."""

    name: str
    reason: str


@dataclass(slots=True)
class Converted:
    """All of it. `notes` concern the file as a whole; `config` are settings for config.yaml that follow,
    `config_notes` what to say there."""

    recipes: list[Recipe] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    config_notes: list[str] = field(default_factory=list)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.append(LeftOut(name, reason))

    def take(self, recipe: Recipe) -> None:
        """Take a recipe in if the loader of cookbooks takes it, beside those that are there already."""
        reason = self._refused(recipe)
        if reason:
            self.leave_out(recipe.name, reason)
        else:
            self.recipes.append(recipe)

    def _refused(self, recipe: Recipe) -> str:
        if any(
            (one.model.casefold(), one.id.casefold()) == (recipe.model.casefold(), recipe.id.casefold())
            for one in self.recipes
        ):
            return "its name is taken; upper and lower case are the same"
        reason = _mistakes({"models": [{"name": recipe.model, "profiles": [recipe.profile()]}]})
        if reason:
            return reason
        if recipe.model.casefold() in {alias.casefold() for one in self.recipes for alias in one.aliases}:
            return f"another model has the alias {recipe.model}"
        self._settle_aliases(recipe)
        return ""

    def _settle_aliases(self, recipe: Recipe) -> None:
        """Keep the aliases that the loader takes."""
        taken = {one.model.casefold() for one in (*self.recipes, recipe)}
        taken |= {alias.casefold() for one in self.recipes for alias in one.aliases}
        kept: list[str] = []
        for alias in recipe.aliases:
            any_model = {"name": alias, "profiles": [{"id": DEFAULT_PROFILE, "model_path": "x"}]}
            if recipe.id != DEFAULT_PROFILE:
                fault = "aliases are names of models, not of profiles"
            elif alias.casefold() in taken:
                fault = "that name is taken, upper and lower case being the same"
            else:
                fault = _mistakes({"models": [any_model]})
            if fault:
                recipe.notes.append(f"the alias {alias!r} was left out: {fault}")
            else:
                kept.append(alias)
                taken.add(alias.casefold())
        recipe.aliases = kept


def _mistakes(data: dict[str, Any]) -> str:
    """What the loader would say, "" when it takes it."""
    try:
        parse_cookbook(Document("cookbook.yaml", data, {}), Path("/"))
    except ConfigError as error:
        return "; ".join(f"{problem.message} ({problem.hint})" for problem in error.problems)
    return ""


def split_name(name: str) -> tuple[str, str, str]:
    """Model, profile and a note ("" for none) for a name that may hold colons, which are llamesh's own:
    `a:b` becomes the profile b of a, so that clients go on asking for `a:b`."""
    model, colon, profile = name.partition(":")
    if not colon:
        return name, DEFAULT_PROFILE, ""
    if model.strip() and profile.strip() and ":" not in profile:
        return model, profile, ""
    plain = name.replace(":", "-").strip("-") or "model"
    return plain, DEFAULT_PROFILE, f"it was called {name!r}: a colon separates a model from its profile here"
