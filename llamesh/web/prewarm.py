"""Load a model before anyone asks for it."""

from __future__ import annotations

from typing import Any

import trio

from llamesh.config.cookbook import Profile
from llamesh.core.lifecycle import State
from llamesh.dispatch import Dispatch, Ticket
from llamesh.dispatch.lease import Ask
from llamesh.errors import LlameshError
from llamesh.local.pool import Pool
from llamesh.telemetry.logs import get_logger

log = get_logger("prewarm")

# How often someone far back in the queue looks whether the model is there by now.
_LOOK_SECONDS = 0.25


class Prewarm:
    """`POST /admin/prewarm`. Many calls for one profile start one instance: they all wait in its queue."""

    def __init__(self, pool: Pool, dispatch: Dispatch) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._nursery: trio.Nursery | None = None
        self._quiet: set[str] = set()  # profiles whose load somebody wanted without waiting for it

    async def run(self, profile: Profile, *, wait: bool) -> dict[str, Any]:
        """Have an instance of `profile` ready; return when it is, or at once. Raises LlameshError."""
        if self._is_loaded(profile):
            return {"model": profile.public_name, "status": "loaded"}
        if wait:
            await self._wait(self._join(profile))
            return {"model": profile.public_name, "status": "loaded"}
        assert self._nursery is not None, "not running"  # noqa: S101
        if profile.key not in self._quiet:
            # One place in the queue does for all, however often they ask.
            self._nursery.start_soon(self._wait_quietly, self._join(profile))
            self._quiet.add(profile.key)
        return {"model": profile.public_name, "status": "loading"}

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the loads that nobody waits for."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def _is_loaded(self, profile: Profile) -> bool:
        return any(i.state is State.READY for i in self._pool.instances(profile.key))

    async def _wait(self, ticket: Ticket) -> None:
        """Until it is loaded: busy with others ahead of us is as good as free."""
        with ticket:
            while not self._is_loaded(ticket.ask.profile):
                lease = await ticket.wait(_LOOK_SECONDS)
                if lease is not None:
                    lease.release()
                    return

    async def _wait_quietly(self, ticket: Ticket) -> None:
        key = ticket.ask.profile.key
        try:
            await self._wait(ticket)
        except LlameshError as error:
            log.warning("prewarm failed", profile=key, error=error.message)
        finally:
            self._quiet.discard(key)

    def _join(self, profile: Profile) -> Ticket:
        return self._dispatch.join(Ask(profile, "prewarm", here_only=True))
