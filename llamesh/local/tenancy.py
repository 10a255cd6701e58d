"""An instance as admission sees it."""

from __future__ import annotations

from llamesh.core.capacity import Need, Tenant, keep_value
from llamesh.local.instance import Instance

# What loading takes where it was never measured: all that counts is that it isn't nothing.
_RELOAD_SECONDS = 1.0


def tenant(
    instance: Instance,
    now: float,
    *,
    pinned: bool,
    waiters: int,
    charge: Need,
    load_seconds: float,
    tenure: float,
) -> Tenant:
    """`waiters`: requests in the queue of its profile; `charge`: what it counts with; `load_seconds`: what a
    load of its profile took before, 0 = unknown; `tenure`: seconds that it is safe for while busy.
    """
    # One that has just loaded isn't idle: those it was loaded for are about to come.
    busy = instance.busy_slots > 0 or waiters > 0
    reload_seconds = instance.ready_after or load_seconds or _RELOAD_SECONDS
    served = now - instance.created - instance.ready_after
    return Tenant(
        instance.id,
        instance.state,
        busy,
        charge,
        keep_value(reload_seconds, 0.0 if busy else now - instance.last_used),
        settled=served >= tenure,
        pinned=pinned,
        is_text=instance.profile.kind == "text",
    )
