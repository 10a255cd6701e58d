"""Waking a machine that sleeps, for a request that is best served there."""

from __future__ import annotations

from collections.abc import Sequence

import trio

from llamesh.mesh.peer import Peer
from llamesh.mesh.wake import wake
from llamesh.net.exchange import UpstreamBroken
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# How long a machine may take from the magic packet to its first sign of life.
_WAKE_SECONDS = 90.0


async def wake_up(peer: Peer, interfaces: Sequence[str]) -> None:
    """Send the magic packet and wait until the machine has joined. Raises UpstreamBroken."""
    assert peer.wake_mac is not None  # noqa: S101
    log.info("waking", peer=peer.node)
    with trio.move_on_after(_WAKE_SECONDS):
        while not peer.alive:
            try:
                await wake(peer.wake_mac, interfaces)
            except OSError as error:
                raise UpstreamBroken(f"node {peer.node} can't be woken: {error}", started=False) from error
            with trio.move_on_after(5.0):
                while not peer.alive:
                    await trio.sleep(0.1)
        return
    raise UpstreamBroken(
        f"node {peer.node} was sent a wake-up packet and didn't come within {_WAKE_SECONDS:g} s",
        started=False,
    )
