"""Serving peers that can't reach this node: connections that we dial and then answer requests on.

A peer that tells us that it can't dial us back gets two of them. One that is taken for a request is
replaced at once, so as many can be in use as the peer needs, up to a limit.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from llamesh.mesh.dialler import CantReach
from llamesh.mesh.links import pause_after
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.peer import Peer
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

READY = 2
MOST = 32

# Serves a connection that we dialled; calls back when its first request comes, returns at its end.
Serve = Callable[[NoiseTransport, Callable[[], None]], Awaitable[None]]


class Parking:
    """The parked connections with all peers. `dial(peer)` opens one; `serve` answers on it."""

    def __init__(self, dial: Callable[[Peer], Awaitable[NoiseTransport]], serve: Serve) -> None:
        self._dial = dial
        self._serve = serve
        self._wanted: dict[str, trio.CancelScope] = {}
        self._nursery: trio.Nursery | None = None

    def want(self, peer: Peer, wanted: bool) -> None:
        """The peer needs parked connections, or doesn't any more."""
        scope = self._wanted.get(peer.node)
        if wanted and scope is None and self._nursery is not None:
            scope = self._wanted[peer.node] = trio.CancelScope()
            log.info("parking connections with a peer that can't reach this node", peer=peer.node)
            self._nursery.start_soon(self._keep, peer, scope)
        elif not wanted and scope is not None:
            # Those in use go on until their requests end; the idle ones close by themselves.
            del self._wanted[peer.node]
            scope.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own them, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    async def _keep(self, peer: Peer, scope: trio.CancelScope) -> None:
        """Keep READY of them waiting, MOST in all."""
        waiting = all_open = failures = 0
        changed = trio.Event()
        assert self._nursery is not None  # noqa: S101

        async def one(stream: NoiseTransport) -> None:
            nonlocal waiting, all_open, changed
            is_waiting = True

            def taken() -> None:
                nonlocal waiting, is_waiting, changed
                if is_waiting:
                    is_waiting = False
                    waiting -= 1
                    changed.set()

            try:
                await self._serve(stream, taken)
            finally:
                taken()
                all_open -= 1
                changed.set()

        with scope:
            while True:
                changed = trio.Event()
                if waiting < READY and all_open < MOST:
                    try:
                        stream = await self._dial(peer)
                    except CantReach as error:
                        failures += 1
                        log.debug("can't park a connection", peer=peer.node, error=str(error))
                        await trio.sleep(pause_after(failures))
                        continue
                    failures = 0
                    waiting += 1
                    all_open += 1
                    self._nursery.start_soon(one, stream)
                    continue
                await changed.wait()
