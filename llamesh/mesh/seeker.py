"""Getting to know nodes: dial the addresses that are configured or were sighted until somebody answers there.

A target is an address, or a node that isn't a living member any more though it didn't say that it
leaves. Each is tried again with growing pauses while nobody (alive) is known there, so that a mesh
that was cut in two finds itself again, whichever side changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from llamesh.config.values import Address
from llamesh.mesh.dialler import CantReach, Dialler
from llamesh.mesh.links import pause_after
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# More than the machines of any such mesh; sightings beyond wait until others are dropped.
_MOST_TARGETS = 1024

# At once, and how often the list is looked through.
_MOST_DIALS = 16
_LOOK_SECONDS = 0.25


@dataclass(slots=True)
class _Target:
    addresses: tuple[Address, ...]
    node: str | None  # who must answer, None: whoever does
    for_good: bool  # configured, so that its failures are the user's business
    found: str | None = None  # who answered last
    failures: int = 0
    due: float = 0.0
    busy: bool = False
    told: str = ""


class Seeker:
    """See the module. `alive(node)`: it is a member already; `on_found` takes a connection over."""

    def __init__(
        self,
        dialler: Dialler,
        alive: Callable[[str], bool],
        on_found: Callable[[NoiseTransport, tuple[Address, ...]], None],
    ) -> None:
        self._dialler = dialler
        self._alive = alive
        self._on_found = on_found
        self._targets: dict[str, _Target] = {}
        self._own: set[Address] = set()  # addresses that turned out to lead here

    def set_static(self, addresses: Iterable[tuple[Address, str | None]]) -> None:
        """These addresses are configured, each with the node that must answer there, if that is known."""
        wanted = {f"address {address}": (address, node) for address, node in addresses}
        for name in [n for n, t in self._targets.items() if t.for_good and n not in wanted]:
            del self._targets[name]
        for name, (address, node) in wanted.items():
            if name not in self._targets:
                self._targets[name] = _Target((address,), node, for_good=True)

    def seek(self, node: str, addresses: Iterable[Address]) -> None:
        """That node may be there: it was sighted, or it was a member."""
        found = tuple(addresses)
        target = self._targets.get(f"node {node}")
        if target is None:
            if len(self._targets) < _MOST_TARGETS and found:
                self._targets[f"node {node}"] = _Target(found, node, for_good=False)
        elif found and target.addresses != found:
            target.addresses, target.failures, target.due = found, 0, 0.0

    def drop(self, node: str) -> None:
        """It left, or its announcement ended."""
        self._targets.pop(f"node {node}", None)

    def problems(self) -> list[str]:
        """Of configured addresses where nobody was reached, for people."""
        return [target.told for target in self._targets.values() if target.for_good and target.told]

    async def run(self) -> None:
        """Seek for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                now = trio.current_time()
                busy = sum(target.busy for target in self._targets.values())
                for target in list(self._targets.values()):
                    if busy >= _MOST_DIALS:
                        break
                    if self._is_due(target, now):
                        target.busy = True
                        busy += 1
                        nursery.start_soon(self._try, target)
                await trio.sleep(_LOOK_SECONDS)

    def _is_due(self, target: _Target, now: float) -> bool:
        if target.busy or target.due > now or self._own.issuperset(target.addresses):
            return False
        node = target.node or target.found
        return node is None or not self._alive(node)

    async def _try(self, target: _Target) -> None:
        try:
            addresses = tuple(a for a in target.addresses if a not in self._own)
            try:
                stream = await self._dialler.dial(addresses, node=target.node)
            except CantReach as error:
                self._own.update(error.its_me)
                target.failures += 1
                if target.for_good and not self._own.issuperset(target.addresses):
                    self._complain(target, str(error))
            else:
                if target.told:
                    log.info("peer reached", peer=stream.remote.node_id, address=stream.address)
                target.failures, target.told, target.found = 0, "", stream.remote.node_id
                self._on_found(stream, target.addresses)
            target.due = trio.current_time() + pause_after(max(1, target.failures))
        finally:
            target.busy = False

    @staticmethod
    def _complain(target: _Target, problem: str) -> None:
        # The second try in a row: the first often comes before the other node is up.
        if target.failures == 2 or (target.told and target.told != problem):
            log.warning("no peer reached; it is tried again and again", problem=problem)
        if target.failures >= 2:
            target.told = problem
