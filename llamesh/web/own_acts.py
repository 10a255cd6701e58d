"""What this node does to itself when it is told to: by its own operator, or by that of another node."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from llamesh.config.cookbook import Profile
from llamesh.config.problems import ConfigError
from llamesh.config.store import Store
from llamesh.core.lifecycle import State
from llamesh.dispatch import Dispatch
from llamesh.errors import InvalidRequest, ModelNotFound
from llamesh.local.builds.manager import BuildManager
from llamesh.local.keeper import Keeper
from llamesh.local.pool import Pool
from llamesh.telemetry.logs import get_logger
from llamesh.web.prewarm import Prewarm

log = get_logger("admin")

Document = dict[str, Any]

# status, answer
Answer = tuple[int, Document]

# States in which an instance can be told to leave.
_THERE = (State.STARTING, State.READY, State.DRAINING)

_FOREVER_SECONDS = 100 * 365 * 86400


class OwnActs:
    """The acts by name, see `perform`. Those that need no member take none: a slip of the pen must not mean
    more than was meant.
    """

    def __init__(
        self,
        store: Store,
        pool: Pool,
        dispatch: Dispatch,
        prewarm: Prewarm,
        keeper: Keeper,
        builds: BuildManager,
    ) -> None:
        self.store = store
        self._pool = pool
        self._dispatch = dispatch
        self._prewarmer = prewarm
        self._keeper = keeper
        self._builds = builds
        self._table: dict[str, tuple[Callable[[Document], Awaitable[Answer]], tuple[str, ...]]] = {
            "prewarm": (self._prewarm, ("model", "wait")),
            "unload": (self._unload, ("model",)),
            "drain": (self._drain, ()),
            "undrain": (self._undrain, ()),
            "pause": (self._pause, ("seconds",)),
            "reload": (self._reload, ()),
            "rebuild-llama": (self._rebuild, ()),
            "builds": (self._build_state, ()),
        }

    @property
    def node_id(self) -> str:
        """Of this node."""
        return self.store.current.settings.node_id

    async def perform(self, act: str, document: Document) -> Answer:
        """Do it here. Raises LlameshError, among them InvalidRequest for a member that `act` hasn't."""
        run, members = self._table[act]
        strange = next((name for name in document if name not in members), None)
        if strange is not None:
            takes = " and ".join(f"`{name}`" for name in members) or "no member"
            raise InvalidRequest(
                f"{act} takes {takes} besides `node`, not `{strange[:64]}`", param=strange[:64]
            )
        return await run(document)

    def wanted(self, document: Document) -> Profile:
        """The profile of this node that `model` names. Raises InvalidRequest and ModelNotFound."""
        name = document.get("model")
        if not isinstance(name, str) or not name:
            raise InvalidRequest("`model` must name a model of GET /v1/models", param="model")
        profile = self.store.current.cookbook.find(name)
        if profile is None:
            raise ModelNotFound(f"node {self.node_id} knows no model {name[:120]!r}", param="model")
        return profile

    async def _prewarm(self, document: Document) -> Answer:
        wait = document.get("wait", True)
        if not isinstance(wait, bool):
            raise InvalidRequest("`wait` must be true or false", param="wait")
        outcome = await self._prewarmer.run(self.wanted(document), wait=wait)
        return (200 if outcome["status"] == "loaded" else 202), outcome

    async def _unload(self, document: Document) -> Answer:
        if document:
            key = self.wanted(document).key
            leaving = [i for i in self._pool.instances(key) if i.state in _THERE]
        else:
            leaving = [i for i in self._pool.all() if i.state in _THERE]
        ids = tuple(i.id for i in leaving)
        self._pool.drain(ids, "unloaded on request", cause="unload")
        return 200, {"unloading": list(ids)}

    async def _drain(self, document: Document) -> Answer:
        self._dispatch.drained = True
        log.info("drained on request")
        return 200, {"status": "draining"}

    async def _undrain(self, document: Document) -> Answer:
        self._dispatch.drained = False
        log.info("undrained on request")
        return 200, {"status": "draining" if self._dispatch.closed else "ready"}

    async def _pause(self, document: Document) -> Answer:
        seconds = document.get("seconds", math.inf)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds >= 0:
            raise InvalidRequest("`seconds` must be a number, 0 or more", param="seconds")
        # A hundred years and more are until further notice; what is larger still isn't even a float.
        length = float(seconds) if seconds < _FOREVER_SECONDS else math.inf
        self._keeper.paused_until = trio.current_time() + length
        if length:
            log.info("paused on request", seconds=length if math.isfinite(length) else None)
        else:
            log.info("pause ended on request")
        self._keeper.tick()
        away = self._keeper.away()
        return 200, {"status": "paused" if away else "ready", "reason": away}

    async def _reload(self, document: Document) -> Answer:
        try:
            change = await self.store.reload()
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems[: ConfigError.SHOWN]]
            raise InvalidRequest(
                f"nothing was changed, since there are mistakes: {error}", extra={"problems": problems}
            ) from None
        return 200, {
            "added": list(change.added),
            "removed": list(change.removed),
            "changed": list(change.changed),
            "aliases": list(change.aliases),
            "settings": list(change.settings),
            "needs_restart": list(change.needs_restart),
        }

    async def _rebuild(self, document: Document) -> Answer:
        self._builds.request()
        log.info("rebuild requested")
        return 202, {"status": "started"}

    async def _build_state(self, document: Document) -> Answer:
        return 200, self._builds.document()
