"""Getting to know nodes: dial the addresses that are configured or were sighted until somebody answers there.

A target is an address, or a node that isn't a living member: it was sighted, or was a member and died without
saying that it leaves. Each is tried again with growing pauses while nobody (alive) is known there, so that
a mesh that was cut in two finds itself again, whichever side changes. For a node that was a member the pauses
grow to a tenth of the time that it has been away, and after some days it is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import trio

from llamesh.config.values import Address
from llamesh.mesh.dialler import CantReach, Dialler
from llamesh.mesh.links import LONGEST_PAUSE, pause_after
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.telemetry.logs import get_logger

log = get_logger("mesh")

# More than the machines of any such mesh; beyond that the one that was sought longest in vain goes.
_MOST_TARGETS = 1024

# At once, and how often the list is looked through.
_MOST_DIALS = 16
_LOOK_SECONDS = 0.25

_MOST_ADDRESSES = 16

# Somebody who was lost: the longest pause between two tries, and how long there are any.
_LOST_PAUSE = 300.0
_LOST_SECONDS = 3 * 86400.0

# What is wrong with a configured address is said again when it changes, but not more often than this.
_REPEAT_SECONDS = 60.0


@dataclass(slots=True)
class _Target:
    configured: tuple[Address, ...] = ()
    sighted: tuple[Address, ...] = ()
    remembered: tuple[Address, ...] = ()  # where it was reached while it was a member
    node: str | None = None  # who must answer, None: whoever does
    since: float = 0.0  # when it was lost or sighted
    found: str | None = None  # who answered last
    failures: int = 0
    due: float = 0.0
    busy: bool = False
    told: str = ""
    told_at: float = float("-inf")

    @property
    def addresses(self) -> tuple[Address, ...]:
        every = dict.fromkeys((*self.configured, *self.sighted, *self.remembered))
        return tuple(every)[:_MOST_ADDRESSES]


class Seeker:
    """See the module. `alive(node)`: it is a member already; `on_found` takes a connection over."""

    def __init__(
        self,
        dialler: Dialler,
        alive: Callable[[str], bool],
        on_found: Callable[[NoiseTransport], None],
    ) -> None:
        self._dialler = dialler
        self._alive = alive
        self._on_found = on_found
        self._targets: dict[str, _Target] = {}
        self._own: set[Address] = set()  # addresses that turned out to lead here

    def __len__(self) -> int:
        return len(self._targets)

    def set_static(self, addresses: Iterable[tuple[Address, str | None]]) -> None:
        """These addresses are configured, each with the node that must answer there, if that is known."""
        wanted = {f"address {address}": (address, node) for address, node in addresses}
        for name in [n for n, t in self._targets.items() if t.configured and n not in wanted]:
            del self._targets[name]
        for name, (address, node) in wanted.items():
            if name not in self._targets:
                self._targets[name] = _Target((address,), node=node)

    def sighted(self, node: str, addresses: Iterable[Address]) -> None:
        """Somebody says, unproven, that this node is there."""
        target, found = self._of(node), tuple(addresses)
        if target.sighted != found:
            target.sighted, target.failures, target.due = found, 0, 0.0

    def unsighted(self, node: str) -> None:
        """That isn't said any more."""
        target = self._targets.get(f"node {node}")
        if target is not None:
            target.sighted = ()
            if not target.remembered:
                del self._targets[f"node {node}"]

    def lost(self, node: str, addresses: Iterable[Address]) -> None:
        """It was a member and is dead; it may only be cut off, so look for it where it was."""
        found = tuple(addresses)
        if found:
            target = self._of(node)
            target.remembered, target.failures, target.due = found, 0, 0.0
            target.since = trio.current_time()

    def drop(self, node: str) -> None:
        """It left: it comes back by itself, or is sighted again."""
        self._targets.pop(f"node {node}", None)

    def forget_own(self) -> None:
        """This machine's addresses have changed: what led here may lead elsewhere now."""
        self._own.clear()

    def problems(self) -> list[str]:
        """Of configured addresses where nobody was reached, for people."""
        return [target.told for target in self._targets.values() if target.configured and target.told]

    def _of(self, node: str) -> _Target:
        """The target for a node; the oldest of those that nobody configured makes room for it."""
        name = f"node {node}"
        target = self._targets.get(name)
        if target is None:
            others = [n for n, t in self._targets.items() if not t.configured]
            if len(others) >= _MOST_TARGETS:
                del self._targets[min(others, key=lambda n: self._targets[n].since)]
            target = self._targets[name] = _Target(node=node, since=trio.current_time())
        return target

    async def run(self) -> None:
        """Seek for ever."""
        async with trio.open_nursery() as nursery:
            while True:
                now = trio.current_time()
                self._tidy(now)
                due = sorted((t for t in self._targets.values() if self._is_due(t, now)), key=lambda t: t.due)
                busy = sum(target.busy for target in self._targets.values())
                for target in due[: max(0, _MOST_DIALS - busy)]:
                    target.busy = True
                    nursery.start_soon(self._try, target)
                await trio.sleep(_LOOK_SECONDS)

    def _tidy(self, now: float) -> None:
        """Who is back isn't lost, and who is away for days is gone."""
        for name, target in list(self._targets.items()):
            if target.remembered and target.node is not None:
                if self._alive(target.node) or now - target.since > _LOST_SECONDS:
                    target.remembered = ()
                if not target.addresses:
                    del self._targets[name]

    def _is_due(self, target: _Target, now: float) -> bool:
        if target.busy or target.due > now or self._own.issuperset(target.addresses):
            return False
        node = target.node or target.found
        return node is None or not self._alive(node)

    async def _try(self, target: _Target) -> None:
        try:
            addresses = tuple(a for a in target.addresses if a not in self._own)
            if not addresses:
                return  # dropped before this task came to its turn
            try:
                stream = await self._dialler.dial(addresses, node=target.node)
            except CantReach as error:
                self._own.update(error.its_me)
                target.failures += 1
                if target.configured and not self._own.issuperset(target.addresses):
                    self._complain(target, str(error))
            else:
                if target.told:
                    log.info("peer reached", peer=stream.remote.node_id, address=stream.address)
                target.failures, target.told, target.found = 0, "", stream.remote.node_id
                self._on_found(stream)
            target.due = trio.current_time() + self._pause(target)
        except Exception:
            # A defect with one target mustn't end the search for the others.
            log.exception("defect", during="looking for peers")
            target.due = trio.current_time() + LONGEST_PAUSE
        finally:
            target.busy = False

    @staticmethod
    def _pause(target: _Target) -> float:
        pause = pause_after(max(1, target.failures))
        if not target.remembered:
            return pause
        return max(pause, min(_LOST_PAUSE, (trio.current_time() - target.since) / 10))

    @staticmethod
    def _complain(target: _Target, problem: str) -> None:
        # The second try in a row: the first often comes before the other node is up.
        if target.failures < 2:
            return
        now = trio.current_time()
        if not target.told or (target.told != problem and now - target.told_at >= _REPEAT_SECONDS):
            log.warning("no peer reached; it is tried again and again", problem=problem)
            target.told, target.told_at = problem, now
