"""What a node learns about a profile from its own requests: how long they take, and what their parts cost.

`note` takes in one finished request and returns the next state; nothing else is remembered. All are
weighted means: the first requests count alike, later each new one counts 1/20, so that the values
follow a change of load or of habits within some tens of requests.

    service    mean time that a request holds a slot
    prefill    time over tokens, both as means, so that a prompt of 3 tokens hardly counts
    decode     a line through (neighbours, time per token), since sharing an instance slows it down:
               alone x (1 + sharing x neighbours). Weighted least squares on means of x, y, xx, xy.

Where the number of neighbours hasn't varied, the slope can't be known: the usual one is assumed, and the
line goes through the mean.

What peers are told (`told`) changes only when a value has moved by more than a quarter, since each
change of a gossiped key travels through the whole mesh, and placement hardly notices less.
"""

from __future__ import annotations

import math
from typing import Annotated, TypeAlias

import msgspec

from llamesh.core.cost import DEFAULT_SHARING

# The weight of a new request, once there were this many.
WINDOW = 20

# Below this variance of the number of neighbours, one can't tell the slope from noise.
_LEAST_VARIANCE = 0.1

# A neighbour that slows another down by more than by working in its stead is a busy machine, not sharing.
_MOST_SHARING = 1.0

# A value is told anew when it has moved by this share.
_MOVED = 0.25


# It comes back from a file that people can edit.
_Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]
_Mean: TypeAlias = Annotated[float, msgspec.Meta(ge=0)]


class Speeds(msgspec.Struct, frozen=True, omit_defaults=True):
    """What was learned about one profile on one node. Milliseconds; 0 = nothing yet.

    requests: how many were taken in; service_ms: of a request, from getting its slot to giving it back;
    the others are means from which the properties follow. It can be stored as it is.
    """

    requests: _Count = 0
    service_ms: _Mean = 0.0
    prefills: _Count = 0
    prefill_total_ms: _Mean = 0.0  # mean time to read a prompt,
    prefill_tokens: _Mean = 0.0  # and mean tokens of it that weren't in the cache
    decodes: _Count = 0
    output_tokens: _Mean = 0.0
    x: _Mean = 0.0  # neighbours
    y: _Mean = 0.0  # ms per token
    xx: _Mean = 0.0
    xy: _Mean = 0.0

    @property
    def prefill_ms(self) -> float:
        """Per token of a prompt."""
        return self.prefill_total_ms / self.prefill_tokens if self.prefill_tokens > 0 else 0.0

    @property
    def sharing(self) -> float:
        """By what share each neighbour slows decode down; the usual share where it isn't known."""
        variance = self.xx - self.x * self.x
        if variance < _LEAST_VARIANCE:
            return DEFAULT_SHARING
        slope = (self.xy - self.x * self.y) / variance
        alone = self.y - slope * self.x
        if alone <= 0:
            return _MOST_SHARING
        return min(max(slope / alone, 0.0), _MOST_SHARING)

    @property
    def decode_ms(self) -> float:
        """Per token of an answer, for a request that is alone on its instance."""
        return self.y / (1 + self.sharing * self.x)

    @property
    def tokens_per_second(self) -> float:
        """Of one answer, at the load there was."""
        return 1000 / self.y if self.y > 0 else 0.0


def note(
    speeds: Speeds,
    *,
    service_ms: float,
    prefill_tokens: int = 0,
    prefill_ms: float = 0.0,
    decode_tokens: int = 0,
    decode_ms: float = 0.0,
    neighbours: float = 0.0,
) -> Speeds:
    """Take in a request that was answered to its end.

    `service_ms`: how long it held its slot. `prefill_tokens` (those not from the cache), `prefill_ms`,
    `decode_tokens`, `decode_ms`: totals, as in llama-server's `timings` (prompt_n, prompt_ms, predicted_n,
    predicted_ms), 0 where unknown. `neighbours`: other requests on the instance meanwhile, on average or
    at its beginning. What isn't a finite number above 0 isn't taken in.
    """
    values: dict[str, float] = {}
    if _is_some(service_ms):
        weight = 1 / min(speeds.requests + 1, WINDOW)
        values["requests"] = speeds.requests + 1
        values["service_ms"] = _mix(speeds.service_ms, service_ms, weight)
    if _is_some(prefill_ms) and prefill_tokens > 0:
        weight = 1 / min(speeds.prefills + 1, WINDOW)
        values["prefills"] = speeds.prefills + 1
        values["prefill_total_ms"] = _mix(speeds.prefill_total_ms, prefill_ms, weight)
        values["prefill_tokens"] = _mix(speeds.prefill_tokens, prefill_tokens, weight)
    if _is_some(decode_ms) and decode_tokens > 0 and 0 <= neighbours < math.inf:
        weight = 1 / min(speeds.decodes + 1, WINDOW)
        each = decode_ms / decode_tokens
        values["decodes"] = speeds.decodes + 1
        values["output_tokens"] = _mix(speeds.output_tokens, decode_tokens, weight)
        values["x"] = _mix(speeds.x, neighbours, weight)
        values["y"] = _mix(speeds.y, each, weight)
        values["xx"] = _mix(speeds.xx, neighbours * neighbours, weight)
        values["xy"] = _mix(speeds.xy, neighbours * each, weight)
    return msgspec.structs.replace(speeds, **values) if values else speeds


def _is_some(value: float) -> bool:
    return 0 < value < math.inf


def _mix(old: float, new: float, weight: float) -> float:
    return old + (new - old) * weight


class Told(msgspec.Struct, frozen=True, omit_defaults=True):
    """What peers know: the values that placement uses, rounded to two digits. See `Speeds`."""

    service_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    output_tokens: float = 0.0
    sharing: float = DEFAULT_SHARING


def told(old: Told, speeds: Speeds) -> Told:
    """What to tell now, after `old` was told: `old` itself while nothing has moved enough."""
    new = Told(
        steady(old.service_ms, speeds.service_ms),
        steady(old.prefill_ms, speeds.prefill_ms),
        steady(old.decode_ms, speeds.decode_ms),
        steady(old.output_tokens, speeds.output_tokens),
        # A share is a small number that is added to 1: what it moves is 1 + sharing.
        old.sharing if abs(speeds.sharing - old.sharing) <= _MOVED else round(speeds.sharing, 2),
    )
    return old if new == old else new


def steady(old: float, new: float) -> float:
    """The value to publish: `old` while `new` is within a quarter of it, else `new` with two digits.

    0 is "unknown": the first known value is published at once, and what was known stays.
    """
    if new <= 0 or abs(new - old) <= _MOVED * old:
        return old
    return round(new, 1 - math.floor(math.log10(new)))
