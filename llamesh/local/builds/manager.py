"""When a running node builds: at its start where something is missing, now and then, and when it is told to.

One build at a time, in a task of the node; a failure is told and changes nothing. What was built is
handed to the `Rollout`. A build that somebody else made live (`llamesh build`) is taken over, too.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import trio

from llamesh.config.sections import LlamaCpp
from llamesh.core.builds import boot_pause
from llamesh.errors import Conflict, InvalidRequest
from llamesh.local.builds.compile import COMPILE, CONFIGURE
from llamesh.local.builds.doctor import unused_gpus
from llamesh.local.builds.failure import BuildFailed, TriedBefore
from llamesh.local.builds.maker import CHECK, Plan, Progress, make
from llamesh.local.builds.record import Build
from llamesh.local.builds.rollout import Rollout
from llamesh.local.builds.store import Store
from llamesh.local.builds.trial_server import STAGE as TEST
from llamesh.local.launch import Engine, EngineNotFound, find_engine
from llamesh.local.pool import Pool
from llamesh.telemetry.logs import get_logger

log = get_logger("builds")

# How often is looked where `binary_path` leads: a readlink.
_LOOK_SECONDS = 2.0

# Progress is logged at each so many percent.
_LOG_PERCENT = 10


class BuildManager:
    """See the module. `stop` ends a build that runs, and all further ones."""

    def __init__(self, settings: LlamaCpp, pool: Pool, node_id: str) -> None:
        self.outcomes: Counter[str] = Counter()  # built, unchanged, failed, rejected
        self.progress = Progress()
        self._settings = settings
        self._pool = pool
        self._node = node_id
        self._store = Store(settings.build_path, settings.binary_path)
        self._rollout = Rollout(pool)
        self._rollout.on_rejected = self._take_back
        self._rollout.on_settled = self._tidy_up
        self._unusable: dict[str, str] = {}  # keys of builds that failed in this life, and why
        self._before: Path | None = None  # the program that served before the one on trial
        self._running = False
        self._booting = True
        self._untidy = False  # builds may have become too many
        self._wanted = trio.Event()
        self._scope = trio.CancelScope()
        self._last: dict[str, Any] | None = None
        self._logged = ("", -1)
        self.progress.changed = self._log_progress

    def request(self) -> None:
        """Look for a newer commit and build it. Raises Conflict while that is going on, InvalidRequest."""
        if not self._settings.enabled:
            raise InvalidRequest(
                f"node {self._node} doesn't build: set llama_cpp.enabled, or run `llamesh build` there"
            )
        if self._running or self._wanted.is_set():
            raise Conflict(
                f"node {self._node} is building already: {self.progress.stage or 'about to begin'}"
            )
        self._unusable.clear()
        self._wanted.set()

    def stop(self) -> None:
        """End it, with all that it started. Idempotent."""
        self._scope.cancel()

    def document(self) -> dict[str, Any]:
        """What goes on, for people and programs; names are stable.

        `state`: "building" or "idle"; while it builds `stage`, `percent` of the stage or null, `commit` and
        `log`, the last lines; `last`: what came of the last one; `live`: the build in use, or null.
        """
        progress, target = self.progress, self._rollout.target
        building = {
            "stage": progress.stage,
            "percent": progress.percent,
            "commit": progress.commit or None,
            "log": list(progress.tail)[-10:],
        }
        return {
            "enabled": self._settings.enabled,
            "state": "building" if self._running else "idle",
            **(building if self._running else {}),
            "engine": {
                "version": target.version,
                "build": target.build or None,
                "on_trial": self._rollout.on_trial,
            },
            "last": self._last,
        }

    async def run(self) -> None:
        """Do all that for ever, or until `stop`."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._rollout.run)
                nursery.start_soon(self._follow_link)
                nursery.start_soon(self._tell_unused_gpus)
                if self._settings.enabled:
                    nursery.start_soon(self._work)

    # Inside.

    async def _work(self) -> None:
        interval = self._settings.auto_update_interval_seconds or math.inf
        due = interval < math.inf or await self._is_missing()
        failures = 0
        while True:
            if due or self._wanted.is_set():
                asked, self._wanted = self._wanted.is_set(), trio.Event()
                worked = await self._attempt(asked=asked)
                failures = 0 if worked else failures + 1
            # Only at the start is a failure tried again soon: there, nothing else may serve.
            self._booting = self._booting and failures > 0
            pause = min(interval, boot_pause(failures)) if self._booting else interval
            with trio.move_on_after(pause) as waiting:
                await self._wanted.wait()
            due = waiting.cancelled_caught

    async def _tell_unused_gpus(self) -> None:
        for sentence in await unused_gpus(self._pool.engine, os.environ):
            log.warning("a GPU isn't used", problem=sentence)

    async def _is_missing(self) -> bool:
        """Whether there is no build of ours that was made the way it is wanted now."""
        live = await trio.to_thread.run_sync(self._store.live)
        if live is None:
            return True
        try:
            plan = await trio.to_thread.run_sync(Plan.of, self._settings, os.environ, self.progress.line)
        except BuildFailed:
            return True  # the attempt tells why
        return live.recipe != plan.recipe.name or live.source != plan.shown

    async def _attempt(self, *, asked: bool) -> bool:
        """One build, or the look for a newer commit; whether it worked. Never raises for a build's sake."""
        started, self._running = time.time(), True
        self.progress.tail.clear()
        try:
            made = await make(
                self._settings,
                self._store,
                os.environ,
                self.progress,
                may_use=lambda build, key: asked or self._may_use(build, key),
            )
            if made.changed:
                await self._take_over(made.before)
                self._untidy = True
            self._note(
                "built" if made.changed else "unchanged", started, made.build, aloud=made.changed or asked
            )
            return True
        except TriedBefore as error:
            log.debug("no new build", reason=str(error))
            return True
        except (BuildFailed, EngineNotFound) as error:
            self._fail(error, started)
            return False
        except OSError as error:
            self._fail(BuildFailed(self.progress.stage or "building", str(error)), started)
            return False
        finally:
            self._running = False

    def _may_use(self, build: Build | None, key: str) -> bool:
        return key not in self._unusable and not (build is not None and build.rejected)

    async def _take_over(self, before: Path | None) -> None:
        """Have the node run what `binary_path` leads to; `before`: what it led to."""
        engine = await find_engine(self._settings.binary_path)
        if not self._rollout.on_trial:
            self._before = before
        self._rollout.begin(engine, before)

    def _note(self, outcome: str, started: float, build: Build, *, aloud: bool) -> None:
        self.outcomes[outcome] += 1
        seconds = round(time.time() - started, 1)
        self._last = {"outcome": outcome, "at": round(started), "seconds": seconds, "commit": build.commit}
        if build.always and outcome == "built":
            log.error(
                "this build mixes up conversations in its prompt cache in host memory, and is run without",
                build=build.key,
                arguments=" ".join(build.always),
            )
        tell = log.info if aloud else log.debug
        tell(
            f"engine {outcome}", commit=build.commit, build=build.key, version=build.version, seconds=seconds
        )

    def _fail(self, error: BuildFailed | EngineNotFound, started: float) -> None:
        self.outcomes["failed"] += 1
        if not self._booting and isinstance(error, BuildFailed) and error.stage in (CONFIGURE, COMPILE, TEST):
            # It would fail again at each look; whoever asks for it by hand gets another try.
            self._unusable[self.progress.key] = str(error)
        self._last = {"outcome": "failed", "at": round(started), "seconds": round(time.time() - started, 1)}
        self._last |= {"commit": self.progress.commit or None, "error": str(error)}
        if isinstance(error, BuildFailed):
            self._last |= {
                "stage": error.stage,
                "command": error.command or None,
                "exit_code": error.exit_code,
                "last_lines": list(error.last_lines),
            }
        log.error(
            "build failed; the engine in use stays", **{k: v for k, v in self._last.items() if k != "at"}
        )

    def _take_back(self, engine: Engine, why: str) -> None:
        """The new engine can't serve: `binary_path` leads to what served before."""
        self.outcomes["rejected"] += 1
        self._unusable[engine.build] = why
        self._last = {"outcome": "rejected", "at": round(time.time()), "build": engine.build, "error": why}
        self._store.reject(engine.build, why)
        try:
            self._store.lead_back(self._before)
        except BuildFailed as error:
            log.error("llama_cpp.binary_path still leads to the engine that can't serve", error=str(error))

    async def _follow_link(self) -> None:
        """Take over what somebody else makes live: another process that builds, or the user by hand."""
        while True:
            await trio.sleep(_LOOK_SECONDS)
            if self._running:
                continue
            if self._untidy:
                self._untidy = False
                await trio.to_thread.run_sync(self._store.prune, self._settings.keep_builds)
            live = await trio.to_thread.run_sync(self._store.live)
            if live is None or live.key == self._rollout.target.build or live.key in self._unusable:
                continue
            served = self._rollout.target
            try:
                await self._take_over(Path(served.command[0]) if served.build else None)
            except EngineNotFound as error:
                log.warning("the engine at llama_cpp.binary_path can't be used", error=str(error))

    def _tidy_up(self) -> None:
        self._untidy = True

    def _log_progress(self) -> None:
        progress = self.progress
        tenth = int((progress.percent or 0) // _LOG_PERCENT)
        worth_it = progress.stage not in ("", CHECK) and self._running
        if worth_it and (progress.stage, tenth) != self._logged:
            log.info(
                "building", stage=progress.stage, percent=progress.percent, commit=progress.commit or None
            )
        self._logged = (progress.stage, tenth)
