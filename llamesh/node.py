"""The composition root: builds the parts, opens the root nursery, orders the shutdown.

Shutdown, on SIGTERM or SIGINT
1. draining: `/readyz` says 503, new requests are answered 503 `draining`; queued and running ones go on
2. when the last request has ended, or the grace is over, instances are told to end
3. connections close, learned values are saved, the process ends with 0
Where the listening sockets were passed to us, somebody holds them for our successor. Then step 1 is to accept
nothing more (who comes waits in the backlog), and requests on connections that are open are still served,
each as the last of its connection.
A second signal, whenever it comes, skips what is left of that: instances are killed, connections cut.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, cast

import trio

import llamesh
from llamesh.config.effect import without_effect
from llamesh.config.problems import ConfigError
from llamesh.config.store import Change, Store
from llamesh.dispatch import Dispatch
from llamesh.errors import Draining
from llamesh.local.builds.manager import BuildManager
from llamesh.local.keeper import Keeper
from llamesh.local.launch import Engine
from llamesh.local.memory import Memory
from llamesh.local.orphans import Ledger
from llamesh.local.pool import Pool
from llamesh.local.ports import Ports
from llamesh.local.weights.folder import ModelsFolder
from llamesh.service import BadHandover, Notifier, reload_at_hangup, take_sockets
from llamesh.telemetry.audit import Audit
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.prometheus import NodeCollector
from llamesh.telemetry.stats import NodeStats
from llamesh.web.admin import Administration
from llamesh.web.app import build_app
from llamesh.web.asgi import Application, Asgi
from llamesh.web.exposure import Exposure
from llamesh.web.fast_lane import FastLane
from llamesh.web.gateway import Gateway
from llamesh.web.listener import Listener, bind
from llamesh.web.own_acts import OwnActs
from llamesh.web.pages import Pages
from llamesh.web.prewarm import Prewarm
from llamesh.web.slow_lane import HypercornLane
from llamesh.web.views import Views

if TYPE_CHECKING:
    from llamesh.cluster import Cluster, Member

log = get_logger("node")

# Learned values are written this often, when they changed.
_SAVE_SECONDS = 30.0

# After the grace: answers on their way to clients and the ends of children still get this long.
_LAST_SECONDS = 15.0

# Kept connections without a request may bring one more for so long, before a successor takes over.
_LINGER_SECONDS = 1.0


class Node:
    """One node of the mesh."""

    def __init__(
        self, store: Store, engine: Engine, member: Member | None = None, audit: Audit | None = None
    ) -> None:
        """`member`: who this node is in the mesh, None where it is alone; `audit`: None where it is off."""
        self.store = store
        self.notifier = Notifier()  # of what a service manager wants to know
        self.handed_on = False  # the listening sockets outlive us
        current = store.current
        settings = self.settings = current.settings  # those that need a restart
        self.stats = NodeStats()
        metrics = settings.metrics_path
        self.learned = LearnedValues(metrics)
        self.ledger = Ledger(metrics.with_name(metrics.name + ".children"))
        ports = Ports(settings.llama_cpp_ports.all_ports(), {settings.listen_addr.port})
        self.memory = Memory(current, engine, self.learned)
        self.pool = Pool(current, engine, ports, self.ledger, self.stats, self.learned, self.memory)
        self.keeper = Keeper(current, self.pool)
        self.dispatch = Dispatch(current, self.pool, self.learned)
        self.dispatch.away = self.keeper.away
        self.builds = BuildManager(settings.llama_cpp, self.pool, settings.node_id)
        self.stats.builds = self.builds.outcomes
        self.prewarm = Prewarm(self.pool, self.dispatch)
        self.gateway = Gateway(current, self.dispatch, self.stats, audit)
        self.pages = Pages(
            store,
            self.pool,
            self.dispatch,
            self.stats,
            self.learned,
            self.gateway.access,
        )
        administration = Administration(
            OwnActs(store, self.pool, self.dispatch, self.prewarm, self.keeper, self.builds)
        )
        collector = NodeCollector(self.stats, self.pages.gauges, self._info)
        self.views = Views(
            store,
            self.pool,
            self.dispatch,
            self.stats,
            self.learned,
            self.gateway,
            self.prewarm,
            administration,
        )
        self.exposure = Exposure(current, self.views.own.attention)
        self.views.own.address = lambda: self.pages.address
        app = build_app(self.pages, administration, collector, self.gateway.access, self.views.api, audit)
        store.on_change = self._apply
        store.on_problem = self._report
        slow = HypercornLane(Application(self.gateway, cast(Asgi, app), self.views.direct), settings)
        self.lane = FastLane(self.gateway, self.pages.fast, slow)
        self.pages.certificate = self.lane.certificate
        if self.lane.certificate is not None:
            self.views.own.attention.certificate = self.lane.certificate.trouble
        self.cluster: Cluster | None = None
        if member is not None:
            # The mesh's libraries cost megabytes that a node alone needn't pay for.
            from llamesh.cluster import Cluster

            self.cluster = Cluster(
                current,
                member,
                self.pool,
                self.dispatch,
                self.learned,
                self.pages,
                self.lane,
                administration,
            )
            self.views.join(self.cluster)

    def _info(self) -> dict[str, str]:
        engine = self.pool.engine
        return {
            "version": llamesh.__version__,
            "node": self.settings.node_id,
            "engine": engine.origin,
            "engine_version": engine.version,
        }

    def _apply(self, change: Change) -> None:
        """The files have changed, and `store.current` with them."""
        log.info(
            "reloaded",
            added=change.added,
            removed=change.removed,
            changed=change.changed,
            aliases=change.aliases,
            settings=change.settings,
        )
        if change.needs_restart:
            log.warning("these settings take effect at the next start", settings=change.needs_restart)
        try:
            self.gateway.apply_settings()
            self.exposure.say()
            # First who waits, so that a drained instance isn't replaced by one of its own kind.
            self.dispatch.apply_cookbook()
            self.pool.apply_cookbook()
        except Exception:
            log.exception("defect", during="reload")

    @staticmethod
    def _report(error: ConfigError) -> None:
        for problem in error.problems[: ConfigError.SHOWN]:
            log.error("a file was changed and has a mistake; the old one stays", problem=str(problem))

    async def run(self, sockets: list[socket.socket], peer_sockets: list[socket.socket]) -> None:
        """Serve on listening sockets until a signal, then end in order. `peer_sockets`: for peers alone."""
        self.learned.load()
        self.gateway.access.meters.restore(self.learned.keys)
        swept = self.ledger.sweep()
        if swept.killed:
            log.warning("ended children of an earlier life", pids=list(swept.killed))
        for warning in swept.warnings:
            log.warning("looking for children of an earlier life", problem=warning)
        cluster = self.cluster
        serve_peer = cluster.lane.serve_alone if cluster is not None else None
        listener = Listener(sockets, self.lane, peer_sockets, serve_peer)
        async with _signals() as signals, trio.open_nursery() as root:
            await root.start(self.pool.run)
            await root.start(self.prewarm.serve)
            await self.memory.sample([])
            root.start_soon(self.memory.run, self.pool.all, self.pool.leave_strangers_their_memory)
            root.start_soon(self.keeper.run)
            root.start_soon(self.views.run)
            root.start_soon(self.builds.run)
            root.start_soon(self.store.watch)
            if self.settings.models_dir is not None:
                root.start_soon(ModelsFolder(self.store, self.settings.models_dir).run)
            root.start_soon(listener.run)
            root.start_soon(self._save_now_and_then)
            await root.start(reload_at_hangup, self.store, self.notifier, self._status)
            # What was made so far stays. Looking through it for garbage holds up all streams now and then.
            gc.collect()
            gc.freeze()
            self._announce(sockets)
            self.notifier.ready(self._status())
            root.start_soon(self.notifier.run, self._status)
            if cluster is not None:
                root.start_soon(cluster.run, peer_sockets or sockets, self.pages.address)
            await anext(signals)
            await self._shut_down(signals, listener)
            if cluster is not None:
                await cluster.mesh.leave()
            root.cancel_scope.cancel()
        self._learn_speeds()
        self.learned.save()
        self.ledger.close()
        log.info("ended")

    def _announce(self, sockets: list[socket.socket]) -> None:
        engine = self.pool.engine
        log.info(
            "engine",
            engine=engine.origin,
            engine_version=engine.version,
            command=engine.command[0],
        )
        if idle := without_effect(self.settings):
            log.warning("without effect in this version", settings=idle)
        for sock in sockets:
            url = _url(sock, tls=self.settings.server_tls.enabled)
            self.pages.address = self.pages.address or self.settings.public_url or url
            log.info(
                "listening",
                url=url,
                node=self.settings.node_id,
                models=len(self.store.current.cookbook.profiles),
            )
        self.exposure.listens(sockets, mesh=self.cluster is not None)

    async def _shut_down(self, signals: AsyncIterator[signal.Signals], listener: Listener) -> None:
        grace = self.store.current.settings.shutdown_grace_period_seconds
        log.info("draining", grace_seconds=grace, running=self.stats.current_requests)
        self.builds.stop()
        self.notifier.stopping(f"finishing: {self._status()}", grace + 2 * _LAST_SECONDS)
        self.dispatch.shutting_down = not self.handed_on
        self.lane.closing = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_at_second_signal, signals, nursery.cancel_scope)
            with trio.move_on_after(grace):
                if self.handed_on:
                    await self._serve_the_last(listener)
                await self._wait_idle()
            self.dispatch.shutting_down = True
            nursery.start_soon(self._send_away)
            listener.stop_accepting()
            with trio.move_on_after(_LAST_SECONDS):
                await self.pool.close()
                await self._wait_idle()  # those whose instance was just ended are being told so
            nursery.cancel_scope.cancel()

    async def _serve_the_last(self, listener: Listener) -> None:
        """Accept nothing more, and serve what comes on connections that are open until they have closed, or
        had a second for it after the last request: a client learns from its answer to open a new one."""
        listener.stop_accepting()
        if self.cluster is not None:
            self.cluster.leaving = "it is being restarted"
        await self._wait_idle()
        with trio.move_on_after(_LINGER_SECONDS):
            while self.stats.connections:
                await trio.sleep(0.02)

    async def _send_away(self) -> None:
        """Who waits is told that it is over, and so are those who come back to wait because their
        instance was just ended."""
        node = self.settings.node_id
        while True:
            self.dispatch.refuse_all(
                lambda profile: Draining(f"node {node} is shutting down; {profile.key} wasn't served")
            )
            await trio.sleep(0.02)

    async def _wait_idle(self) -> None:
        while self.stats.current_requests:
            await trio.sleep(0.02)

    @staticmethod
    async def _end_at_second_signal(signals: AsyncIterator[signal.Signals], scope: trio.CancelScope) -> None:
        await anext(signals)
        log.warning("second signal: ending at once")
        scope.cancel()

    def _status(self) -> str:
        """This node in a line, for the service manager."""
        models, running = len(self.store.current.cookbook.profiles), self.stats.current_requests
        waiting, mistake = self.dispatch.queue_length(), self.store.problems is not None
        instances = len([*self.pool.all()])
        text = f"profiles {models}, instances {instances}, requests {running}, of them waiting {waiting}"
        return f"{text}; a file has a mistake, see the log" if mistake else text

    async def _save_now_and_then(self) -> None:
        while True:
            await trio.sleep(_SAVE_SECONDS)
            self._learn_speeds()
            await trio.to_thread.run_sync(self.learned.write, self.learned.encode())

    def _learn_speeds(self) -> None:
        self.learned.keys = self.gateway.access.meters.saved()
        for key, stats in self.stats.profiles.items():
            if stats.tokens_per_second:
                self.learned.of(key).tokens_per_second = round(stats.tokens_per_second, 2)


@asynccontextmanager
async def _signals() -> AsyncIterator[AsyncIterator[signal.Signals]]:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as receiver:
        yield receiver  # type: ignore[misc]


def _url(sock: socket.socket, *, tls: bool) -> str:
    host, port = sock.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def serve(store: Store, engine: Engine) -> int:
    """Run a node until it is told to end; the exit code."""
    settings = store.current.settings
    try:
        passed, notifier = take_sockets(os.environ, settings), Notifier.from_environment(os.environ)
        sockets = passed.api or bind(settings.listen_addr.host, settings.listen_addr.port)
    except BadHandover as error:
        sys.stderr.write(f"llamesh: {error}\n")
        return 1
    except OSError as error:
        reason = error.strerror or str(error)
        sys.stderr.write(
            f"llamesh: can't listen on {settings.listen_addr}: {reason}; "
            f"set listen_addr to a free address (port 0 takes any)\n"
        )
        return 1
    peer_sockets: list[socket.socket] = []
    member: Member | None = None
    if settings.cluster.enabled:
        from llamesh.cluster import IdentityError, load_member

        own = settings.cluster.listen_addr
        try:
            member = load_member(settings, os.environ)
            peer_sockets = passed.peers or (bind(own.host, own.port) if own is not None else [])
        except IdentityError as error:
            sys.stderr.write(f"llamesh: {error}\n")
            return 1
        except OSError as error:
            reason = error.strerror or str(error)
            sys.stderr.write(f"llamesh: can't listen on cluster.listen_addr {own}: {reason}\n")
            return 1
    with ExitStack() as stack:
        try:
            audit = (
                stack.enter_context(Audit.open(settings.audit, settings.node_id))
                if settings.audit.enabled
                else None
            )
        except OSError as error:
            sys.stderr.write(f"llamesh: audit.directory {settings.audit.directory} can't be used: {error}\n")
            return 1
        node = Node(store, engine, member, audit)
        node.notifier, node.handed_on = notifier, bool(passed.api)
        trio.run(node.run, sockets, peer_sockets)
    return 0
