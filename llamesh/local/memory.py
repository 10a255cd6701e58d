"""The memory of this machine: what there is, who has it, what a model will need.

One task looks once a second, in a thread, and never in the way of a request; everything else here
reads the last look and answers at once. What can't be known stays unknown and limits nothing: on a
machine without sensors the configured limits and estimates still hold.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping

import psutil
import trio

from llamesh.config.cookbook import Profile
from llamesh.config.current import Current
from llamesh.core.capacity import Budget, Need
from llamesh.core.devices import visible_devices
from llamesh.core.lifecycle import State
from llamesh.core.memory import Accounts, Claim, account
from llamesh.core.readings import Device, Reading
from llamesh.local.header_cache import HeaderCache
from llamesh.local.instance import Instance
from llamesh.local.launch import Engine, source_arguments
from llamesh.local.sensors import Sensors
from llamesh.local.sizing import MIB, Limits, Size, Sizing
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger

log = get_logger("memory")

SAMPLE_SECONDS = 1.0

# A driver that hangs is left alone for this long at a time.
_SAMPLE_LIMIT = 5.0

# How often files are looked at that might have been replaced.
_FILES_SECONDS = 3.0

# Without a configured limit, instances may take the whole device, or all memory, less this part of it.
_RESERVE = 0.10

# An instance has what it will have, as far as a sensor can tell, this long after it became ready.
_SETTLE_SECONDS = 3.0


class Memory:
    """See the module. `accounts` and `reading` are None until the first look."""

    def __init__(
        self,
        current: Current,
        engine: Engine,
        learned: LearnedValues,
        sensors: Sensors | None = None,
    ) -> None:
        self.reading: Reading | None = None
        self.accounts: Accounts | None = None
        self.intruder = ""  # a running process that `yield_to` names
        # Where the profile's weights are: the pool knows.
        self.locate: Callable[[Profile], Profile] = lambda profile: profile
        self._current = current
        self._learned = learned
        self._sensors = sensors or Sensors()
        self._sizing = Sizing(engine, learned, os.environ, HeaderCache())
        self._problems: frozenset[str] = frozenset()
        # What doesn't change while a driver is silent: devices, the memory of each, who was calm.
        self._devices: tuple[Device, ...] = ()
        self._usable: dict[str, int] = {}
        self._sysmem_total: int | None = None
        self._calm: Mapping[str, int] = {}

    # What a profile needs.

    def size(self, profile: Profile) -> Size | None:
        """What one instance of `profile` needs; None while that isn't known: then `look`."""
        return self._sizing.of(self.locate(profile), self._devices, self._limits(profile.arguments))

    async def look(self, profile: Profile) -> None:
        """Find out what `size` needs to know. Bounded; never raises for what is in a file."""
        await self._sizing.look(self.locate(profile), self._devices, self._limits(profile.arguments))

    def need(self, profile: Profile, *, on_cpu: bool) -> Need:
        """What to reserve for one instance; nothing while its size isn't known."""
        size = self.size(profile)
        if size is None:
            return Need()
        return size.cpu_only if on_cpu and size.cpu_only is not None else size.need

    def forget(self, profile: Profile) -> None:
        """Look anew at the profile's file before its next start."""
        self._sizing.forget(profile)

    def use_engine(self, engine: Engine) -> None:
        """What is started from now on runs `engine`."""
        self._sizing.use_engine(engine)

    # What there is.

    def budget(self) -> Budget:
        """What instances may take, at the most and at present."""
        limits = self._limits()
        vram_now, sysmem_now = limits.vram, limits.sysmem
        accounts = self.accounts
        if accounts is not None:
            # Of a device that is silent just now nothing is known about strangers: it isn't full of them.
            pools = [accounts.devices.get(device.uuid) for device in self._visible(())]
            external = [pool.external for pool in pools if pool is not None and pool.external is not None]
            if external:
                vram_now = _less(limits.vram, self._total_of(self._visible(())), sum(external))
            sysmem_now = _less(limits.sysmem, accounts.sysmem.total, accounts.sysmem.external)
        return Budget(
            self._current.settings.max_instances_per_node, limits.vram, limits.sysmem, vram_now, sysmem_now
        )

    def charge(self, instance: Instance) -> Need:
        """What an instance counts with: what it holds, but at least its reservation until it has settled."""
        held = self.held(instance)
        if held is None:
            return instance.need
        if self._is_settled(instance):
            return held
        return Need(max(held.vram, instance.need.vram), max(held.sysmem, instance.need.sysmem))

    def held(self, instance: Instance) -> Need | None:
        """What an instance was last seen to hold, in MiB; None when it can't be measured."""
        holding = self.accounts.instances.get(instance.id) if self.accounts is not None else None
        if holding is None or not holding.measured or holding.sysmem_bytes is None:
            return None
        return Need(-(-holding.all_devices // MIB), -(-holding.sysmem_bytes // MIB))

    # Looking.

    async def run(self, instances: Callable[[], Iterable[Instance]], looked: Callable[[], None]) -> None:
        """Look once a second for ever; `looked` is called after each."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_files)
                while True:
                    await self.sample(list(instances()))
                    looked()
                    await trio.sleep(SAMPLE_SECONDS)
        finally:
            self._sensors.close()

    async def _watch_files(self) -> None:
        """Know the sizes of all profiles, as their files are now, so that no request waits for that."""
        while True:
            for profile in self._current.cookbook.profiles:
                await self.look(profile)
            await trio.sleep(_FILES_SECONDS)
            await self._sizing.forget_replaced()

    async def sample(self, instances: list[Instance]) -> None:
        """Look once."""
        pids = [i.child.pid for i in instances if i.child is not None]
        names = frozenset(self._current.settings.yield_to)
        now = trio.current_time()
        reading: Reading | None = None
        with trio.move_on_after(_SAMPLE_LIMIT):
            reading, self.intruder = await trio.to_thread.run_sync(
                self._look_in_thread, pids, names, now, abandon_on_cancel=True
            )
        if reading is None:
            log.warning("the sensors don't answer; memory in use is unknown")
            self.reading = self.accounts = None
            return
        self._report(frozenset(reading.problems))
        self._take(reading)
        self.accounts = account(reading, [self._claim(i) for i in instances], calm=self._calm)
        self._calm = self.accounts.calm
        for instance in instances:
            self._learn(instance)

    def _look_in_thread(self, pids: list[int], names: frozenset[str], now: float) -> tuple[Reading, str]:
        return self._sensors.sample(pids, now=now), _running(names) if names else ""

    def _take(self, reading: Reading) -> None:
        self.reading, self._devices = reading, reading.devices
        for device in reading.devices:
            if device.usable_bytes:
                self._usable[device.uuid] = device.usable_bytes
        if reading.sysmem_total is not None:
            self._sysmem_total = reading.sysmem_total

    def _report(self, problems: frozenset[str]) -> None:
        for problem in problems - self._problems:
            log.info("a sensor has nothing to say", problem=problem)
        self._problems = problems

    def _claim(self, instance: Instance) -> Claim:
        need = instance.need
        visible = () if instance.on_cpu else self._visible(instance.profile.arguments)
        share = need.vram * MIB // len(visible) if visible else 0
        return Claim(
            instance.id,
            instance.child.pid if instance.child is not None else None,
            {device.uuid: share for device in visible},
            need.sysmem * MIB,
            settled=self._is_settled(instance),
            mapped_counts=not need.vram,
        )

    def _learn(self, instance: Instance) -> None:
        held = self.held(instance)
        if held is None or not self._is_settled(instance) or instance.on_cpu:
            return
        located = self.locate(instance.profile)
        context = _context_of(instance, located)
        key = self._sizing.argument_key(located, context, self._devices, instance.engine)
        self._learned.note_peak(key, held.vram, held.sysmem)

    @staticmethod
    def _is_settled(instance: Instance) -> bool:
        if not instance.was_ready or instance.state is State.GONE:
            return False
        since_ready = trio.current_time() - instance.created - instance.ready_after
        return since_ready >= _SETTLE_SECONDS

    def _visible(self, arguments: tuple[str, ...]) -> tuple[Device, ...]:
        """The devices that a child with these arguments may use."""
        return visible_devices(self._devices, os.environ, arguments).devices

    def _total_of(self, devices: Iterable[Device]) -> int | None:
        """Bytes of all devices that ever said how much they have; None where none did."""
        known = [self._usable[device.uuid] for device in devices if device.uuid in self._usable]
        return sum(known) if known else None

    def _limits(self, arguments: tuple[str, ...] = ()) -> Limits:
        """The most that instances may take; with `arguments`, that such an instance may."""
        settings = self._current.settings
        total, sysmem = self._total_of(self._visible(arguments)), settings.max_sysmem_mb
        vram = settings.max_vram_mb
        if total is not None:
            # On fewer devices than a limit was made for, it is those that limit.
            vram = round(total * (1 - _RESERVE)) // MIB if vram is None else min(vram, total // MIB)
        if sysmem is None and self._sysmem_total is not None:
            sysmem = round(self._sysmem_total * (1 - _RESERVE)) // MIB
        return Limits(vram, sysmem)


def _context_of(instance: Instance, located: Profile) -> int | None:
    """The context that was passed since the whole one didn't fit."""
    own = (*source_arguments(located), *located.arguments)
    added = instance.launch.arguments[len(own) :]
    return int(added[1]) or None if added[:1] == ("-c",) else None


def _less(limit: int | None, total: int | None, external: int | None) -> int | None:
    """What of the limit (MiB) strangers leave of the total (bytes).

    A tenth of the total stays free for them to grow into, or less where the limit leaves less: only so
    can be seen that they need more, since what is full can't get fuller.
    """
    if limit is None or total is None or external is None:
        return limit
    kept_free = min(_RESERVE * total, max(0, total - limit * MIB))
    return min(limit, int(total - kept_free - external) // MIB)


def _running(names: frozenset[str]) -> str:
    """The first of `names` that is the name of a running process, "" for none. Blocking, some ms."""
    for process in psutil.process_iter(["name"]):
        name = process.info["name"] or ""
        if name in names or name.removesuffix(".exe") in names:
            return name
    return ""
