"""One llama-server process, from its start to its end, and the slots that it serves.

`run` is the whole life: start the child, wait until `/health` says 200, learn what it reports,
serve until someone asks it to leave, see it off. Everything else here is synchronous, so that the
dispatcher can read the slots and take one without an await in between.

Slots are counted here, not asked for: `active` are leased, `reclaiming` were abandoned by a client
while llama-server still works on them. llama-server notices a lost client at once when it streams
but lets other requests run to their end; until `/slots` says that it is idle, such a slot is busy.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil
import trio

from llamesh.config.cookbook import ModelPath, Profile
from llamesh.core.lifecycle import Event, State, step
from llamesh.local.launch import Engine, Launch, child_environment
from llamesh.local.orphans import Ledger
from llamesh.local.ports import Port
from llamesh.local.process import Child
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

# n_ctx and n_slots as llama-server logs them; wrapper scripts may print them anywhere.
_FACTS = re.compile(r"\b(n_ctx|n_slots|n_ctx_train|n_ctx_slot)\s*=\s*(\d{1,9})\b")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an instance ended that nobody had asked to end."""

    message: str
    exit_code: int | None
    last_words: str

    def __str__(self) -> str:
        if not self.last_words:
            return self.message
        return f"{self.message}; its last words: {self.last_words}"


@dataclass(slots=True)
class Facts:
    """What the child said about itself; 0 where it said nothing (yet)."""

    n_ctx: int = 0
    n_ctx_slot: int = 0
    n_ctx_train: int = 0
    n_slots: int = 0


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
        ledger: Ledger,
        environment: Mapping[str, str],
        on_change: Callable[[Instance], None],
    ) -> None:
        """`slot_limit`: the configured maximum of requests at once, 0 = what the child reports."""
        self.id = id
        self.profile = profile
        self.launch = launch
        self.state = State.STARTING
        self.facts = Facts()
        self.active = 0
        self.reclaiming = 0
        self.failure: Failure | None = None
        self.asked_to_end = False
        self.end_reason = ""
        self.child: Child | None = None
        self.created = self.last_used = self.last_progress = trio.current_time()
        self.ready_after = 0.0  # seconds from start to ready
        self.requests = 0
        self._engine = engine
        self._port = port
        self._slot_limit = slot_limit
        self._ledger = ledger
        self._environment = environment
        self._on_change = on_change
        key = profile.api_key or secrets.token_urlsafe(24)
        self._api_key = key
        self.authorization = b"Bearer " + key.encode()
        self._idle: list[UpstreamConnection] = []
        self._stop = trio.Event()
        self._gone = trio.Event()
        self._reclaim = trio.Event()

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
        return self.active + self.reclaiming

    @property
    def free_slots(self) -> int:
        """Slots that can; 0 unless READY."""
        return self.slots - self.busy_slots if self.state is State.READY else 0

    # Slots.

    def occupy(self) -> None:
        """Take a free slot. The caller has just seen `free_slots` > 0."""
        assert self.free_slots > 0, self  # noqa: S101
        self.active += 1
        self.requests += 1

    def vacate(self, *, abandoned: bool) -> None:
        """Give a slot back. `abandoned`: llama-server may still be working on it."""
        self.active -= 1
        self.last_used = trio.current_time()
        if self.state is State.DRAINING:
            if self.active == 0:
                self._apply(Event.IDLE)
        elif abandoned and self.state is State.READY:
            self.reclaiming += 1
            self._reclaim.set()
        self._on_change(self)

    # Connections to the child.

    def idle_connection(self) -> UpstreamConnection | None:
        """A connection that the child should still hold open, the one used last; None: make one."""
        now = trio.current_time()
        while self._idle:
            connection = self._idle.pop()
            if now - connection.idle_since < connection.idle_limit:
                return connection
            connection.close()
        return None

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
            connection.idle_since = trio.current_time()
            self._idle.append(connection)
        else:
            connection.close()

    def close_stale_connections(self) -> None:
        """Close what the child is about to close; called now and then."""
        now = trio.current_time()
        fresh = [c for c in self._idle if now - c.idle_since < c.idle_limit]
        for connection in self._idle:
            if connection not in fresh:
                connection.close()
        self._idle = fresh

    async def ask(self, target: str) -> tuple[int, Any]:
        """GET `target` from the child: status and decoded JSON (None when it isn't JSON).

        Raises UpstreamBroken, also after ASK_TIMEOUT or at 1 MiB.
        """
        head = f"GET {target} HTTP/1.1\r\nHost: {self.launch.host}\r\n".encode()
        head += b"Authorization: " + self.authorization + b"\r\n\r\n"
        connection = self.idle_connection() or await self.connect()
        body = b""
        try:
            with trio.fail_after(ASK_TIMEOUT):
                await connection.send(head)
                while not connection.response.complete and len(body) < 1 << 20:
                    await connection.read()
                    body += connection.response.take()
        except trio.TooSlowError as error:
            raise UpstreamBroken(f"{self.id} doesn't answer {target}", started=False) from error
        finally:
            self.keep(connection)
        try:
            return connection.response.status, msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return connection.response.status, None

    # Life.

    def drain(self, reason: str) -> None:
        """Take nothing new, end after the last lease. Idempotent."""
        if self.state is State.GONE:
            return
        self.asked_to_end = True
        self.end_reason = self.end_reason or reason
        self._apply(Event.DRAIN)
        if self.state is State.DRAINING and self.active == 0:
            self._apply(Event.IDLE)

    def stop(self, reason: str) -> None:
        """End now, leases or not. Idempotent."""
        if self.state is State.GONE:
            return
        self.asked_to_end = True
        self.end_reason = self.end_reason or reason
        self._apply(Event.STOP)

    async def wait_gone(self) -> None:
        """Return when the process has been reaped and all that it held is free."""
        await self._gone.wait()

    async def run(self) -> None:
        """The whole life; returns when the instance is GONE. Cancelling it kills the child."""
        try:
            await self._live()
        finally:
            for connection in self._idle:
                connection.close()
            self._idle.clear()
            if self.state is not State.GONE:
                self._apply(Event.EXIT)
            self._port.close()
            self.reclaiming = 0
            self._gone.set()
            self._on_change(self)

    async def _live(self) -> None:
        source = self.profile.source
        if isinstance(source, ModelPath) and not Path(source.path).exists():
            # llama-server would say so too, but after a start and in many words.
            self.failure = Failure(f"there is no model file {source.path}", None, "")
            return
        command = [*self._engine.command, *self.launch.arguments]
        environment = child_environment(self._environment, api_key=self._api_key)
        try:
            child = self.child = Child.spawn(command, env=environment, on_line=self._read_line)
        except OSError as error:
            self.failure = Failure(f"can't start {self._engine.command[0]}: {error}", None, "")
            return
        problem = self._ledger.record(child.pid)
        if problem is not None:
            log.warning("if this node is killed, a child may outlive it", problem=problem)
        log.info("starting", instance=self.id, pid=child.pid, port=self.launch.port)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._see_off, child)
                nursery.start_soon(self._serve)
                code = await child.run()
                nursery.cancel_scope.cancel()
        finally:
            self._ledger.forget(child.pid)
        if not self.asked_to_end and self.failure is None:
            when = "before it was ready" if not self.ready_after else "while serving"
            self.failure = Failure(f"llama-server {_ended(code)} {when}", code, child.tail.last_words(5))

    async def _see_off(self, child: Child) -> None:
        await self._stop.wait()
        await child.stop(STOP_GRACE)

    async def _serve(self) -> None:
        if not await self._become_healthy():
            return
        await self._learn()
        if self.state is not State.STARTING:
            return
        self.ready_after = trio.current_time() - self.created
        self.last_used = trio.current_time()
        self._apply(Event.HEALTHY)
        log.info(
            "ready",
            instance=self.id,
            seconds=round(self.ready_after, 3),
            slots=self.slots,
            n_ctx=self.facts.n_ctx,
        )
        self._on_change(self)
        await self._watch_abandoned_slots()

    async def _become_healthy(self) -> bool:
        """Poll `/health`: quickly at first, since a small model is there in 20 ms."""
        limit = self.profile.startup_timeout_seconds
        progress = _Progress(self.child.pid if self.child else 0)
        pause = 0.004
        while self.state is State.STARTING:
            try:
                status, _ = await self.ask("/health")
                if status == 200:
                    return True
            except UpstreamBroken:
                pass  # the port isn't open yet
            now = trio.current_time()
            if progress.moved(self.child.tail.total if self.child else 0, now):
                self.last_progress = now
            if now - self.last_progress > limit:
                words = self.child.tail.last_words(5) if self.child else ""
                self.failure = Failure(f"not ready after {limit:g} s without progress", None, words)
                self.stop("startup timeout")
                return False
            await trio.sleep(pause)
            pause = min(pause * 1.15, 0.25)
        return False

    async def _learn(self) -> None:
        """Ask what it can do. Optional: a wrapper may not know these routes."""
        try:
            status, props = await self.ask("/props")
            if status == 200 and isinstance(props, dict):
                self._take_fact("n_slots", props.get("total_slots"))
                settings = props.get("default_generation_settings")
                if isinstance(settings, dict):
                    self._take_fact("n_ctx_slot", settings.get("n_ctx"))
            if not self.facts.n_ctx_train:
                status, models = await self.ask("/v1/models")
                if status == 200:
                    self._take_fact("n_ctx_train", _dig(models, "data", 0, "meta", "n_ctx_train"))
        except UpstreamBroken as error:
            log.debug("no properties", instance=self.id, error=str(error))
        facts = self.facts
        facts.n_ctx = facts.n_ctx or facts.n_ctx_slot
        facts.n_ctx_slot = facts.n_ctx_slot or facts.n_ctx

    def _take_fact(self, name: str, value: object) -> None:
        if isinstance(value, int) and 0 < value < 1 << 31:
            setattr(self.facts, name, value)

    def _read_line(self, line: str) -> None:
        if self.ready_after:
            return  # later lines talk about requests
        for name, number in _FACTS.findall(line):
            self._take_fact(name, int(number))

    async def _watch_abandoned_slots(self) -> None:
        """Free abandoned slots when llama-server says that nobody works on them."""
        while True:
            self._reclaim = trio.Event()
            if not self.reclaiming:
                await self._reclaim.wait()
            await trio.sleep(RECLAIM_INTERVAL)
            active_before = self.active
            try:
                status, slots = await self.ask("/slots")
            except UpstreamBroken as error:
                # Broken for good means that the process ends, which frees all. Else ask again.
                log.debug("can't ask for slots", instance=self.id, error=str(error))
                continue
            if status != 200 or not isinstance(slots, list):
                # It doesn't have the route: nothing will ever tell. A queue inside llama-server is
                # the lesser evil against a slot that is lost for good.
                freed = self.reclaiming
            else:
                working = sum(1 for slot in slots if isinstance(slot, dict) and slot.get("is_processing"))
                # Leases that are about to be worked on must not hide an abandoned slot: take the
                # larger of the two counts around the question.
                freed = self.reclaiming - max(0, working - min(active_before, self.active))
            if freed > 0:
                self.reclaiming -= min(freed, self.reclaiming)
                self._on_change(self)

    def _apply(self, event: Event) -> None:
        before, self.state = self.state, step(self.state, event)
        if before is not self.state:
            log.debug("state", instance=self.id, before=before.value, state=self.state.value)
            if self.state is State.STOPPING:
                self._stop.set()


class _Progress:
    """Whether a start moves: new log lines, or bytes read, or memory filled, since the last look."""

    def __init__(self, pid: int) -> None:
        self._seen: tuple[int, int] = (-1, -1)
        self._next_look = 0.0
        self._process: psutil.Process | None = None
        with contextlib.suppress(psutil.Error):
            self._process = psutil.Process(pid)

    def moved(self, lines: int, now: float) -> bool:
        """`lines`: the number of lines logged so far. Looks at the process once a second."""
        resident = self._seen[1]
        if now >= self._next_look:
            self._next_look = now + 1.0
            try:
                resident = self._process.memory_info().rss >> 20 if self._process else -1
            except psutil.Error:
                resident = -1
        seen = (lines, resident)
        moved = seen != self._seen
        self._seen = seen
        return moved


def _ended(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"


def _dig(value: Any, *path: str | int) -> Any:
    """value[path[0]][path[1]]..., None where a step isn't there."""
    for name in path:
        try:
            value = value[name]
        except (KeyError, IndexError, TypeError):
            return None
    return value
