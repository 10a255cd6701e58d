"""Layers of the same schema laid over each other: file, environment, secrets. The later one wins."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from llamesh.config.problems import KeyPath, Place, Problem, written


@dataclass(slots=True)
class Layers:
    """The merged `data`, and the place of each value that survived."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, data: Any, places: Mapping[KeyPath, Place], file: str) -> None:
        """Lay `data` on top: mappings merge key by key, everything else (lists too) is replaced.

        A key without a value covers nothing. What isn't a mapping where one belongs is a problem,
        since the layers above would hide it.
        """
        if data is None:
            return
        if not isinstance(data, dict):
            got = "a list" if isinstance(data, list) else "a single value"
            message = f"must be a mapping of keys, not {got}"
            self.problems.append(Problem(file, 1, "", message, "lines such as `node_id: name`"))
            return
        self._merge(self.data, data, (), places)

    def _merge(
        self, low: dict[str, Any], high: dict[str, Any], above: KeyPath, places: Mapping[KeyPath, Place]
    ) -> None:
        for key, value in high.items():
            path = (*above, key)
            covered = low.get(key)
            if value is None and covered is not None:
                continue
            if isinstance(value, dict):
                if not isinstance(covered, dict):
                    self._replaced(covered, path)
                    low[key] = covered = {}
                    if path in places:
                        self.places[path] = places[path]
                self._merge(covered, value, path, places)
            else:
                self._forget(covered, path)
                low[key] = value
                self.places |= {below: places[below] for below in paths_in(value, path) if below in places}

    def _replaced(self, covered: Any, path: KeyPath) -> None:
        """A mapping lands on something else: told now, since nobody will see it any more."""
        if covered is not None:
            place = self.places[path]  # of everything that was merged, its layer knew the place
            message, hint = "must be a mapping of keys", "put its keys below it, indented"
            self.problems.append(Problem(*place, written(path), message, hint))
        self._forget(covered, path)

    def _forget(self, covered: Any, path: KeyPath) -> None:
        for below in paths_in(covered, path):
            self.places.pop(below, None)


def paths_in(value: Any, path: KeyPath) -> Iterator[KeyPath]:
    """The path of a value, and of everything in it."""
    yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths_in(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths_in(inner, (*path, index))
