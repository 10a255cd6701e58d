"""The composition root: builds the parts, opens the root nursery, orders the shutdown.

Shutdown, on SIGTERM or SIGINT
1. draining: `/readyz` says 503, new requests are answered 503 `draining`; queued and running ones go on
2. when the last request has ended, or the grace is over, instances are told to end
3. connections close, learned values are saved, the process ends with 0
A second signal, whenever it comes, skips what is left of that: instances are killed, connections cut.
"""

from __future__ import annotations

import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import trio

import llamesh
from llamesh.config.cookbook import Cookbook
from llamesh.config.settings import Settings
from llamesh.dispatch import Dispatch
from llamesh.errors import Draining
from llamesh.local.launch import Engine
from llamesh.local.orphans import Ledger
from llamesh.local.pool import Pool
from llamesh.local.ports import Ports
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.logs import get_logger
from llamesh.telemetry.prometheus import NodeCollector
from llamesh.telemetry.stats import NodeStats
from llamesh.web.app import build_app
from llamesh.web.asgi import Application, Asgi
from llamesh.web.fast_lane import FastLane
from llamesh.web.gateway import Gateway
from llamesh.web.listener import Listener, bind
from llamesh.web.pages import Pages
from llamesh.web.prewarm import Prewarm
from llamesh.web.slow_lane import HypercornLane

log = get_logger("node")

# Learned values are written this often, when they changed.
_SAVE_SECONDS = 30.0

# After the grace: answers on their way to clients and the ends of children still get this long.
_LAST_SECONDS = 15.0


class Node:
    """One node of the mesh."""

    def __init__(self, settings: Settings, cookbook: Cookbook, engine: Engine) -> None:
        self.settings = settings
        self.cookbook = cookbook
        self.stats = NodeStats()
        metrics = settings.metrics_path
        self.learned = LearnedValues(metrics)
        self.ledger = Ledger(metrics.with_name(metrics.name + ".children"))
        ports = Ports(settings.llama_cpp_ports.all_ports(), {settings.listen_addr.port})
        self.pool = Pool(settings, engine, ports, self.ledger, self.stats, self.learned)
        self.dispatch = Dispatch(settings, self.pool, self.learned)
        self.prewarm = Prewarm(self.pool, self.dispatch)
        self.gateway = Gateway(settings, self._cookbook, self.dispatch, self.stats)
        self.pages = Pages(
            settings,
            self._cookbook,
            self.pool,
            self.dispatch,
            self.stats,
            self.learned,
            self.gateway.access,
        )
        info = {
            "version": llamesh.__version__,
            "node": settings.node_id,
            "engine": engine.origin,
            "engine_version": engine.version,
        }
        app = build_app(
            settings,
            self._cookbook,
            self.pages,
            self.pool,
            self.prewarm,
            NodeCollector(self.stats, self.pages.gauges, info),
            self.gateway.access,
        )
        slow = HypercornLane(Application(self.gateway, cast(Asgi, app)), settings)
        self.lane = FastLane(self.gateway, self.pages.fast, slow)

    def _cookbook(self) -> Cookbook:
        return self.cookbook

    async def run(self, sockets: list[socket.socket]) -> None:
        """Serve on listening sockets until a signal, then end in order."""
        self.learned.load()
        swept = self.ledger.sweep()
        if swept.killed:
            log.warning("ended children of an earlier life", pids=list(swept.killed))
        for warning in swept.warnings:
            log.warning("looking for children of an earlier life", problem=warning)
        listener = Listener(sockets, self.lane)
        async with _signals() as signals, trio.open_nursery() as root:
            await root.start(self.pool.run)
            await root.start(self.prewarm.serve)
            root.start_soon(listener.run)
            root.start_soon(self._save_now_and_then)
            self._announce(sockets)
            await anext(signals)
            await self._shut_down(signals, listener)
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
        for sock in sockets:
            url = _url(sock, tls=self.settings.server_tls.enabled)
            self.pages.address = self.pages.address or self.settings.public_url or url
            log.info("listening", url=url, node=self.settings.node_id, models=len(self.cookbook.profiles))
        host = self.settings.listen_addr.host
        if not self.settings.auth.enabled and not _is_loopback(sockets[0]):
            log.warning(
                "whoever reaches this address can use the models: set auth.enabled and auth.allowed_keys",
                listen_addr=host,
            )

    async def _shut_down(self, signals: AsyncIterator[signal.Signals], listener: Listener) -> None:
        settings = self.settings
        grace = settings.shutdown_grace_period_seconds
        log.info("draining", grace_seconds=grace, running=self.stats.current_requests)
        self.dispatch.draining = True
        self.lane.closing = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_at_second_signal, signals, nursery.cancel_scope)
            with trio.move_on_after(grace):
                await self._wait_idle()
            self.dispatch.refuse_all(
                lambda profile: Draining(
                    f"node {self.settings.node_id} is shutting down; {profile.key} wasn't served"
                )
            )
            listener.stop_accepting()
            with trio.move_on_after(_LAST_SECONDS):
                await self.pool.close()
                await self._wait_idle()  # those whose instance was just ended are being told so
            nursery.cancel_scope.cancel()

    async def _wait_idle(self) -> None:
        while self.stats.current_requests:
            await trio.sleep(0.02)

    @staticmethod
    async def _end_at_second_signal(signals: AsyncIterator[signal.Signals], scope: trio.CancelScope) -> None:
        await anext(signals)
        log.warning("second signal: ending at once")
        scope.cancel()

    async def _save_now_and_then(self) -> None:
        while True:
            await trio.sleep(_SAVE_SECONDS)
            self._learn_speeds()
            self.learned.save()

    def _learn_speeds(self) -> None:
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


def _is_loopback(sock: socket.socket) -> bool:
    host = str(sock.getsockname()[0])
    return host.startswith("127.") or host == "::1"


def serve(settings: Settings, cookbook: Cookbook, engine: Engine) -> int:
    """Run a node until it is told to end; the exit code."""
    try:
        sockets = bind(settings.listen_addr.host, settings.listen_addr.port)
    except OSError as error:
        reason = error.strerror or str(error)
        sys.stderr.write(
            f"llamesh: can't listen on {settings.listen_addr}: {reason}; "
            f"set listen_addr to a free address (port 0 takes any)\n"
        )
        return 1
    trio.run(Node(settings, cookbook, engine).run, sockets)
    return 0
