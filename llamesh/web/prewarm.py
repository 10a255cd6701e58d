"""Load a model before anyone asks for it."""

from __future__ import annotations

from typing import Any

import trio

from llamesh.config.cookbook import Profile
from llamesh.core.lifecycle import State
from llamesh.dispatch import Ask, Dispatch
from llamesh.errors import LlameshError
from llamesh.local.pool import Pool
from llamesh.telemetry.logs import get_logger

log = get_logger("prewarm")


class Prewarm:
    """`POST /admin/prewarm`. Many calls for one profile start one instance: they all wait in its queue."""

    def __init__(self, pool: Pool, dispatch: Dispatch) -> None:
        self._pool = pool
        self._dispatch = dispatch
        self._nursery: trio.Nursery | None = None

    async def run(self, profile: Profile, *, wait: bool) -> dict[str, Any]:
        """Have an instance of `profile` ready; return when it is, or at once. Raises LlameshError."""
        if self._is_loaded(profile):
            return {"model": profile.public_name, "status": "loaded"}
        if wait:
            await self._load(profile)
            return {"model": profile.public_name, "status": "loaded"}
        assert self._nursery is not None, "not running"  # noqa: S101
        self._nursery.start_soon(self._load_quietly, profile)
        return {"model": profile.public_name, "status": "loading"}

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the loads that nobody waits for."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def _is_loaded(self, profile: Profile) -> bool:
        return any(i.state is State.READY for i in self._pool.instances(profile.key))

    async def _load(self, profile: Profile) -> None:
        with self._dispatch.join(Ask(profile, "prewarm")) as ticket:
            lease = await ticket.wait()
        if lease is not None:
            lease.release()

    async def _load_quietly(self, profile: Profile) -> None:
        try:
            await self._load(profile)
        except LlameshError as error:
            log.warning("prewarm failed", profile=profile.key, error=error.message)
