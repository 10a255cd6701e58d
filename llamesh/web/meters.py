"""The counters of all keys that have limits: kept over reloads and restarts, told to the other nodes.

Each key has an entry of its own in this node's gossiped state, under the key's name; nothing of the key
itself leaves the node. An entry is told anew when something was counted, at most once a round, and of many
keys so many a round in turn, so what this costs the mesh has a bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from llamesh.core.limits import NOTHING, TALLY_PREFIX, Limits, Meter, Tally, decode_tally
from llamesh.telemetry.logs import get_logger

log = get_logger("keys")

# Of 100 to 500 bytes each.
_MOST_TOLD = 64


class Meters:
    """See the module. `clock`: Unix time."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self._meters: dict[str, Meter] = {}
        self._states: dict[str, Mapping[str, bytes]] = {}  # of other nodes, as they were heard last
        self._told: dict[str, bytes] = {}  # in the order in which they were told

    def configure(self, limits: Mapping[str, Limits]) -> None:
        """These keys have limits, and no others. What was counted under a name that stays, stays."""
        before, self._meters = self._meters, {}
        for name, one in limits.items():
            meter = self._meters[name] = before.get(name) or Meter()
            meter.limits = one
            if name not in before:
                for node, state in self._states.items():
                    self._hear(node, name, state)
        self._told = {key: value for key, value in self._told.items() if _name(key) in limits}

    def get(self, name: str) -> Meter | None:
        """The counters of a key, None where it has no limits."""
        return self._meters.get(name)

    # Other nodes.

    def entries(self) -> dict[str, bytes]:
        """What is to be gossiped now."""
        now, left = self.clock(), _MOST_TOLD
        waiting = [name for name, meter in self._meters.items() if meter.changed]
        if len(waiting) > left:
            order = {key: number for number, key in enumerate(self._told)}
            waiting.sort(key=lambda name: order.get(TALLY_PREFIX + name, -1))
        for name in waiting[:left]:
            key = TALLY_PREFIX + name
            self._told.pop(key, None)
            self._told[key] = msgspec.json.encode(self._meters[name].told(now))
        return self._told

    def hear(self, node: str, state: Mapping[str, bytes] | None) -> None:
        """The gossiped state of another node; None when it has left or died."""
        if state is None:
            self._states.pop(node, None)
            for meter in self._meters.values():
                meter.gone(node, self.clock())
            return
        before, self._states[node] = self._states.get(node, {}), state
        for name in self._meters:
            key = TALLY_PREFIX + name
            if state.get(key) != before.get(key):
                self._hear(node, name, state)

    def _hear(self, node: str, name: str, state: Mapping[str, bytes]) -> None:
        value = state.get(TALLY_PREFIX + name)
        # Of an entry that is gone, or can't be understood, nothing runs.
        tally = decode_tally(value) if value is not None else None
        self._meters[name].hear(node, tally or NOTHING, self.clock())

    # The file.

    def saved(self) -> dict[str, Any]:
        """For `restore`, after a restart: plain values."""
        now = self.clock()
        found = {}
        for name, meter in sorted(self._meters.items()):
            changed = meter.changed
            tally = msgspec.structs.replace(meter.told(now), running=0)
            meter.changed = changed  # the file isn't the mesh
            if tally.minute or tally.day_requests or tally.day_tokens:
                found[name] = msgspec.to_builtins(tally)
        return found

    def restore(self, document: object) -> None:
        """Go on from what `saved` gave, long ago perhaps. What isn't understood is left out, and said."""
        now = self.clock()
        for name, meter in self._meters.items():
            value = document.get(name) if isinstance(document, dict) else None
            if value is None:
                continue
            try:
                meter.resume(msgspec.convert(value, Tally), now)
            except msgspec.ValidationError as error:
                log.warning("what a key has used can't be read; it begins anew", name=name, error=str(error))


def _name(key: str) -> str:
    return key.removeprefix(TALLY_PREFIX)
