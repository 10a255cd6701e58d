"""All instances of this node: what runs, what may start, what has to leave.

The pool carries out; it doesn't decide who waits for what (see `dispatch`) nor who may start
(`core.capacity`). A start reserves memory, port and place in the same step in which it was decided;
the reservation ends in one place, when the instance is GONE.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import replace

import trio

from llamesh.config.cookbook import Profile
from llamesh.config.current import Current
from llamesh.config.store import runs_the_same
from llamesh.core.capacity import (
    LEAVING,
    Evict,
    Fits,
    Later,
    Need,
    Never,
    Room,
    Tenant,
    over_budget,
    room,
    room_after_failure,
    room_beside_text,
)
from llamesh.core.lifecycle import State
from llamesh.local.instance import Instance
from llamesh.local.launch import BadArguments, Engine, build_launch, fixed_port
from llamesh.local.memory import Memory
from llamesh.local.orphans import Ledger
from llamesh.local.ports import Ports
from llamesh.local.promises import Promises
from llamesh.local.tenancy import tenant
from llamesh.local.troubles import Trouble, Troubles
from llamesh.local.weights import Weights, find_cache
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.stats import NodeStats

log = get_logger("pool")


class Pool:
    """See the module. `on_change(profile key)` is called whenever placement may decide anew.

    `queue_length(profile key)` is asked for who waits; the dispatcher sets both. `on_start(instance, worked)`
    is called when a start worked or failed. `engine` is the one that serves; see `start_with`.
    """

    def __init__(
        self,
        current: Current,
        engine: Engine,
        ports: Ports,
        ledger: Ledger,
        stats: NodeStats,
        learned: LearnedValues,
        memory: Memory,
        weights: Weights | None = None,
        *,
        instance_type: type[Instance] = Instance,
    ) -> None:
        """`weights`: of the cache that the environment names, unless given; `instance_type` is for tests."""
        self.engine = engine
        self._starts = engine  # what new instances run
        self.memory = memory
        self.on_start: Callable[[Instance, bool], None] = lambda instance, worked: None
        self.on_change: Callable[[str], None] = lambda key: None
        self.queue_length: Callable[[str], int] = lambda key: 0
        self.evictions: Counter[str] = Counter()  # by reason
        self.last_gone: deque[Instance] = deque(maxlen=8)  # for what they said
        self.weights = weights or Weights(current, find_cache(os.environ))
        self.weights.attend(self)
        memory.locate = self.weights.located
        self._current = current
        self._ports = ports
        self._ledger = ledger
        self._stats = stats
        self._learned = learned
        self._instance_type = instance_type
        self._instances: dict[str, list[Instance]] = {}
        self._promises = Promises()
        self._troubles = Troubles()
        self._count = 0
        self._closed = False
        self._looking: set[str] = set()
        self._nursery: trio.Nursery | None = None

    # Reading.

    def instances(self, key: str) -> list[Instance]:
        """The instances of "model:profile" that are not GONE. The list is the pool's own: don't change it."""
        return self._instances.get(key, _NONE)

    def all(self) -> Iterator[Instance]:
        """Every instance that is not GONE."""
        for group in self._instances.values():
            yield from group

    def staying(self, key: str) -> list[Instance]:
        """The profile's instances that aren't on their way out."""
        return [i for i in self.instances(key) if i.state not in LEAVING]

    def trouble(self, key: str) -> Trouble | None:
        """The profile's failed starts and crashes, None when there are none."""
        return self._troubles.of(key)

    def resting(self, key: str) -> bool:
        """Whether the profile's next start has to wait."""
        return self._troubles.resting(key, trio.current_time())

    def max_instances(self, profile: Profile) -> int:
        """How many instances the profile may have at once; 1 where its own arguments fix a port."""
        limit = profile.max_instances
        if limit is None:
            limit = max(self._current.settings.model_defaults.max_instances_per_model, profile.min_instances)
        return min(limit, 1) if fixed_port(profile) else limit

    def slots_expected(self, key: str) -> int:
        """How many requests one more instance will take: configured, or what the last one reported."""
        configured = self._current.settings.model_defaults.max_concurrent_requests_per_instance
        return configured or self._learned.of(key).slots_on(self._starts.identity) or 1

    def room(self, profile: Profile, *, fetch: bool = False) -> Room:
        """May one more instance of `profile` start? Later, too, while its size isn't known yet. `fetch`: it
        is to start, so weights that aren't here are fetched; who only asks starts no download.
        """
        if self._closed:
            return Later("the node is ending")
        most = self.max_instances(profile)
        if most and (lacking := self.weights.lacking(profile, fetch=fetch)) is not None:
            return lacking
        size = self.memory.size(profile)
        if size is None:
            self._look(profile)
            return Later(f"reading the file of {profile.key}")
        if size.too_large or size.unreachable:
            return Never(size.too_large or size.unreachable, failed=bool(size.unreachable))
        if len(self.instances(profile.key)) >= most:
            return Later("it has all the instances it may have")
        tenants = self.tenants()
        if self.staying(profile.key):
            # Nobody's requests have to make way for one instance more of a model that is served already.
            tenants = [replace(t, settled=False) for t in tenants]
        budget, promised = self.memory.budget(), self._promises.before(profile.key)
        if profile.kind == "text":
            answer = room(size.need, tenants, budget, promised=promised)
        else:
            answer = room_beside_text(size.need, size.cpu_only, tenants, budget, promised=promised)
        if isinstance(answer, Fits | Evict):
            trouble = self._troubles.of(profile.key)
            # Where a whole round of tries didn't help, nobody leaves again.
            if trouble is not None and trouble.out_of_memory and not trouble.rounds:
                is_text, busy = profile.kind == "text", trouble.out_of_memory > 1
                return room_after_failure(tenants, answer, is_text=is_text, busy_too=busy)
        return answer

    def can_spawn(self) -> bool:
        """Whether an instance of some size could start, now or after an idle one has left."""
        answer = room(Need(), self.tenants(), self.memory.budget())
        return not self._closed and isinstance(answer, Fits | Evict)

    def tenants(self) -> list[Tenant]:
        """All instances as admission sees them."""
        now = trio.current_time()
        found = []
        for group in self._instances.values():
            staying = 0
            for instance in group:
                if instance.state not in LEAVING:
                    staying += 1
                found.append(self._tenant(instance, now, pinned=staying <= instance.profile.min_instances))
        return found

    def _tenant(self, instance: Instance, now: float, *, pinned: bool) -> Tenant:
        profile = instance.profile
        tenure = profile.min_eviction_tenure_secs
        if tenure is None:
            tenure = self._current.settings.model_defaults.min_eviction_tenure_secs
        return tenant(
            instance,
            now,
            pinned=pinned,
            waiters=self.queue_length(profile.key),
            charge=self.memory.charge(instance),
            load_seconds=self._learned.of(profile.key).load_seconds,
            tenure=tenure,
        )

    # Acting.

    def start_with(self, engine: Engine) -> None:
        """What is started from now on runs `engine`. What runs isn't touched, and `engine` still names it."""
        self._starts = engine
        self.memory.use_engine(engine)

    def spawn(self, profile: Profile, *, on_cpu: bool = False) -> Instance:
        """Start one more instance; it is STARTING when this returns. Raises NoFreePort, BadArguments,
        and OSError where there are no sockets to look for a port with. The keeper has it tried again.
        """
        nursery = self._nursery
        assert nursery is not None, "the pool isn't running"  # noqa: S101
        size = self.memory.size(profile)
        context = size.context if size is not None else None
        number, key, here = fixed_port(profile), profile.key, self.weights.located(profile)
        port = self._ports.claim(number, user=key) if number else self._ports.reserve(user=key)
        try:
            launch = build_launch(
                here, self._starts, host="127.0.0.1", port=port.number, context=context, on_cpu=on_cpu
            )
        except BadArguments:
            port.close()
            raise
        self._count += 1
        instance = self._instance_type(
            f"{key}#{self._count}",
            profile,
            self._starts,
            launch,
            port,
            slot_limit=self._current.settings.model_defaults.max_concurrent_requests_per_instance,
            need=self.memory.need(profile, on_cpu=on_cpu),
            on_cpu=on_cpu,
            ledger=self._ledger,
            environment=os.environ,
            on_ready=self._note_ready,
            on_change=self._changed,
        )
        self._instances.setdefault(key, []).append(instance)
        self._stats.profile(key).starts_total += 1
        nursery.start_soon(instance.run)
        self.weights.note_use(profile)
        self.forgo(key)
        return instance

    def drain(self, ids: tuple[str, ...], reason: str, *, cause: str, may_resume: bool = False) -> None:
        """Have these instances leave after their requests. `cause`: a word for the metrics."""
        changed = []
        for instance in list(self.all()):
            if instance.id not in ids or instance.state is State.STOPPING:
                continue
            if instance.state is not State.DRAINING:
                log.info("draining", instance=instance.id, reason=reason)
                self.evictions[cause] += 1
                changed.append(instance.profile.key)
            # Also one that is draining: it may have been for somebody only, and now it is for good.
            instance.drain(reason, may_resume=may_resume)
        # What was about to be ready isn't any more: those who wait may need another one.
        for key in changed:
            self.on_change(key)

    def make_room(self, profile: Profile, ids: tuple[str, ...], *, on_cpu: bool = False) -> None:
        """Drain these for one more instance of `profile`. What they leave is promised to it, until it is
        started or `forgo` is called.
        """
        key = profile.key
        self._promises.make(key, self.memory.need(profile, on_cpu=on_cpu), ids)
        self.drain(ids, f"room for {key}", cause="room", may_resume=True)

    def is_making_room(self, key: str) -> bool:
        """Whether somebody is still about to leave for the profile."""
        leaves = self._promises.leaves(key)
        return bool(leaves) and any(i.id in leaves for i in self.all())

    def forgo(self, key: str) -> None:
        """The profile doesn't need the room that is being made for it, or has taken it: who was to leave
        for it and hasn't ended yet serves again.
        """
        leaves = self._promises.end(key)
        if not leaves:
            return
        for instance in list(self.all()):
            if instance.id in leaves and instance.resume():
                log.info("serving again", instance=instance.id)
        self.on_change(key)

    def leave_strangers_their_memory(self) -> None:
        """Others' use broke the budget after our loads: instances leave until the rest fits."""
        ids = over_budget(self.tenants(), self.memory.budget())
        if ids:
            self.drain(ids, "other programs need the memory", cause="strangers")

    def apply_cookbook(self) -> None:
        """The cookbook has changed: what is gone or runs differently leaves, the rest isn't touched."""
        for instance in list(self.all()):
            now = self._current.cookbook.find(instance.profile.key)
            # Found by an alias, or spelled otherwise now, it is another profile: keys are exact.
            if now is None or now.key != instance.profile.key:
                self.drain((instance.id,), "no longer in the cookbook", cause="reload")
            elif not runs_the_same(now, instance.profile):
                self.drain((instance.id,), "changed in the cookbook", cause="reload")
            else:
                instance.profile = now

        def changed(key: str, tried: Profile | None) -> bool:
            now = self._current.cookbook.find(key)
            return now is None or tried is None or not runs_the_same(now, tried)

        self._troubles.forget(changed)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own all instances. Cancelling it kills them; use `close` for a gentle end."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self.weights.run)
            task_status.started()
            try:
                await trio.sleep_forever()
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

    def _look(self, profile: Profile) -> None:
        if profile.key not in self._looking and self._nursery is not None:
            self._looking.add(profile.key)
            self._nursery.start_soon(self._look_and_tell, profile)

    async def _look_and_tell(self, profile: Profile) -> None:
        try:
            await self.memory.look(profile)
        finally:
            self._looking.discard(profile.key)
        self.on_change(profile.key)

    # Told by instances.

    def _changed(self, instance: Instance) -> None:
        """An instance became ready, has a slot less busy, or is gone."""
        if instance.state is State.GONE:
            self._remove(instance)
        self.on_change(instance.profile.key)

    def _note_ready(self, instance: Instance) -> None:
        key = instance.profile.key
        self._troubles.note_ready(key)
        self.on_start(instance, True)
        learned = self._learned.of(key)
        learned.note_start(instance.engine.identity, instance.facts, instance.slots, instance.ready_after)
        stats = self._stats.profile(key)
        stats.load_seconds = instance.ready_after
        stats.start_seconds.observe(instance.ready_after)

    def _remove(self, instance: Instance) -> None:
        key = instance.profile.key
        group = self._instances.get(key, [])
        if instance not in group:
            return
        group.remove(instance)
        self.last_gone.append(instance)
        if not group:
            del self._instances[key]
        now, failure = trio.current_time(), instance.failure
        if failure is None:
            log.info("gone", instance=instance.id, reason=instance.end_reason)
        elif instance.was_ready:
            self._stats.profile(key).crashes_total += 1
            pause = self._troubles.note_crash(instance.profile, now)
            log.error("crashed", instance=instance.id, error=str(failure), next_start_in_seconds=pause)
            self._wake_later(key, pause)
        else:
            self._stats.profile(key).start_failures_total += 1
            self.memory.forget(instance.profile)  # the file may be another one by now
            self.on_start(instance, False)
            self.weights.forget(instance.profile)
            trouble, again = self._troubles.note_failed_start(instance.profile, failure, now)
            log.error(
                "start failed",
                instance=instance.id,
                error=str(failure),
                attempt=trouble.failures,
                next_try_in_seconds=again,
            )
            self._wake_later(key, again)

    def _wake_later(self, key: str, pause: float | None) -> None:
        async def wake(moment: float) -> None:
            await trio.sleep_until(moment)
            self.on_change(key)

        if pause and self._nursery is not None:
            self._nursery.start_soon(wake, trio.current_time() + pause)


_NONE: list[Instance] = []
