"""The schema as a thing to ask: which keys there are, and what an error of pydantic means in words."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from llamesh.config.problems import Finding, KeyPath, Place, Problem, nearest, shown, written

# Values below these keys may be secrets, or hold one (`--api-key K`): messages don't repeat them.
_UNSPOKEN = frozenset({"auth", "llama_server_args"})

_MOST = 1000

# pydantic's kinds of errors by their first word: what it should have been, and how to write that.
_EXPECTED = {
    "bool": ("true or false", "true or false"),
    "int": ("a whole number", "a whole number"),
    "float": ("a number", "a number"),
    "finite": ("a finite number", "a number"),
    "string": ("text", "text; put it in quotes"),
    "tuple": ("a list", "a list, such as [a, b]"),
    "model": ("a mapping of keys", "its keys below it, indented"),
}


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, itself or in a list; None for plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        found = section_of(inner)
        if found is not None:
            return found
    return None


def is_list(field: FieldInfo) -> bool:
    """Whether the field takes a list (None beside it or not)."""
    return any(
        typing.get_origin(kind) is tuple for kind in (field.annotation, *typing.get_args(field.annotation))
    )


def keys_of(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """Every key of the schema, sections before what they hold: `cluster`, `cluster.peers`,
    `llama_cpp_ports.ranges`, `llama_cpp_ports.ranges[].start`."""
    for name, field in model.model_fields.items():
        here = f"{above}.{name}" if above else name
        yield here
        section = section_of(field.annotation)
        if section is not None:
            yield from keys_of(section, here + "[]" if is_list(field) else here)


def place_of(path: KeyPath, places: Mapping[KeyPath, Place], file: str) -> Place:
    """Where the value at `path` was written, or the nearest thing that encloses it."""
    for length in range(len(path), 0, -1):
        place = places.get(path[:length])
        if place is not None:
            return place
    return Place(file, None)


def explain(
    error: ValidationError, model: type[BaseModel], places: Mapping[KeyPath, Place], file: str
) -> Iterator[Problem]:
    """Each error of pydantic as a problem. `file` is named where `places` doesn't know the path.

    Stops after _MOST errors: nobody reads on, and the nearest key to each would take seconds.
    """
    for detail in error.errors(include_url=False)[:_MOST]:
        loc: KeyPath = detail["loc"]
        if detail["type"] == "llamesh":
            findings: list[Finding] = detail["ctx"]["findings"]
        else:
            findings = [_finding(detail["type"], loc, detail.get("ctx", {}), detail["input"], model)]
        for finding in findings:
            yield problem_at(finding, loc, places, file)


def problem_at(finding: Finding, above: KeyPath, places: Mapping[KeyPath, Place], file: str) -> Problem:
    """A finding below `above`, with its place."""
    path = (*above, *finding.at)
    place = place_of(path, places, file)
    return Problem(place.file, place.line, written(path), finding.message, finding.hint)


def _finding(
    kind: str, loc: KeyPath, context: Mapping[str, Any], value: Any, model: type[BaseModel]
) -> Finding:
    got = "" if _UNSPOKEN.intersection(loc) else f", not {shown(value)}"
    match kind:
        case "extra_forbidden":
            return _unknown(loc, model)
        case "missing":
            return Finding((), "is missing", f"every entry here needs `{loc[-1]}:`" if loc else "")
        case "greater_than_equal":
            return Finding((), f"must be at least {context['ge']}{got}", f"{context['ge']} or more")
        case "greater_than":
            return Finding((), f"must be above {context['gt']}{got}", f"more than {context['gt']}")
        case "less_than_equal":
            return Finding((), f"must be at most {context['le']}{got}", f"{context['le']} or less")
        case "literal_error":
            return Finding((), f"must be {context['expected']}{got}", "one of these")
        case "too_short":
            return Finding((), "is empty", "at least one entry, or leave the key out")
    expected, hint = _EXPECTED.get(kind.split("_")[0], ("what belongs here", "see the example file"))
    return Finding((), f"must be {expected}{got}", hint)


def _unknown(loc: KeyPath, model: type[BaseModel]) -> Finding:
    section = model
    for part in loc[:-1]:
        if isinstance(part, str):
            section = section_of(section.model_fields[part].annotation) or section
    known = list(section.model_fields)
    word = str(loc[-1])
    # The right key in the wrong section is nearer than any misspelling.
    elsewhere = [key for key in keys_of(model) if key.rpartition(".")[2] == word]
    sibling = written((*loc[:-1], nearest(word, known)))
    return Finding((), "unknown key", f"nearest: {elsewhere[0] if elsewhere else sibling}")
