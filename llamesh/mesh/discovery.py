"""Finding other nodes on the local network, and being found: mDNS (RFC 6762, 6763).

A sighting is a hint where to dial. It isn't authenticated: anybody on the network can announce
a node, or say that one is gone. Who answers is for the handshake to say, and a connection that
works is worth more than a goodbye.

Nothing here stops a node. Where multicast doesn't work, one warning says what to do, and it is
tried again each minute.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import trio

from llamesh.config.sections import Discovery as Settings
from llamesh.mesh.interfaces import multicast_interfaces, read_interfaces
from llamesh.mesh.mdns import Mdns, MdnsFailed, Notice
from llamesh.mesh.sighting import Record, Sighting, read_record, written_txt
from llamesh.telemetry.logs import get_logger

__all__ = ["Discovery", "Sighting"]

log = get_logger("discovery")

RETRY_SECONDS = 60.0
CLOSE_SECONDS = 2.0
# Joining takes milliseconds, an announcement a second and a half; zeroconf itself gives up after 10 s or so.
_CALL_SECONDS = 20.0
# After joining anew, who was there before has this long to answer.
_AGAIN_SECONDS = 15.0

MOST_SIGHTINGS = 1024
# At 3 s each, the last one in the queue still gets its answer within _CALL_SECONDS.
_MOST_QUESTIONS = 16
_QUESTION_THREADS = 4
_MOST_THREADS = 4

_T = TypeVar("_T")


class Presence(Protocol):
    """What is used of `mdns.Mdns`."""

    def open(self, interfaces: Sequence[str | int], notice: Notice) -> None: ...
    def announce(self, addresses: Sequence[str]) -> None: ...
    def look(self, name: str, *, ask: bool) -> Record | None: ...
    def close(self) -> None: ...


class Discovery:
    """Announces this node and watches for others.

    `addresses` gives the IP texts to announce at the moment; it is asked every `look_every` seconds and
    mustn't block. `txt` is announced as it is, besides the node id: at most 16 short pairs.

    `on_found` gets each node that is seen, and again when what it announces has changed. `on_lost` gets
    the node id when it says goodbye or its announcement runs out. Both are called from `run`'s task.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        node_id: str,
        port: int,
        txt: Mapping[str, str],
        addresses: Callable[[], tuple[str, ...]],
        on_found: Callable[[Sighting], None],
        on_lost: Callable[[str], None],
        look_every: float = 3.0,
        presence: Callable[[], Presence] | None = None,
        interfaces: Callable[[], tuple[str | int, ...]] | None = None,
    ) -> None:
        pairs = written_txt(node_id, txt)
        self._settings = settings
        self._addresses = addresses
        self._on_found = on_found
        self._on_lost = on_lost
        self._look_every = look_every
        self._presence = presence or (lambda: Mdns(settings.service_name, node_id, port, pairs))
        self._interfaces = interfaces or self._present_interfaces
        self._seen: dict[str, Sighting] = {}
        self._unconfirmed: set[str] = set()
        self._asking: set[str] = set()
        self._warned = False
        # Of their own: what hangs in zeroconf mustn't take the threads of others, nor a flood of names
        # those that announce and close.
        self._limiter = trio.CapacityLimiter(_MOST_THREADS)
        self._question_limiter = trio.CapacityLimiter(_QUESTION_THREADS)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever, and not at all when mDNS is switched off. When cancelled, it says goodbye first, for
        CLOSE_SECONDS at most."""
        task_status.started()
        while self._settings.mdns:
            try:
                await self._session()
            except* MdnsFailed as failed:
                self._warn(failed)
                failing = True
            else:
                failing = False
            await self._pause(RETRY_SECONDS if failing else 0.0)

    async def _pause(self, seconds: float) -> None:
        """As long as that, or until there are other interfaces: the cable is back."""
        interfaces = self._interfaces()
        with trio.move_on_after(seconds):
            while self._interfaces() == interfaces:
                await trio.sleep(self._look_every)

    async def _session(self) -> None:
        """From joining the multicast groups until the interfaces change."""
        interfaces = self._interfaces()
        if not interfaces:
            chosen = ", ".join(self._settings.interfaces)
            raise MdnsFailed(f"no network interface that is up and can multicast is among: {chosen}")
        inbox = _Inbox()
        presence = self._presence()
        self._unconfirmed = set(self._seen)
        try:
            await self._call(partial(presence.open, interfaces, inbox.put))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, presence, interfaces, nursery.cancel_scope)
                nursery.start_soon(self._browse, presence, inbox)
                nursery.start_soon(self._forget_unconfirmed)
        finally:
            await self._close(presence)

    async def _announce(
        self, presence: Presence, interfaces: tuple[str | int, ...], session: trio.CancelScope
    ) -> None:
        told: tuple[str, ...] = ()
        while True:
            current = self._interfaces()
            if current != interfaces:
                log.info("network interfaces changed; joining multicast anew", interfaces=list(current))
                session.cancel()
                return
            addresses = self._announced_on(interfaces)
            if addresses != told:
                await self._call(partial(presence.announce, addresses))
                told = addresses
                log.debug("announced on the local network", addresses=list(addresses))
            if self._warned:
                self._warned = False
                log.info("finding peers on the local network (mDNS) works again")
            await trio.sleep(self._look_every)

    def _announced_on(self, interfaces: tuple[str | int, ...]) -> tuple[str, ...]:
        # To another machine our loopback address would be its own.
        near = _only_loopback(interfaces)
        return tuple(text for text in self._addresses() if near or not _is_loopback(text))

    async def _browse(self, presence: Presence, inbox: _Inbox) -> None:
        loopback = _only_loopback(self._interfaces())
        async with trio.open_nursery() as questions:
            while True:
                for name, gone in (await inbox.take()).items():
                    if gone:
                        self._forget(name)
                    elif (record := presence.look(name, ask=False)) is not None:
                        self._note(name, record, loopback)
                    elif name not in self._asking and len(self._asking) < _MOST_QUESTIONS:
                        self._asking.add(name)
                        questions.start_soon(self._ask, presence, name, loopback)

    async def _ask(self, presence: Presence, name: str, loopback: bool) -> None:
        """An announcement came in pieces: ask for the rest."""
        try:
            record = await self._call(partial(presence.look, name, ask=True), self._question_limiter)
            if record is not None:
                self._note(name, record, loopback)
        finally:
            self._asking.discard(name)

    def _note(self, name: str, record: Record, loopback: bool) -> None:
        try:
            sighting = read_record(record, loopback=loopback)
        except ValueError as error:
            # The name is a stranger's, too: it isn't repeated at length.
            log.debug("an announcement on the local network is ignored", name=name[:80], reason=str(error))
            return
        before = self._seen.get(name)
        if before is None and len(self._seen) >= MOST_SIGHTINGS:
            log.debug("too many nodes on the local network; one more is ignored", node=sighting.node_id)
            return
        self._unconfirmed.discard(name)
        if sighting == before:
            return
        if before is not None and before.node_id != sighting.node_id:
            self._forget(name)
        self._seen[name] = sighting
        self._on_found(sighting)

    def _forget(self, name: str) -> None:
        self._unconfirmed.discard(name)
        gone = self._seen.pop(name, None)
        if gone is None or any(other.node_id == gone.node_id for other in self._seen.values()):
            return
        self._on_lost(gone.node_id)

    async def _forget_unconfirmed(self) -> None:
        await trio.sleep(_AGAIN_SECONDS)
        for name in tuple(self._unconfirmed):
            self._forget(name)

    async def _call(self, blocking: Callable[[], _T], limiter: trio.CapacityLimiter | None = None) -> _T:
        """Run it in a thread, bounded. Whatever zeroconf raises becomes MdnsFailed here, and only here."""
        try:
            with trio.fail_after(_CALL_SECONDS):
                return await trio.to_thread.run_sync(
                    blocking, abandon_on_cancel=True, limiter=limiter or self._limiter
                )
        except MdnsFailed:
            raise
        except trio.TooSlowError:
            raise MdnsFailed(f"no answer within {_CALL_SECONDS:g} s") from None
        except Exception as error:
            raise MdnsFailed(_reason(error)) from error

    async def _close(self, presence: Presence) -> None:
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            try:
                await self._call(presence.close)
            except MdnsFailed as error:
                log.debug("no goodbye on the local network", error=str(error))

    def _warn(self, failed: BaseExceptionGroup[MdnsFailed]) -> None:
        error = _first(failed)
        if self._warned:
            log.debug("mDNS still doesn't work", error=str(error))
            return
        self._warned = True
        log.warning(
            "peers on the local network can't be found by themselves (mDNS); those in cluster.peers are",
            error=str(error),
            todo="name a network interface in cluster.discovery.interfaces, or list peers in cluster.peers "
            "and set cluster.discovery.mdns to false",
            again=f"tried each {RETRY_SECONDS:g} s",
        )

    def _present_interfaces(self) -> tuple[str | int, ...]:
        return multicast_interfaces(read_interfaces(), self._settings.interfaces)


class _Inbox:
    """Names from zeroconf's thread to trio's, each once: the last news of it. Bounded."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, bool] = {}
        self._token = trio.lowlevel.current_trio_token()
        self._arrived = trio.Event()

    def put(self, name: str, gone: bool) -> None:
        """From any thread; raises nothing."""
        with self._lock:
            if name not in self._names and len(self._names) >= MOST_SIGHTINGS:
                return
            self._names[name] = gone
        # When trio has ended, so has whoever wanted to know.
        with contextlib.suppress(trio.RunFinishedError):
            self._token.run_sync_soon(self._wake, idempotent=True)

    def _wake(self) -> None:
        # An exception in here would end trio. The event is looked up now: `take` replaces it.
        self._arrived.set()

    async def take(self) -> dict[str, bool]:
        """All news since the last call, at least one. Names, and whether each is gone."""
        await self._arrived.wait()
        self._arrived = trio.Event()
        with self._lock:
            names, self._names = self._names, {}
        return names


def _only_loopback(interfaces: tuple[str | int, ...]) -> bool:
    return all(isinstance(one, str) and _is_loopback(one) for one in interfaces)


def _is_loopback(text: str) -> bool:
    return text.startswith("127.") or text == "::1"


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return "another program keeps UDP port 5353 to itself (avahi does with disallow-other-stacks=yes)"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
