"""Layers of the same schema laid over each other: file, environment, secrets. The later one wins."""

from __future__ import annotations

from collections.abc import Mapping
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
                if covered is not None and not isinstance(covered, dict):
                    place = self.places[path]
                    message = "must be a mapping of keys"
                    self.problems.append(
                        Problem(*place, written(path), message, "put its keys below it, indented")
                    )
                if not isinstance(covered, dict):
                    self._forget(path)
                    low[key] = covered = {}
                    if path in places:
                        self.places[path] = places[path]
                self._merge(covered, value, path, places)
            else:
                self._forget(path)
                low[key] = value
                self.places |= {here: place for here, place in places.items() if here[: len(path)] == path}

    def _forget(self, path: KeyPath) -> None:
        for here in [known for known in self.places if known[: len(path)] == path]:
            del self.places[here]
