"""Ports for children: from the operating system or from the configured set, never the same one twice.

A reservation is a promise among our own instances only. Between asking and the child's `bind` a stranger can
still take the port; the child then exits with "couldn't bind", and its replacement gets another number,
because the ports come round in the order in which they were freed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from types import TracebackType

__all__ = ["NoFreePort", "Port", "Ports"]

# How often the OS is asked again when its answer is a port that we gave away or freed a moment ago.
_ATTEMPTS = 64
# A connection to a listener on this machine is made in microseconds; only a firewall drops it in silence.
_PROBE_SECONDS = 0.2
_NAMED_IN_MESSAGE = 8


class NoFreePort(Exception):
    """Every port that could be used is taken. `taken` says by what: port number -> reason."""

    def __init__(self, host: str, taken: Mapping[int, str]) -> None:
        self.host = host
        self.taken = dict(taken)
        reasons = [f"{number} {reason}" for number, reason in list(taken.items())[:_NAMED_IN_MESSAGE]]
        if len(taken) > _NAMED_IN_MESSAGE:
            reasons.append(f"and {len(taken) - _NAMED_IN_MESSAGE} more")
        detail = "; ".join(reasons) or "there are none to choose from"
        super().__init__(f"no free port for an instance on {host}: {detail}")


class Port:
    """One reserved port: a context manager; `close` gives it back and may be called twice."""

    def __init__(self, owner: Ports, number: int, host: str, user: str) -> None:
        self.number = number
        self.host = host
        self.user = user
        self._owner = owner

    def __repr__(self) -> str:
        return f"<Port {self.host}:{self.number} {self.user}>"

    def __enter__(self) -> Port:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the port back; call it when the child is gone."""
        self._owner._release(self)


class Ports:
    """The ports that this node may give to its children.

    `ports` is the configured set, or None to ask the operating system; `avoid` holds what is never given
    away, such as the port that the node itself listens on. Nothing here awaits: reserving is one step.
    """

    def __init__(self, ports: Sequence[int] | None, avoid: Container[int] = ()) -> None:
        # Least recently used first. None: the OS chooses.
        self._order: deque[int] | None = None if ports is None else deque(dict.fromkeys(ports))
        self._avoid = avoid
        self._reserved: dict[int, Port] = {}
        self._just_freed: deque[int] = deque(maxlen=_ATTEMPTS // 2)

    @property
    def reserved(self) -> dict[int, str]:
        """Port number -> who uses it."""
        return {number: port.user for number, port in self._reserved.items()}

    def reserve(self, host: str = "127.0.0.1", *, user: str = "") -> Port:
        """Reserve any port to listen on at `host`; errors of others name the `user`. Raises NoFreePort."""
        if self._order is None:
            return self._hand_out(self._from_system(host), host, user)
        return self._hand_out(self._first_free(host, self._order), host, user)

    def claim(self, number: int, host: str = "127.0.0.1", *, user: str = "") -> Port:
        """Reserve one certain port, in the configured set or not. Raises NoFreePort."""
        return self._hand_out(self._first_free(host, [number]), host, user)

    def _hand_out(self, number: int, host: str, user: str) -> Port:
        port = self._reserved[number] = Port(self, number, host, user)
        return port

    def _first_free(self, host: str, candidates: Iterable[int]) -> int:
        taken: dict[int, str] = {}
        for number in candidates:
            reason = self._reason_against(number) or _why_not_free(host, number)
            if reason is None:
                return number
            taken[number] = reason
        raise NoFreePort(host, taken)

    def _from_system(self, host: str) -> int:
        """Ask for any port until the answer is one that we can use.

        All sockets of one search stay open until its end, so that each answer is a new one.
        """
        taken: dict[int, str] = {}
        with contextlib.ExitStack() as held:
            for _ in range(_ATTEMPTS):
                try:
                    probe = held.enter_context(_socket(host))
                    probe.bind((host, 0))
                except OSError as problem:
                    raise NoFreePort(host, {**taken, 0: f"refused by the system: {problem}"}) from problem
                number: int = probe.getsockname()[1]
                reason = self._reason_against(number)
                if reason is None and number in self._just_freed:
                    reason = "was freed a moment ago"
                if reason is None:
                    return number
                taken[number] = reason
        raise NoFreePort(host, taken)

    def _reason_against(self, number: int) -> str | None:
        if number in self._reserved:
            return f"is used by {self._reserved[number].user or 'another instance'}"
        if number in self._avoid:
            return "is the node's own"
        return None

    def _release(self, port: Port) -> None:
        if self._reserved.get(port.number) is not port:
            return
        del self._reserved[port.number]
        self._just_freed.append(port.number)
        if self._order is not None and port.number in self._order:
            self._order.remove(port.number)
            self._order.append(port.number)


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)


def _why_not_free(host: str, number: int) -> str | None:
    """Why `number` can't be listened on at `host`, None when it can.

    1. A plain bind works: nothing is there.
    2. It doesn't, nor with SO_REUSEADDR: somebody listens.
    3. With SO_REUSEADDR it does: leftovers of closed connections (TIME_WAIT), which the child gets over
       since it sets that option. But the BSDs and macOS let us bind beside a listener on all addresses as
       well, so the last word is whether somebody answers.
    """
    for reuse in (False, True):
        with _socket(host) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)
            try:
                probe.bind((host, number))
            except OSError as problem:
                if problem.errno != errno.EADDRINUSE:
                    return f"can't be bound: {os.strerror(problem.errno or 0)}"
                continue
            if not reuse:
                return None
        return "is used by another program" if _somebody_answers(host, number) else None
    return "is used by another program"


def _somebody_answers(host: str, number: int) -> bool:
    with _socket(host) as probe:
        probe.settimeout(_PROBE_SECONDS)
        return probe.connect_ex((host, number)) == 0
