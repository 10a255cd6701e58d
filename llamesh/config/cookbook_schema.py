"""cookbook.yaml: its keys, and the rules that join them.

pydantic checks each value; the rules between values look at the plain data instead, so that they
are told together with everything else, however broken the rest of the file is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any

from pydantic import AfterValidator

from llamesh.config.arguments import read_arguments
from llamesh.config.model_names import BadName, check_file, check_sha256, check_url, split_repo
from llamesh.config.problems import Finding, KeyPath, shown, written
from llamesh.config.values import Count, PositiveSeconds, Seconds, Section, Text, reject

_ONE_SOURCE = "one of model_path, hf_repo, url, or a model flag (-m, -hf, ...) in llama_server_args"


def _name(value: str) -> str:
    if ":" in value:
        raise reject(f"holds a colon: {shown(value)}", "no `:`; it separates a model from its profile")
    return value


def _named(check: Callable[[str], object]) -> Callable[[str], str]:
    def checked(value: str) -> str:
        try:
            check(value)
        except BadName as error:
            raise reject(error.message, error.hint) from None
        return value

    return checked


def _sha256(value: str) -> str:
    return _named(check_sha256)(value).lower()


def _describes(value: str) -> str:
    if any(ord(letter) < 32 and letter not in "\t\n\r" for letter in value):
        raise reject("holds a control character", "text")
    return value


Name = Annotated[Text, AfterValidator(_name)]
Description = Annotated[str, AfterValidator(_describes)]


class ProfileEntry(Section):
    """One way to run a model. None for a limit means what `model_defaults` in config.yaml says."""

    id: Name
    description: Description = ""
    enabled: bool = True
    model_path: Text | None = None
    hf_repo: Annotated[Text, AfterValidator(_named(split_repo))] | None = None
    hf_file: Annotated[Text, AfterValidator(_named(check_file))] | None = None
    url: Annotated[Text, AfterValidator(_named(check_url))] | None = None
    sha256: Annotated[Text, AfterValidator(_sha256)] | None = None
    llama_server_args: str = ""
    idle_timeout_seconds: Seconds = 300.0
    startup_timeout_seconds: PositiveSeconds = 60.0
    download_timeout_seconds: PositiveSeconds = 3600.0
    max_instances: Count | None = None
    min_instances: Count = 0
    max_queue_size: Count | None = None
    max_wait_in_queue_ms: Count | None = None
    max_request_duration_ms: Count | None = None
    min_eviction_tenure_secs: Seconds | None = None
    estimated_vram_mb: Count | None = None
    estimated_sysmem_mb: Count | None = None


class ModelEntry(Section):
    """A name that clients ask for, and the ways to run it."""

    name: Name
    description: Description = ""
    enabled: bool = True
    aliases: tuple[Name, ...] = ()
    profiles: tuple[ProfileEntry, ...] = ()


class CookbookFile(Section):
    """The whole file."""

    models: tuple[ModelEntry, ...] = ()


def rule_findings(data: Any) -> Iterator[Finding]:
    """The rules between values, checked on whatever a file holds; paths are from its root.

    What stands switched off is checked like the rest: switching it on must not break the file.
    """
    taken: dict[str, KeyPath] = {}
    for at, model in _mappings(data, "models", ()):
        for here, name in [((*at, "name"), model.get("name")), *_texts(model, "aliases", at)]:
            yield from _once(taken, here, name, "name or alias")
        ids: dict[str, KeyPath] = {}
        profiles = list(_mappings(model, "profiles", at))
        if not model.get("profiles"):
            yield Finding(
                (*at, "profiles"), "the model has no profile", "at least one, usually with `id: default`"
            )
        for here, profile in profiles:
            yield from _once(ids, (*here, "id"), profile.get("id"), "profile id of this model")
            yield from _profile_findings(profile, here)


def _profile_findings(profile: dict[str, Any], at: KeyPath) -> Iterator[Finding]:
    sources = [key for key in ("model_path", "hf_repo", "url") if profile.get(key) is not None]
    text = profile.get("llama_server_args")
    readable = text is None or isinstance(text, str)
    arguments = read_arguments(text if isinstance(text, str) else "")
    for complaint in arguments.complaints:
        yield Finding((*at, "llama_server_args"), complaint.message, complaint.hint)
    sources += [f"{source.flag} in llama_server_args" for source in arguments.sources]
    if len(sources) > 1:
        yield Finding(at, "names the model more than once: " + " and ".join(sources), "keep one of them")
    # Arguments that can't be read may well name the model.
    if not sources and readable and not arguments.complaints:
        yield Finding(at, "doesn't say where the model is", _ONE_SOURCE)
    if profile.get("hf_file") is not None and profile.get("hf_repo") is None:
        yield Finding((*at, "hf_file"), "has no hf_repo beside it", "`hf_repo: owner/name`")
    if profile.get("url") is not None and profile.get("sha256") is None:
        yield Finding((*at, "url"), "has no sha256 beside it", "`sha256:` and what `sha256sum FILE` prints")
    if profile.get("sha256") is not None and profile.get("url") is None:
        yield Finding((*at, "sha256"), "has no url beside it", "`url: https://...`; the hub has its own")
    least, most = profile.get("min_instances"), profile.get("max_instances")
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield Finding((*at, "min_instances"), f"{least} is above max_instances ({most})", f"at most {most}")


def _once(taken: dict[str, KeyPath], at: KeyPath, name: Any, what: str) -> Iterator[Finding]:
    if not isinstance(name, str):
        return
    first = taken.setdefault(name.casefold(), at)
    if first != at:
        message = f"{shown(name)} is taken by {written(first)}"
        yield Finding(at, message, f"each {what} once, upper and lower case being the same")


def _mappings(parent: Any, key: str, above: KeyPath) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    items = parent.get(key) if isinstance(parent, dict) else None
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict):
            yield (*above, key, index), item


def _texts(parent: dict[str, Any], key: str, above: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    items = parent.get(key)
    for index, item in enumerate(items if isinstance(items, list) else ()):
        yield (*above, key, index), item
