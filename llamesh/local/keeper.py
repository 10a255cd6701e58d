"""What happens without anybody asking: idle instances leave, warm ones are kept, hung ones are ended.

One task, twice a second; each duty is one method. It acts through the pool only.
"""

from __future__ import annotations

import os

import psutil
import trio

from llamesh.config.current import Current
from llamesh.core.capacity import Fits
from llamesh.core.devices import visible_devices
from llamesh.core.lifecycle import State
from llamesh.core.wedge import Flat, is_wedged, look
from llamesh.local.instance import Instance
from llamesh.local.launch import BadArguments
from llamesh.local.pool import Pool
from llamesh.local.ports import NoFreePort
from llamesh.telemetry.logs import get_logger

log = get_logger("keeper")

_TICK = 0.5


class Keeper:
    """See the module. `away()` says why instances must not run at present, "" when they may."""

    def __init__(self, current: Current, pool: Pool) -> None:
        self._current = current
        self._pool = pool
        self._flat: dict[str, Flat] = {}
        self._next_wedge_look = 0.0
        self.paused_until = 0.0  # trio's time; infinity until further notice

    def away(self) -> str:
        """Why this machine is its owner's now, for people; "" when it isn't."""
        left = self.paused_until - trio.current_time()
        if left > 0:
            return "paused" if left == float("inf") else f"paused for another {left:.0f} s"
        intruder = self._pool.memory.intruder
        return f"{intruder} is running (yield_to)" if intruder else ""

    async def run(self) -> None:
        """Do all duties for ever."""
        while True:
            await trio.sleep(_TICK)
            self.tick()
            await self._end_hung()

    def tick(self) -> None:
        """The duties that need no waiting, once."""
        if away := self.away():
            running = tuple(i.id for i in self._pool.all())
            self._pool.drain(running, away, cause="owner")
        else:
            self._end_idle()
            self._keep_warm()
        for instance in self._pool.all():
            instance.close_stale_connections()
        # Time itself changes decisions: a tenure ends, a rest is over.
        self._pool.on_change("")

    def _end_idle(self) -> None:
        now = trio.current_time()
        for instance in list(self._pool.all()):
            profile = instance.profile
            limit = profile.idle_timeout_seconds
            if instance.state is not State.READY or instance.busy_slots or not limit:
                continue
            warm = len(self._pool.staying(profile.key)) <= profile.min_instances
            if not warm and now - instance.last_used >= limit:
                self._pool.drain((instance.id,), f"idle for {limit:g} s", cause="idle")

    def _keep_warm(self) -> None:
        for profile in self._current.cookbook.profiles:
            pool, key = self._pool, profile.key
            if len(pool.staying(key)) >= profile.min_instances or pool.resting(key):
                continue
            if len(pool.instances(key)) >= pool.max_instances(profile):
                continue
            room = self._pool.room(profile, fetch=True)
            if not isinstance(room, Fits):
                continue
            try:
                self._pool.spawn(profile, on_cpu=room.on_cpu)
            except (NoFreePort, OSError, BadArguments) as error:
                log.debug("can't keep it warm", profile=profile.key, error=str(error))

    async def _end_hung(self) -> None:
        settings = self._current.settings.wedge_detector
        now = trio.current_time()
        if not settings.enabled or now < self._next_wedge_look:
            return
        self._next_wedge_look = now + settings.sample_interval_ms / 1000
        busy = [i for i in self._pool.all() if i.busy_slots and i.child is not None and i.was_ready]
        used = await trio.to_thread.run_sync(_cpu_seconds, [i.child.pid for i in busy if i.child is not None])
        flat: dict[str, Flat] = {}
        for instance, cpu_seconds in zip(busy, used, strict=True):
            gpu = None if settings.cpu_only else self._gpu_use(instance)
            state = look(self._flat.get(instance.id), now=now, busy=True, cpu_seconds=cpu_seconds, gpu=gpu)
            if state is None:
                continue
            flat[instance.id] = state
            if is_wedged(state, window=settings.window_ms / 1000):
                seconds = state.at - state.since
                log.error("hung", instance=instance.id, seconds=round(seconds))
                instance.give_up(f"it held a request for {seconds:.0f} s without using CPU or GPU")
        self._flat = flat

    def _gpu_use(self, instance: Instance) -> float | None:
        """The highest utilisation among the devices that the instance may use, None when unknown."""
        reading = self._pool.memory.reading
        if reading is None:
            return None
        devices = visible_devices(reading.devices, os.environ, instance.profile.arguments).devices
        known = [device.utilisation for device in devices if device.utilisation is not None]
        return max(known) if known else None


def _cpu_seconds(pids: list[int]) -> list[float | None]:
    """CPU time of each process tree since its start; None for one that is gone. Blocking."""
    found: list[float | None] = []
    for pid in pids:
        try:
            root = psutil.Process(pid)
            total = 0.0
            for process in [root, *root.children(recursive=True)]:
                times = process.cpu_times()
                total += times.user + times.system
            found.append(total)
        except psutil.Error:
            found.append(None)
    return found
