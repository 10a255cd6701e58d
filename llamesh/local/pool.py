"""All instances of this node: what runs, what may start, what has to leave.

The pool carries out; it doesn't decide who waits for what (see `dispatch`) nor who may start
(`core.capacity`). A start reserves port and place in the same step in which it was decided; the
reservation ends in one place, when the instance is GONE.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import trio

from llamesh.config.cookbook import Profile
from llamesh.config.settings import Settings
from llamesh.core.capacity import Later, Room, Tenant, room_for_one
from llamesh.core.lifecycle import State
from llamesh.local.instance import Failure, Instance
from llamesh.local.launch import BadArguments, Engine, build_launch, fixed_port
from llamesh.local.orphans import Ledger
from llamesh.local.ports import NoFreePort, Port, Ports
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.stats import NodeStats

log = get_logger("pool")

# A start is tried this often before those who wait for it are told.
MAX_TRIES = 3

# Seconds before the second try; doubles. After the last one, requests fail at once for `_REST`.
_RETRY_PAUSE = 0.1
_REST = 1.0
_REST_MAX = 30.0

# Seconds until a start that found no free port is tried again: a stranger's port makes no event.
_PORT_PAUSE = 1.0

# How often idle instances and connections are looked at, in seconds.
_TICK = 0.5


@dataclass(slots=True)
class Trouble:
    """Failed starts in a row. `rest_until`: trio's time; `next_rest`: after this round, in seconds."""

    failures: int = 0
    last: Failure | None = None
    rest_until: float = 0.0
    next_rest: float = _REST

    @property
    def exhausted(self) -> bool:
        """Whether all tries of this round are used up."""
        return self.failures >= MAX_TRIES


class Pool:
    """See the module. `on_change(profile key)` is called whenever placement may decide anew."""

    def __init__(
        self,
        settings: Settings,
        engine: Engine,
        ports: Ports,
        ledger: Ledger,
        stats: NodeStats,
        learned: LearnedValues,
        *,
        instance_type: type[Instance] = Instance,
    ) -> None:
        """`instance_type` is for tests."""
        self.engine = engine
        self.on_change: Callable[[str], None] = lambda key: None
        self._settings = settings
        self._ports = ports
        self._ledger = ledger
        self._stats = stats
        self._learned = learned
        self._instance_type = instance_type
        self._instances: dict[str, list[Instance]] = {}
        self._trouble: dict[str, Trouble] = {}
        self._count = 0
        self._closed = False
        self._port_wait: set[str] = set()
        self._nursery: trio.Nursery | None = None

    # Reading.

    def instances(self, key: str) -> list[Instance]:
        """The instances of "model:profile" that are not GONE. The list is the pool's own: don't change it."""
        return self._instances.get(key, _NONE)

    def all(self) -> Iterator[Instance]:
        """Every instance that is not GONE."""
        for group in self._instances.values():
            yield from group

    def trouble(self, key: str) -> Trouble | None:
        """The profile's failed starts, None when the last one worked."""
        return self._trouble.get(key)

    def resting(self, key: str) -> bool:
        """Whether the profile's next start has to wait."""
        trouble = self._trouble.get(key)
        return trouble is not None and trio.current_time() < trouble.rest_until

    def max_instances(self, profile: Profile) -> int:
        """How many instances the profile may have at once; 1 where its own arguments fix a port."""
        limit = profile.max_instances
        if limit is None:
            limit = self._settings.model_defaults.max_instances_per_model
        return min(limit, 1) if fixed_port(profile) else limit

    def slots_expected(self, key: str) -> int:
        """How many requests one more instance will take: configured, or what the last one reported."""
        return self._settings.model_defaults.max_concurrent_requests_per_instance or (
            self._learned.of(key).n_slots or 1
        )

    def room(self) -> Room:
        """May one more instance start?"""
        if self._closed:
            return Later("the node is ending")
        tenants = [Tenant(i.id, i.profile.key, i.state, i.busy_slots > 0, i.last_used) for i in self.all()]
        return room_for_one(tenants, max_instances=self._settings.max_instances_per_node)

    # Acting.

    def spawn(self, profile: Profile) -> Instance:
        """Start one more instance; it is STARTING when this returns. Raises NoFreePort, BadArguments.

        After NoFreePort, and OSError where there are no sockets to look with, `on_change` comes again
        when it is time for another try.
        """
        nursery = self._nursery
        assert nursery is not None, "the pool isn't running"  # noqa: S101
        port = self._reserve_port(profile, nursery)
        try:
            launch = build_launch(profile, self.engine, host="127.0.0.1", port=port.number)
        except BadArguments:
            port.close()
            raise
        self._count += 1
        instance = self._instance_type(
            f"{profile.key}#{self._count}",
            profile,
            self.engine,
            launch,
            port,
            slot_limit=self._settings.model_defaults.max_concurrent_requests_per_instance,
            ledger=self._ledger,
            environment=os.environ,
            on_ready=self._note_ready,
            on_change=self._changed,
        )
        self._instances.setdefault(profile.key, []).append(instance)
        self._stats.profile(profile.key).starts_total += 1
        nursery.start_soon(instance.run)
        return instance

    def _reserve_port(self, profile: Profile, nursery: trio.Nursery) -> Port:
        number, key = fixed_port(profile), profile.key
        try:
            return self._ports.claim(number, user=key) if number else self._ports.reserve(user=key)
        except (NoFreePort, OSError):
            if key not in self._port_wait:
                self._port_wait.add(key)
                nursery.start_soon(self._wake_at, key, trio.current_time() + _PORT_PAUSE)
            raise

    def drain(self, ids: tuple[str, ...], reason: str) -> None:
        """Have these instances leave after their requests."""
        for instance in list(self.all()):
            if instance.id in ids:
                log.info("draining", instance=instance.id, reason=reason)
                instance.drain(reason)
                # What was about to be ready isn't any more: those who wait may need another one.
                self.on_change(instance.profile.key)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own all instances. Cancelling it kills them; use `close` for a gentle end."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                while True:
                    await trio.sleep(_TICK)
                    self._tick()
            finally:
                self._closed = True  # whoever still waits doesn't get what is about to be killed

    async def close(self) -> None:
        """End all instances now, leases or not, and return when they are gone (within STOP_GRACE)."""
        self._closed = True
        instances = list(self.all())
        for instance in instances:
            instance.stop("shutdown")
        for instance in instances:
            await instance.wait_gone()

    def _tick(self) -> None:
        now = trio.current_time()
        for instance in list(self.all()):
            instance.close_stale_connections()
            limit = instance.profile.idle_timeout_seconds
            idle = instance.state is State.READY and instance.busy_slots == 0
            if idle and 0 < limit <= now - instance.last_used:
                log.info("draining", instance=instance.id, reason=f"idle for {limit:g} s")
                instance.drain("idle")

    def _changed(self, instance: Instance) -> None:
        """An instance became ready, has a slot less busy, or is gone."""
        if instance.state is State.GONE:
            self._remove(instance)
        self.on_change(instance.profile.key)

    def _note_ready(self, instance: Instance) -> None:
        self._trouble.pop(instance.profile.key, None)
        learned, facts = self._learned.of(instance.profile.key), instance.facts
        learned.n_slots = instance.slots
        learned.n_ctx = facts.n_ctx or learned.n_ctx
        learned.context_length = facts.n_ctx_slot or learned.context_length
        learned.n_ctx_train = facts.n_ctx_train or learned.n_ctx_train
        learned.load_seconds = round(instance.ready_after, 3)
        self._stats.profile(instance.profile.key).load_seconds = instance.ready_after

    def _remove(self, instance: Instance) -> None:
        key = instance.profile.key
        group = self._instances.get(key, [])
        if instance not in group:
            return
        group.remove(instance)
        if not group:
            del self._instances[key]
        if instance.failure is None:
            log.info("gone", instance=instance.id, reason=instance.end_reason)
        elif instance.was_ready:
            self._stats.profile(key).crashes_total += 1
            log.error("crashed", instance=instance.id, error=str(instance.failure))
        else:
            self._note_failed_start(key, instance)

    def _note_failed_start(self, key: str, instance: Instance) -> None:
        now = trio.current_time()
        trouble = self._trouble.setdefault(key, Trouble())
        trouble.last = instance.failure
        self._stats.profile(key).start_failures_total += 1
        if trouble.exhausted and now < trouble.rest_until:
            # Begun beside the one that was the last try of the round, which is over: no new one.
            log.error("start failed", instance=instance.id, error=str(instance.failure))
            return
        trouble.failures = 1 if trouble.exhausted else trouble.failures + 1
        if trouble.exhausted:
            pause = trouble.next_rest
            trouble.next_rest = min(_REST_MAX, pause * 2)
        else:
            pause = _RETRY_PAUSE * 2 ** (trouble.failures - 1)
        trouble.rest_until = now + pause
        log.error(
            "start failed",
            instance=instance.id,
            error=str(instance.failure),
            attempt=trouble.failures,
            next_try_in_seconds=round(pause, 1),
        )
        if self._nursery is not None:
            self._nursery.start_soon(self._wake_at, key, trouble.rest_until)

    async def _wake_at(self, key: str, moment: float) -> None:
        await trio.sleep_until(moment)
        self._port_wait.discard(key)
        self.on_change(key)


_NONE: list[Instance] = []
