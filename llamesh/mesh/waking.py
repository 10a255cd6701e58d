"""Waking a machine that sleeps, for a request that is best served there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from llamesh.mesh.peer import Peer
from llamesh.mesh.wake import wake
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# How long a machine may take from the magic packet to its first sign of life.
WAKE_SECONDS = 90.0

# Packets get lost, and a card that is about to fall asleep sees none.
PACKET_SECONDS = 5.0

_LOOK_SECONDS = 0.1


class Waker:
    """Wakes machines; however many requests wait for one, it is sent one packet each `PACKET_SECONDS`."""

    def __init__(
        self,
        interfaces: Sequence[str],
        send: Callable[[str, Sequence[str]], Awaitable[object]] = wake,
    ) -> None:
        """`interfaces`: as in `cluster.discovery.interfaces`; `send` sends one packet, or raises OSError."""
        self._interfaces = tuple(interfaces)
        self._send = send
        self._sent: dict[str, float] = {}  # when, by node

    async def wake(self, peer: Peer) -> None:
        """Send the magic packet and wait until the machine has joined. Raises UpstreamBroken."""
        mac = peer.wake_mac
        if mac is None:
            raise UpstreamBroken(
                f"node {peer.node} is away, and cluster.peers has no wake_mac of it", started=False
            )
        with trio.move_on_after(WAKE_SECONDS):
            while not peer.alive:
                now = trio.current_time()
                if now - self._sent.get(peer.node, float("-inf")) >= PACKET_SECONDS:
                    if now - self._sent.get(peer.node, float("-inf")) >= WAKE_SECONDS:
                        log.info("waking", peer=peer.node)
                    self._sent[peer.node] = now
                    try:
                        await self._send(mac, self._interfaces)
                    except OSError as error:
                        raise UpstreamBroken(
                            f"node {peer.node} can't be woken: {error}", started=False
                        ) from error
                await trio.sleep(_LOOK_SECONDS)
            self._sent.pop(peer.node, None)
            return
        raise UpstreamBroken(
            f"node {peer.node} was sent wake-up packets and didn't come within {WAKE_SECONDS:g} s",
            started=False,
        )
