"""The weights of this node's profiles: which are here, which are coming, and why others can't be had.

The pool asks `lacking` before each start, and gets an answer at once: None when all is here, else a reason to
wait, or to give up. Asking is what starts a download; however many profiles and requests want the same
weights, there is one. It goes on when they have left, unless `keep_downloading` is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import trio

from llamesh.config.cookbook import Profile
from llamesh.config.current import Current
from llamesh.core.capacity import Later, Never
from llamesh.local.instance import Instance
from llamesh.local.weights.budget import make_room
from llamesh.local.weights.cache import Cache, Record
from llamesh.local.weights.errors import TooSlow, WeightsError
from llamesh.local.weights.fetch import Fetcher
from llamesh.local.weights.progress import Progress
from llamesh.local.weights.source import Neighbours
from llamesh.local.weights.wanted import Wanted, wanted_of, with_weights
from llamesh.telemetry.logs import get_logger

log = get_logger("weights")

# How often the disk is looked at for weights that others fetched or removed.
_LOOK_SECONDS = 3.0

# A download nobody waits for gets so long before it is stopped, where that is set.
_UNWANTED_SECONDS = 5.0

# After a failure, whoever asks is told of it at once for so long; then it is tried anew.
_REST_SECONDS = 10.0
_LONG_REST_SECONDS = 60.0

_WATCH_SECONDS = 1.0
_LOG_SECONDS = 10.0


@dataclass(slots=True)
class _Coming:
    """A download. `keys`: the profiles that asked for it."""

    progress: Progress
    timeout: float
    keys: set[str] = field(default_factory=set)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    wanted_at: float = 0.0


@dataclass(frozen=True, slots=True)
class _Failed:
    error: WeightsError
    until: float


class Master(Protocol):
    """Who needs the weights: the pool. `on_change(key)` is called when `lacking` may say something else of a
    profile; `queue_length(key)` says how many wait for it, `all` what runs.
    """

    on_change: Callable[[str], None]
    queue_length: Callable[[str], int]

    def all(self) -> Iterator[Instance]: ...


class Weights:
    """See the module."""

    def __init__(self, current: Current, cache: Cache, fetcher: Fetcher | None = None) -> None:
        """`fetcher` is for tests."""
        self._master: Master | None = None
        self._current = current
        self.cache = cache
        self._fetcher = fetcher or Fetcher(cache, make_room=self._make_room)
        self._here: dict[Wanted, Record] = {}
        self._coming: dict[Wanted, _Coming] = {}
        self._failed: dict[Wanted, _Failed] = {}
        self._kept: frozenset[str] = frozenset()
        self._nursery: trio.Nursery | None = None

    def attend(self, master: Master) -> None:
        """Whom to tell, and whom to ask."""
        self._master = master

    def ask(self, neighbours: Neighbours) -> None:
        """Who else may have weights: they are asked before the hub is."""
        self._fetcher.neighbours = neighbours

    # Reading.

    def located(self, profile: Profile) -> Profile:
        """The profile with the path of its weights, where they are here; else as it is."""
        wanted = wanted_of(profile)
        record = self._here.get(wanted) if wanted is not None else None
        return profile if record is None else with_weights(profile, record.found)

    def is_here(self, profile: Profile) -> bool:
        """Whether nothing has to be fetched for the profile, as far as is known."""
        wanted = wanted_of(profile)
        return wanted is None or wanted in self._here

    def progress(self, profile: Profile) -> Progress | None:
        """Of the download that the profile waits for, None when there is none."""
        wanted = wanted_of(profile)
        coming = self._coming.get(wanted) if wanted is not None else None
        return coming.progress if coming is not None else None

    def moved(self, profile: Profile) -> float:
        """When the download last got on, in trio's time; minus infinity when there is none."""
        progress = self.progress(profile)
        return progress.moved if progress is not None else -math.inf

    def told(self, profile: Profile, node: str) -> dict[str, object] | None:
        """The `loading` member of a refusal: {model, state, node, progress?, eta_seconds?}; None when
        nothing is downloaded for the profile.
        """
        progress = self.progress(profile)
        if progress is None:
            return None
        return {"model": profile.public_name, "state": "downloading", "node": node, **progress.document()}

    def failure(self, profile: Profile) -> WeightsError | None:
        """Why the last try to have the weights failed, while that holds."""
        wanted = wanted_of(profile)
        failed = self._failed.get(wanted) if wanted is not None else None
        return failed.error if failed is not None and trio.current_time() < failed.until else None

    # Acting.

    def lacking(self, profile: Profile, *, fetch: bool = False) -> Later | Never | None:
        """None when the weights are here; else why not. `fetch`: they are wanted, so start to fetch them."""
        wanted = wanted_of(profile)
        if wanted is None or wanted in self._here:
            return None
        coming = self._coming.get(wanted)
        if coming is None and (error := self.failure(profile)) is not None:
            return Never(f"its weights can't be had: {error}", failed=True)
        if not fetch:
            return Later(str(coming.progress) if coming else f"{wanted.name} has to be fetched first")
        if coming is None:
            coming = self._start(wanted, profile)
        coming.keys.add(profile.key)
        coming.timeout = max(coming.timeout, profile.download_timeout_seconds)
        return Later(str(coming.progress))

    def note_use(self, profile: Profile) -> None:
        """An instance starts: `disk_budget_gb` removes first what wasn't used for longest."""
        wanted = wanted_of(profile)
        if wanted is not None and self._nursery is not None:
            self._nursery.start_soon(self._touch, wanted.key)

    def forget(self, profile: Profile) -> None:
        """A start failed: look at the disk anew before the next one."""
        wanted = wanted_of(profile)
        if wanted is not None:
            self._here.pop(wanted, None)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the downloads. Cancelling it stops them; what has come stays."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await self._look_around()
                await trio.sleep(_LOOK_SECONDS)

    # Inside.

    async def _look_around(self) -> None:
        """What is on the disk, for all profiles: somebody else may have fetched or removed it."""
        self._stop_unwanted()
        by_wish: dict[Wanted, list[str]] = {}
        for profile in self._current.cookbook.profiles:
            if (wanted := wanted_of(profile)) is not None:
                by_wish.setdefault(wanted, []).append(profile.key)
        for wanted in [wanted for wanted in self._here if wanted not in by_wish]:
            del self._here[wanted]
        for wanted, keys in by_wish.items():
            if wanted in self._coming:
                continue
            try:
                record = await self._fetcher.look(wanted)
            except WeightsError as error:
                self._fail(wanted, error)
                continue
            if wanted in self._coming or record == self._here.get(wanted):
                continue
            if record is None:
                del self._here[wanted]
                continue
            self._here[wanted] = record
            self._tell(keys)

    def _stop_unwanted(self) -> None:
        if self._current.settings.keep_downloading:
            return
        now = trio.current_time()
        for coming in self._coming.values():
            if any(self._is_awaited(key) for key in coming.keys):
                coming.wanted_at = now
            elif now - coming.wanted_at > _UNWANTED_SECONDS:
                log.info("nobody waits for a download any more", model=coming.progress.name)
                coming.scope.cancel()

    def _is_awaited(self, key: str) -> bool:
        profile = self._current.cookbook.find(key)
        kept_warm = profile is not None and profile.min_instances > 0
        return kept_warm or (self._master is not None and self._master.queue_length(key) > 0)

    def _tell(self, keys: Iterable[str]) -> None:
        if self._master is not None:
            for key in keys:
                self._master.on_change(key)

    def _start(self, wanted: Wanted, profile: Profile) -> _Coming:
        assert self._nursery is not None, "the weights aren't looked after"  # noqa: S101
        now = trio.current_time()
        progress = Progress(wanted.name, moved=now)
        coming = _Coming(progress, profile.download_timeout_seconds, wanted_at=now)
        self._coming[wanted] = coming
        self._failed.pop(wanted, None)
        self._note_kept()
        self._nursery.start_soon(self._fetch, wanted, coming)
        return coming

    async def _fetch(self, wanted: Wanted, coming: _Coming) -> None:
        try:
            with coming.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._watch, wanted, coming)
                    try:
                        self._here[wanted] = await self._fetcher.obtain(wanted, coming.progress)
                    except WeightsError as error:
                        self._fail(wanted, error)
                    nursery.cancel_scope.cancel()
        finally:
            del self._coming[wanted]
        self._tell(coming.keys)

    async def _watch(self, wanted: Wanted, coming: _Coming) -> None:
        """Tell of it now and then, and end it when it takes too long."""
        began = told = trio.current_time()
        while True:
            now = trio.current_time()
            await trio.sleep(min(_WATCH_SECONDS, max(0.0, began + coming.timeout - now)))
            now = trio.current_time()
            if now - told >= _LOG_SECONDS:
                told = now
                log.info("download", doing=str(coming.progress))
            if now - began >= coming.timeout:
                late = f"still {coming.progress} after {coming.timeout:g} s (download_timeout_seconds)"
                self._fail(wanted, TooSlow(f"{late}; the next try goes on from there"))
                coming.scope.cancel()

    def _fail(self, wanted: Wanted, error: WeightsError) -> None:
        self._here.pop(wanted, None)
        rest = _REST_SECONDS if error.transient else _LONG_REST_SECONDS
        before = self._failed.get(wanted)
        self._failed[wanted] = _Failed(error, trio.current_time() + rest)
        if before is not None and str(before.error) == str(error):
            return
        log.error("weights can't be had", model=wanted.name, error=str(error), next_try_in_seconds=rest)

    async def _touch(self, key: str) -> None:
        await trio.to_thread.run_sync(self.cache.touch, key, abandon_on_cancel=True)

    def _note_kept(self) -> None:
        """What a new download must not push off the disk; read in its thread."""
        running = [wanted_of(instance.profile) for instance in (self._master.all() if self._master else ())]
        self._kept = frozenset(wanted.key for wanted in [*running, *self._coming] if wanted is not None)

    def _make_room(self, size: int) -> None:
        make_room(self.cache, size, self._current.settings.disk_budget_gb, lambda: self._kept)
