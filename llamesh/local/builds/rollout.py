"""Moving a running node from one engine to another, without losing a request.

1. From `begin` on, new instances run the new engine; the old ones serve on.
2. The old ones leave one by one, after their requests, idle ones first. The next one leaves when the one
   before is gone and, where somebody waits for its profile, the replacement is ready.
3. The new engine is on trial until an instance of it is ready. A start of it that fails before is
   tried again with the old engine. If it works, the new engine is the reason, and is
   rejected: the node stays with the old one. If it doesn't work either, the model is the reason.
4. The version that is reported changes when the new engine serves, or when nothing of the old one is left.

Everything is decided in `begin` and `note_start`, which don't wait; the task only drains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import trio

from llamesh.core.lifecycle import State
from llamesh.local.builds.record import Hold, hold
from llamesh.local.instance import Instance
from llamesh.local.launch import Engine
from llamesh.local.pool import Pool
from llamesh.telemetry.logs import get_logger

log = get_logger("rollout")

_POLL_SECONDS = 0.1

# So long may it take until the old engine is tried where the new one failed.
_VERDICT_SECONDS = 120.0

# Whoever used it so recently will soon ask again: that long is waited for the next request.
_IN_USE_SECONDS = 60.0
_NEXT_ASKS_SECONDS = 1.0

# On its way out already, or nothing yet.
_STAYING = (State.STARTING, State.READY)


class Rollout:
    """See the module. `on_rejected(engine, why)` is called when an engine turned out not to work."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._target = pool.engine  # what all instances are to run
        self._fallback: Engine | None = None  # what served before, while the target is on trial
        self._suspect: tuple[str, str] | None = None  # key of a profile that failed with the target, and why
        self._suspected_at = 0.0
        self._excused: set[str] = set()  # profiles that fail with the fallback, too
        self._work = trio.Event()
        self._holds: dict[str, Hold] = {}
        self.on_settled: Callable[[], None] = lambda: None  # the trial is over, whatever came of it
        self.on_rejected: Callable[[Engine, str], None] = lambda engine, why: None
        pool.on_start = self.note_start
        self._hold()

    @property
    def target(self) -> Engine:
        """What all instances run, or will."""
        return self._target

    @property
    def on_trial(self) -> bool:
        """Whether the target has yet to serve."""
        return self._fallback is not None

    def begin(self, engine: Engine, before: Path | None = None) -> None:
        """Move to another engine; also in the midst of moving to one. The same one is nothing to do.

        `before`: where the present one is now, if it had to make way.
        """
        if _same(engine, self._target):
            return
        if self._fallback is not None and _same(engine, self._fallback):
            engine, self._fallback = self._fallback, None  # back to what serves
        else:
            # What never served is no fallback; what it was to fall back to still is.
            self._fallback = self._fallback or _moved(self._target, before)
        self._set_target(engine)
        log.info("moving to another engine", engine_version=engine.version, build=engine.build or None)

    async def run(self) -> None:
        """Drain what runs an old engine, for ever."""
        while True:
            await self._work.wait()
            self._work = trio.Event()
            while await self._drain_next():
                pass
            self._report()
            self._hold()

    def note_start(self, instance: Instance, worked: bool) -> None:
        """A start of an instance worked or failed; called before its next try is made."""
        engine, key = instance.engine, instance.profile.key
        if worked:
            if engine is self._target:
                self._prove()
            elif self._suspect is not None and self._suspect[0] == key and engine is self._fallback:
                self._reject(self._suspect[1])
        elif self._fallback is not None and key not in self._excused:
            if engine is self._target:
                self._suspect = (key, str(instance.failure))
                self._suspected_at = trio.current_time()
                self._pool.start_with(self._fallback)
                self._work.set()
            elif engine is self._fallback and self._suspect is not None and self._suspect[0] == key:
                self._suspect = None
                self._excused.add(key)
                self._pool.start_with(self._target)

    # Inside.

    def _set_target(self, engine: Engine) -> None:
        self._target = engine
        self._suspect = None
        self._excused.clear()
        self._pool.start_with(engine)
        self._hold()
        self._work.set()

    def _prove(self) -> None:
        if self._fallback is not None:
            self._fallback, self._suspect = None, None
            self._pool.start_with(self._target)
            log.info(
                "the engine serves", engine_version=self._target.version, build=self._target.build or None
            )
            self._pool.engine = self._target
            self._hold()
            self.on_settled()

    def _reject(self, why: str) -> None:
        assert self._fallback is not None  # noqa: S101
        rejected, fallback = self._target, self._fallback
        self._fallback = None
        self._set_target(fallback)
        self._pool.engine = fallback
        log.error(
            "the new engine can't serve and was taken back",
            engine_version=rejected.version,
            build=rejected.build or None,
            stays_with=fallback.version,
            error=why,
        )
        self.on_rejected(rejected, why)
        self.on_settled()

    async def _drain_next(self) -> bool:
        """Have one instance of an old engine leave; whether there was one."""
        await trio.sleep(_POLL_SECONDS)
        if self._suspect is not None:
            if trio.current_time() - self._suspected_at > _VERDICT_SECONDS:
                # Nobody wants that profile any more: the next start of it, or of another, will tell.
                self._suspect = None
                self._pool.start_with(self._target)
            return True  # who is right isn't known: what serves, stays
        old = [i for i in self._pool.all() if i.engine is not self._target and i.state in _STAYING]
        if not old:
            return any(i.engine is not self._target for i in self._pool.all())
        # What waits for a start of the old engine has waited for long: it is drained like the rest, but last.
        leaving = min(old, key=lambda i: (i.state is State.STARTING, i.busy_slots > 0, i.last_used))
        key = leaving.profile.key
        in_use = leaving.busy_slots > 0 or trio.current_time() - leaving.last_used < _IN_USE_SECONDS
        self._pool.drain((leaving.id,), "another engine takes its place", cause="engine")
        await leaving.wait_gone()
        self._report()
        with trio.move_on_after(_NEXT_ASKS_SECONDS if in_use else 0.0):
            while not self._is_awaited(key):
                await trio.sleep(_POLL_SECONDS)
        while self._is_awaited(key):
            await trio.sleep(_POLL_SECONDS)
        return True

    def _is_awaited(self, key: str) -> bool:
        """Whether the profile's next instance should be ready before another one leaves."""
        if self._suspect is not None:
            return False
        staying = [i for i in self._pool.instances(key) if i.state in _STAYING]
        if any(i.state is State.READY for i in staying):
            return False
        trouble = self._pool.trouble(key)
        if trouble is not None and trouble.exhausted:
            return False
        return bool(staying) or self._pool.queue_length(key) > 0

    def _report(self) -> None:
        if all(i.engine is self._target for i in self._pool.all()):
            self._pool.engine = self._target

    def _hold(self) -> None:
        """No build that is or may be run again is deleted."""
        engines = [self._target, *(i.engine for i in self._pool.all())]
        if self._fallback is not None:
            engines.append(self._fallback)
        used = {engine.command[0]: engine for engine in engines if engine.build}
        for program in [p for p in self._holds if p not in used]:
            self._holds.pop(program).close()
        for program in used:
            if program not in self._holds and (held := hold(program)) is not None:
                self._holds[program] = held


def _moved(engine: Engine, program: Path | None) -> Engine:
    """A program of the user's own, where it is now; a build of ours stays where it is."""
    if program is None or engine.origin != "configured" or engine.build:
        return engine
    return replace(engine, command=(str(program),))


def _same(one: Engine, other: Engine) -> bool:
    return (one.command, one.identity) == (other.command, other.identity)
