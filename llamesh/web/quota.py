"""A request of a key: counted when it is let in and when it ends, and refused beyond the key's limits."""

from __future__ import annotations

import math

from llamesh.core.limits import Meter, Refusal
from llamesh.errors import RateLimited
from llamesh.net.exchange import Headers
from llamesh.telemetry.stats import Usage
from llamesh.web.answer import Inbound
from llamesh.web.caller import Caller

# Until a place among the concurrent requests is free: nobody knows, so ask soon.
_AGAIN_SECONDS = 1


def admit(inbound: Inbound, now: float) -> None:
    """Count a request that begins; its answer will tell what is left. `now`: Unix time.

    Raises RateLimited, and then nothing was counted. Each that was admitted needs one `settle`.
    """
    caller = inbound.caller
    meter, figures = caller.meter, caller.figures
    if meter is not None:
        refusal = meter.take(now)
        inbound.told = left(meter, now)
        if refusal is not None:
            if figures is not None:
                figures.refused[refusal.kind] += 1
            raise _refused(caller.name, refusal)
    if figures is not None:
        figures.requests += 1
        figures.running += 1


def settle(caller: Caller, usage: Usage, now: float) -> None:
    """It is over, with these tokens. Those that were found in the cache count like others."""
    if caller.meter is not None:
        caller.meter.end(now, usage.prompt_tokens + usage.completion_tokens)
    figures = caller.figures
    if figures is not None:
        figures.running -= 1
        figures.prompt_tokens += usage.prompt_tokens
        figures.cached_tokens += usage.cached_tokens
        figures.tokens += usage.completion_tokens


def left(meter: Meter, now: float) -> Headers:
    """What is left of the key's limits, in the headers that clients of OpenAI know."""
    headers: Headers = []
    for sort, room in zip((b"requests", b"tokens"), meter.room(now), strict=True):
        if room is not None:
            headers += (
                (b"x-ratelimit-limit-" + sort, b"%d" % room.limit),
                (b"x-ratelimit-remaining-" + sort, b"%d" % room.left),
                (b"x-ratelimit-reset-" + sort, duration(room.seconds)),
            )
    return headers


def _refused(name: str, refusal: Refusal) -> RateLimited:
    kind, limit, seconds = refusal
    if seconds is None:
        return RateLimited(
            f"the key {name} has as many requests under way over all nodes as its {kind} allows ({limit})",
            retry_after=_AGAIN_SECONDS,
        )
    wait = max(1, math.ceil(seconds))
    return RateLimited(
        f"the key {name} has used its {kind} ({limit}, over all nodes); try again in {wait} s",
        retry_after=wait,
    )


def duration(seconds: float) -> bytes:
    """As OpenAI writes it: `1s`, `6m0s`, `23h59m1s`."""
    whole = max(0, math.ceil(seconds))
    hours, minutes = whole // 3600, whole // 60 % 60
    text = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{text}{whole % 60}s".encode()
