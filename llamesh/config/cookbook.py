"""The cookbook: which models there are, how each is run, and which one a name means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from pydantic import ValidationError

from llamesh.config.arguments import FromArguments, Kind, read_arguments
from llamesh.config.cookbook_schema import CookbookFile, ModelEntry, ProfileEntry, rule_findings
from llamesh.config.problems import ConfigError, in_order
from llamesh.config.schema import explain, problem_at
from llamesh.config.values import user_path
from llamesh.config.yaml_source import Document, read_yaml

__all__ = [
    "Cookbook",
    "Elsewhere",
    "FromArguments",
    "HubFile",
    "Kind",
    "ModelPath",
    "Profile",
    "Source",
    "UrlFile",
    "load_cookbook",
    "parse_cookbook",
]

DEFAULT_PROFILE = "default"


@dataclass(frozen=True, slots=True)
class ModelPath:
    """A GGUF file on this machine: an absolute path, or one below the cookbook's own folder."""

    path: str


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a hub repository (`owner/name`, maybe `:quantisation`); None: the repository's usual one."""

    repo: str
    file: str | None


@dataclass(frozen=True, slots=True)
class UrlFile:
    """A GGUF file at an address, and the SHA-256 that it must have (lower case)."""

    url: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """Other nodes of the mesh have it, this one doesn't. Never in a cookbook."""


Source: TypeAlias = ModelPath | HubFile | UrlFile | FromArguments | Elsewhere


@dataclass(frozen=True)
class Profile:
    """One way to run a model, as the cookbook says. None for a limit: `model_defaults` holds.

    `arguments` are llama_server_args split like a shell, without `--api-key K`: the key is in
    `api_key`, which `repr` hides and which reaches the child by its environment.
    """

    model: str
    id: str
    model_description: str
    description: str
    source: Source
    arguments: tuple[str, ...] = ()
    kind: Kind = "text"
    idle_timeout_seconds: float = 300.0
    startup_timeout_seconds: float = 60.0
    download_timeout_seconds: float = 3600.0
    max_instances: int | None = None
    min_instances: int = 0
    max_queue_size: int | None = None
    max_wait_in_queue_ms: int | None = None
    max_request_duration_ms: int | None = None
    min_eviction_tenure_secs: float | None = None
    estimated_vram_mb: int | None = None
    estimated_sysmem_mb: int | None = None
    api_key: str | None = field(default=None, repr=False)

    @cached_property
    def key(self) -> str:
        """`model:id` as written: the name in metrics, logs and `X-Llamesh-Profile`."""
        return f"{self.model}:{self.id}"

    @cached_property
    def public_name(self) -> str:
        """What lists show: the bare model for its default profile, else `model:id`."""
        return self.model if self.id.casefold() == DEFAULT_PROFILE else self.key


@dataclass(frozen=True)
class Cookbook:
    """The enabled profiles in the order of the file, and `aliases` (as written) to their model."""

    profiles: tuple[Profile, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    _by_name: Mapping[str, Profile] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_name", MappingProxyType(dict(self._names())))

    def find(self, name: str) -> Profile | None:
        """The profile that `name` means: `model`, `model:profile`, and the same by alias.

        Upper and lower case are the same; a bare model means its profile `default`. None when there
        is none, or when it is switched off.
        """
        return self._by_name.get(name.casefold())

    def aliases_of(self, model: str) -> tuple[str, ...]:
        """Other names of a model, as written."""
        name = model.casefold()
        return tuple(alias for alias, of in self.aliases.items() if of.casefold() == name)

    def listed(self) -> tuple[Profile, ...]:
        """What `/v1/models` shows: every enabled profile, `max_instances: 0` included."""
        return self.profiles

    def with_found(self, found: tuple[Profile, ...]) -> Cookbook:
        """This cookbook and, after it, models that nobody wrote down. What is written wins: of a name, and
        of a file.
        """
        taken = {profile.model.casefold() for profile in self.profiles}
        taken |= {alias.casefold() for alias in self.aliases}
        files = {profile.source for profile in self.profiles}
        more = tuple(p for p in found if p.model.casefold() not in taken and p.source not in files)
        return Cookbook((*self.profiles, *more), self.aliases) if more else self

    def _names(self) -> Iterator[tuple[str, Profile]]:
        also: dict[str, list[str]] = {}
        for alias, model in self.aliases.items():
            also.setdefault(model.casefold(), []).append(alias.casefold())
        for profile in self.profiles:
            model, id_ = profile.model.casefold(), profile.id.casefold()
            for name in (model, *also.get(model, ())):
                yield f"{name}:{id_}", profile
                if id_ == DEFAULT_PROFILE:
                    yield name, profile


def load_cookbook(path: Path) -> Cookbook:
    """Read the cookbook; ConfigError with every problem. An empty file is a cookbook without models.

    A relative `model_path` counts from the file's folder, and `~` is the home directory.
    """
    document = read_yaml(path, absent="check the path; `llamesh init` writes one")
    return parse_cookbook(document, path.absolute().parent)


def parse_cookbook(document: Document, folder: Path) -> Cookbook:
    """The cookbook in a document; `folder` is where its relative `model_path`s count from."""
    problems = list(document.problems)
    cookbook = CookbookFile()
    try:
        cookbook = CookbookFile.model_validate(document.data)
    except ValidationError as error:
        problems += explain(error, CookbookFile, document.places, document.file)
    for finding in rule_findings(document.data):
        problems.append(problem_at(finding, (), document.places, document.file))
    if problems:
        raise ConfigError(in_order(problems))
    models = [model for model in cookbook.models if model.enabled]
    return Cookbook(
        tuple(
            _profile(model, entry, folder) for model in models for entry in model.profiles if entry.enabled
        ),
        MappingProxyType({alias: model.name for model in models for alias in model.aliases}),
    )


def _profile(model: ModelEntry, entry: ProfileEntry, folder: Path) -> Profile:
    arguments = read_arguments(entry.llama_server_args)
    return Profile(
        model=model.name,
        id=entry.id,
        model_description=model.description,
        description=entry.description,
        source=_source(entry, arguments.sources, folder),
        arguments=arguments.words,
        kind=arguments.kind,
        idle_timeout_seconds=entry.idle_timeout_seconds,
        startup_timeout_seconds=entry.startup_timeout_seconds,
        download_timeout_seconds=entry.download_timeout_seconds,
        max_instances=entry.max_instances,
        min_instances=entry.min_instances,
        max_queue_size=entry.max_queue_size,
        max_wait_in_queue_ms=entry.max_wait_in_queue_ms,
        max_request_duration_ms=entry.max_request_duration_ms,
        min_eviction_tenure_secs=entry.min_eviction_tenure_secs,
        estimated_vram_mb=entry.estimated_vram_mb,
        estimated_sysmem_mb=entry.estimated_sysmem_mb,
        api_key=arguments.api_key,
    )


def _source(entry: ProfileEntry, in_arguments: tuple[FromArguments, ...], folder: Path) -> Source:
    if entry.model_path is not None:
        return ModelPath(str(folder / user_path(entry.model_path)))
    if entry.hf_repo is not None:
        return HubFile(entry.hf_repo, entry.hf_file)
    if entry.url is not None:
        return UrlFile(entry.url, entry.sha256 or "")  # the rules made sure that it has one
    return in_arguments[0]  # the rules made sure that there is exactly one source
