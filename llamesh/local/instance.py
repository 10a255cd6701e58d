"""One llama-server process, from its start to its end, and the slots that it serves.

`run` is the whole life: start the child, wait until `/health` says 200, learn what it reports,
serve until someone asks it to leave, see it off. Everything else here is synchronous, so that the
dispatcher can read the slots and take one without an await in between.

Slots are counted here, not asked for; only an abandoned one is, see `local.slots`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import trio

from llamesh.config.cookbook import ModelPath, Profile
from llamesh.core.capacity import Need
from llamesh.core.lifecycle import Event, State, step
from llamesh.local.connections import IdleConnections
from llamesh.local.failure import Failure, ended
from llamesh.local.launch import Engine, Launch, child_environment
from llamesh.local.orphans import Ledger
from llamesh.local.ports import Port
from llamesh.local.process import Child
from llamesh.local.slots import Slots, tasks_at_work
from llamesh.local.startup import Facts, Progress, file_exists
from llamesh.net.exchange import UpstreamBroken, UpstreamConnection
from llamesh.net.transport import connect
from llamesh.telemetry.logs import get_logger

log = get_logger("instance")

# A child that was told to end gets this long; llama-server without requests needs a few ms.
STOP_GRACE = 10.0

# How often an abandoned slot is looked at. Faster polling would itself keep llama-server from
# noticing the lost client (it looks only when it has been quiet for a second).
RECLAIM_INTERVAL = 2.0

# A question to a child that is beside the point of serving: health, props, slots.
ASK_TIMEOUT = 2.0

# More than any reply that is asked for here.
_ASK_BYTES = 1 << 20

NOTHING = Need()


class Instance:
    """See the module. `id` is "model:profile#N", unique in the life of this node."""

    def __init__(
        self,
        id: str,  # noqa: A002
        profile: Profile,
        engine: Engine,
        launch: Launch,
        port: Port,
        *,
        slot_limit: int,
        need: Need = NOTHING,
        on_cpu: bool = False,
        ledger: Ledger,
        environment: Mapping[str, str],
        on_ready: Callable[[Instance], None],
        on_change: Callable[[Instance], None],
    ) -> None:
        """`slot_limit`: the configured maximum of requests at once, 0 = what the child reports.
        `need`: the memory that is reserved for it; `on_cpu`: it was started to leave the GPU alone.

        `on_ready` is called once, when it becomes READY; `on_change` right after that, whenever a
        slot is given back, and last when it is GONE.
        """
        self.id = id
        self.profile = profile
        self.launch = launch
        self.need = need
        self.on_cpu = on_cpu
        self.state = State.STARTING
        self.facts = Facts()
        self.failure: Failure | None = None
        self.asked_to_end = False
        self.end_reason = ""
        self._may_resume = False
        self.child: Child | None = None
        self.created = self.last_used = self.last_progress = trio.current_time()
        self.was_ready = False
        self.ready_after = 0.0  # seconds from start to ready
        self.engine = engine
        self._port = port
        self._slot_limit = slot_limit
        self._ledger = ledger
        self._environment = environment
        self._on_ready = on_ready
        self._on_change = on_change
        key = profile.api_key or secrets.token_urlsafe(24)
        self._api_key = key
        self.authorization = b"Bearer " + key.encode()
        self._idle, self._slots = IdleConnections(), Slots()
        self._stop, self._gone, self._abandoned = trio.Event(), trio.Event(), trio.Event()
        self._progress: Progress | None = None

    def __repr__(self) -> str:
        return f"<Instance {self.id} {self.state.value} {self.busy_slots}/{self.slots} busy>"

    # What placement reads.

    @property
    def slots(self) -> int:
        """How many requests it takes at once: what it reports, or less where configured."""
        reported = self.facts.n_slots
        if self._slot_limit:
            return min(self._slot_limit, reported) if reported else self._slot_limit
        return reported or 1

    @property
    def busy_slots(self) -> int:
        """Slots that can't be given away now."""
        return self._slots.busy

    @property
    def free_slots(self) -> int:
        """Slots that can; 0 unless READY."""
        return self.slots - self.busy_slots if self.state is State.READY else 0

    # Slots.

    def occupy(self) -> int:
        """Take a free slot; the number of the lease. The caller has just seen `free_slots` > 0."""
        assert self.free_slots > 0, self  # noqa: S101
        return self._slots.occupy()

    def vacate(self, lease: int, *, abandoned: bool) -> None:
        """Give a slot back. `abandoned`: llama-server may still be working on it."""
        self.last_used = trio.current_time()
        if abandoned and self.state in (State.READY, State.DRAINING):
            self._slots.abandon(lease)
            self._abandoned.set()
        else:
            self._slots.vacate(lease)
        self._leave_if_unused()
        self._on_change(self)

    # Connections to the child.

    def idle_connection(self) -> UpstreamConnection | None:
        """A connection that the child should still hold open, the one used last; None: make one."""
        return self._idle.take()

    async def connect(self) -> UpstreamConnection:
        """A fresh connection. Raises UpstreamBroken."""
        try:
            with trio.fail_after(ASK_TIMEOUT):
                return UpstreamConnection(await connect(self.launch.host, self.launch.port))
        except (OSError, trio.TooSlowError) as error:
            raise UpstreamBroken(f"{self.id} doesn't accept connections: {error}", started=False) from error

    def keep(self, connection: UpstreamConnection) -> None:
        """Take back a connection after a completed response, if it can serve another request."""
        if connection.reusable and self.state in (State.READY, State.STARTING):
            self._idle.keep(connection)
        else:
            connection.close()

    def close_stale_connections(self) -> None:
        """Close what the child is about to close; called now and then."""
        self._idle.close_stale()

    async def ask(self, target: str) -> tuple[int, Any]:
        """GET `target` from the child: status and decoded JSON (None when it isn't JSON).

        Raises UpstreamBroken, also after ASK_TIMEOUT or at 1 MiB.
        """
        kept = self.idle_connection()
        if kept is not None:
            try:
                return await self._ask_on(kept, target)
            except UpstreamBroken as error:
                if error.started:
                    raise
                # Closed under us, which a child may do whenever it likes.
        return await self._ask_on(await self.connect(), target)

    async def _ask_on(self, connection: UpstreamConnection, target: str) -> tuple[int, Any]:
        head = f"GET {target} HTTP/1.1\r\nHost: {self.launch.host}\r\n".encode()
        head += b"Authorization: " + self.authorization + b"\r\n\r\n"
        body = b""
        try:
            with trio.fail_after(ASK_TIMEOUT):
                await connection.send(head)
                while not connection.response.complete:
                    await connection.read()
                    body += connection.response.take()
                    if len(body) > _ASK_BYTES:
                        raise UpstreamBroken(f"{self.id} answers {target} without end", started=True)
        except trio.TooSlowError as error:
            raise UpstreamBroken(f"{self.id} doesn't answer {target}", started=True) from error
        finally:
            self.keep(connection)
        try:
            return connection.response.status, msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return connection.response.status, None

    # Life.

    def drain(self, reason: str, *, may_resume: bool = False) -> None:
        """Take nothing new, end after the last lease. Idempotent. `may_resume`: unless `resume` comes
        first; another drain for good wins.
        """
        if self.state is State.GONE:
            return
        self._may_resume = may_resume and (self._may_resume or self.state is State.READY)
        self.asked_to_end = True
        self.end_reason = self.end_reason or reason
        self._apply(Event.DRAIN)
        self._leave_if_unused()

    def resume(self) -> bool:
        """Take requests again, if it was drained for somebody who left, and hasn't ended yet."""
        if self.state is not State.DRAINING or not self._may_resume:
            return False
        self._may_resume = self.asked_to_end = False
        self.end_reason = ""
        self._apply(Event.RESUME)
        return True

    def stop(self, reason: str) -> None:
        """End now, leases or not. Idempotent."""
        if self.state is State.GONE:
            return
        self.asked_to_end = True
        self.end_reason = self.end_reason or reason
        self._apply(Event.STOP)

    def give_up(self, why: str) -> None:
        """End now because it doesn't work any more; `why` is what its callers are told."""
        self.failure = self.failure or Failure(why, None, "")
        self.stop("given up")

    async def wait_gone(self) -> None:
        """Return when the process has been reaped and all that it held is free."""
        await self._gone.wait()

    async def run(self) -> None:
        """The whole life; returns when the instance is GONE. Cancelling it kills the child."""
        try:
            await self._live()
        finally:
            self._idle.close()
            if self.state is not State.GONE:
                self._apply(Event.EXIT)
            self._port.close()
            self._slots.release_abandoned()
            self._gone.set()
            self._on_change(self)

    async def _live(self) -> None:
        source = self.profile.source
        if isinstance(source, ModelPath) and not await file_exists(source.path, ASK_TIMEOUT):
            # llama-server would say so too, but after a start and in many words.
            self.failure = Failure(f"there is no model file {source.path}", None, "")
            return
        if self.state is not State.STARTING:
            return  # told to end before it began
        command = [*self.engine.command, *self.launch.arguments]
        environment = child_environment(self._environment, api_key=self._api_key)
        try:
            child = self.child = Child.spawn(command, env=environment, on_line=self._read_line)
        except OSError as error:
            self.failure = Failure(f"can't start {self.engine.command[0]}: {error}", None, "")
            return
        self._progress = Progress(child.pid)
        problem = self._ledger.record(child.pid)
        if problem is not None:
            log.warning("if this node is killed, a child may outlive it", problem=problem)
        log.info("starting", instance=self.id, pid=child.pid, port=self.launch.port)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._see_off, child)
                nursery.start_soon(self._serve, child, self._progress)
                code = await child.run()
                nursery.cancel_scope.cancel()
        finally:
            self._ledger.forget(child.pid)
        if not self.asked_to_end and self.failure is None:
            when = "while serving" if self.was_ready else "before it was ready"
            self.failure = Failure(f"llama-server {ended(code)} {when}", code, child.tail.last_words(5))

    async def _see_off(self, child: Child) -> None:
        await self._stop.wait()
        await child.stop(STOP_GRACE)

    async def _serve(self, child: Child, progress: Progress) -> None:
        if not await self._become_healthy(child, progress):
            return
        await self._learn()
        if self.state is not State.STARTING:
            return
        self.ready_after = trio.current_time() - self.created
        self.last_used = trio.current_time()
        self.was_ready = True
        self._apply(Event.HEALTHY)
        log.info(
            "ready",
            instance=self.id,
            seconds=round(self.ready_after, 3),
            slots=self.slots,
            n_ctx=self.facts.n_ctx,
        )
        self._on_ready(self)
        self._on_change(self)
        await self._watch_abandoned_slots()

    async def _become_healthy(self, child: Child, progress: Progress) -> bool:
        """Poll `/health`: quickly at first, since a small model is there in 20 ms."""
        limit = self.profile.startup_timeout_seconds
        pause = 0.004
        while self.state is State.STARTING:
            try:
                status, _ = await self.ask("/health")
                if status == 200:
                    return True
            except UpstreamBroken:
                pass  # the port isn't open yet
            now = trio.current_time()
            if progress.moved(now):
                self.last_progress = now
            if now - self.last_progress > limit:
                words = child.tail.last_words(5)
                self.failure = Failure(f"not ready after {limit:g} s without progress", None, words)
                self.stop("startup timeout")
                return False
            await trio.sleep(pause)
            pause = min(pause * 1.15, 0.25)
        return False

    async def _learn(self) -> None:
        """Ask what it can do. Optional: a wrapper may not know these routes."""
        try:
            status, reply = await self.ask("/props")
            if status == 200:
                self.facts.read_props(reply)
            if not self.facts.n_ctx_train:
                status, reply = await self.ask("/v1/models")
                if status == 200:
                    self.facts.read_models(reply)
        except UpstreamBroken as error:
            log.debug("no properties", instance=self.id, error=str(error))
        self.facts.complete()

    def _read_line(self, line: str) -> None:
        if self.was_ready:
            return  # later lines talk about requests
        self.facts.read_line(line)
        if self._progress is not None:
            self._progress.read_line(line)

    async def _watch_abandoned_slots(self) -> None:
        """Free abandoned slots when llama-server says that nobody works on them."""
        slots = self._slots
        while True:
            if not slots.abandoned:
                self._abandoned = trio.Event()
                await self._abandoned.wait()
            old = frozenset(slots.leased)
            await trio.sleep(RECLAIM_INTERVAL)
            abandonments = slots.abandonments
            try:
                status, reply = await self.ask("/slots")
            except UpstreamBroken as error:
                # Broken for good means that the process ends, which frees all. Else ask again.
                log.debug("can't ask for slots", instance=self.id, error=str(error))
                continue
            if slots.abandonments != abandonments:
                continue  # the answer may be older than the request that was abandoned
            tasks = tasks_at_work(reply) if status == 200 else None
            if tasks is None:
                # It doesn't have the route: nothing will ever tell. A queue inside llama-server is
                # the lesser evil against a slot that is lost for good.
                slots.release_abandoned()
            elif not slots.look(tasks, old):
                continue
            self._on_change(self)

    def _leave_if_unused(self) -> None:
        if self.state is State.DRAINING and not self._slots.leased:
            self._apply(Event.IDLE)

    def _apply(self, event: Event) -> None:
        before, self.state = self.state, step(self.state, event)
        if before is not self.state:
            log.debug("state", instance=self.id, before=before.value, state=self.state.value)
            if self.state is State.STOPPING:
                self._stop.set()
