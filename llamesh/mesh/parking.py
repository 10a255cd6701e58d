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

# A connection that lived shorter than this counts as a failure: whoever took it closed it at once.
_SHORT_SECONDS = 1.0

# Serves a connection that we dialled; calls back when its first request comes, returns at its end.
Serve = Callable[[NoiseTransport, Callable[[], None]], Awaitable[None]]


class Parking:
    """The parked connections with all peers. `dial(peer)` opens one; `serve` answers on it."""

    def __init__(self, dial: Callable[[Peer], Awaitable[NoiseTransport]], serve: Serve) -> None:
        self._dial = dial
        self._serve = serve
        self._lots: dict[str, _Lot] = {}
        self._nursery: trio.Nursery | None = None

    def want(self, peer: Peer, dial_back: bool | None) -> None:
        """`dial_back`: whether the peer says that it can reach this node. None: it says nothing new."""
        lot = self._lots.get(peer.node)
        if dial_back is False and lot is None and self._nursery is not None:
            lot = self._lots[peer.node] = _Lot(peer)
            log.info("parking connections with a peer that can't reach this node", peer=peer.node)
            self._nursery.start_soon(self._keep, lot)
        elif dial_back and lot is not None:
            self.end(peer.node)

    def end(self, node: str) -> None:
        """It is gone, or reaches us. What is used goes on until its requests end; the rest closes."""
        lot = self._lots.pop(node, None)
        if lot is not None:
            lot.scope.cancel()
            for scope in lot.waiting:
                scope.cancel()

    def count(self, node: str) -> int:
        """How many connections are parked with a peer, those in use included."""
        lot = self._lots.get(node)
        return lot.open if lot is not None else 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own them, for ever."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def _keep(self, lot: _Lot) -> None:
        """Keep READY of them waiting, MOST in all."""
        with lot.scope:
            while True:
                lot.changed = trio.Event()
                missing = min(READY - len(lot.waiting), MOST - lot.open)
                if missing <= 0:
                    await lot.changed.wait()
                    continue
                if lot.failures:
                    await trio.sleep(pause_after(lot.failures))
                    missing = 1
                # At once: requests wait for them, and a handshake is several ways to and fro.
                async with trio.open_nursery() as nursery:
                    for _ in range(missing):
                        nursery.start_soon(self._park_one, lot)

    async def _park_one(self, lot: _Lot) -> None:
        try:
            stream = await self._dial(lot.peer)
        except CantReach as error:
            lot.failures += 1
            log.debug("can't park a connection", peer=lot.peer.node, error=str(error))
            return
        except Exception:
            lot.failures += 1
            log.exception("defect", during="parking a connection", peer=lot.peer.node)
            return
        if self._nursery is None:  # this node ended while the last message came
            stream.close()
            return
        scope = trio.CancelScope()
        lot.waiting.add(scope)
        lot.open += 1
        self._nursery.start_soon(self._serve_one, lot, stream, scope)

    async def _serve_one(self, lot: _Lot, stream: NoiseTransport, scope: trio.CancelScope) -> None:
        since = trio.current_time()

        def taken() -> None:
            if scope in lot.waiting:
                lot.waiting.discard(scope)
                lot.failures = 0
                lot.changed.set()

        try:
            with scope:
                await self._serve(stream, taken)
        except Exception:
            log.exception("defect", during="serving on a parked connection", peer=lot.peer.node)
        finally:
            stream.close()
            if scope in lot.waiting and trio.current_time() - since < _SHORT_SECONDS:
                lot.failures += 1
            lot.waiting.discard(scope)
            lot.open -= 1
            lot.changed.set()


class _Lot:
    """What is parked with one peer. `waiting`: those that no request came on yet."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.scope = trio.CancelScope()
        self.waiting: set[trio.CancelScope] = set()
        self.open = self.failures = 0
        self.changed = trio.Event()
