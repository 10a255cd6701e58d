"""Tells the service manager how this node is: ready, reloading, stopping, alive.

NOTIFY_SOCKET says where, WATCHDOG_USEC how often. Each message is one datagram of lines `NAME=value`. The
watchdog is fed by a task of trio's loop and by nothing else: a loop that hangs isn't fed, and the manager
replaces the process. A message that can't be sent holds up nothing; it is kept and tried again.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from collections.abc import Callable, MutableMapping

import trio

from llamesh.service.environment import BadHandover, take_number
from llamesh.telemetry.logs import get_logger

log = get_logger("service")

# How often the status is looked at, and what couldn't be sent is tried again.
_TICK_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_MOST_KEPT = 16

# systemd shows one line, and cuts what is longer than a screen anyway.
_STATUS_BYTES = 400

# sun_path, less its closing zero.
_LONGEST_ADDRESS = 107

_INFINITE_USEC = 2**64 - 1
_LARGEST_PID = 2**31 - 1


class Notifier:
    """The line to the service manager. Without an address nobody listens, and every method does nothing."""

    def __init__(self, address: str = "", watchdog_seconds: float | None = None) -> None:
        """`address`: a path, or `@` and the name of an abstract socket. `watchdog_seconds`: after so much
        silence the manager takes us for hung."""
        self.watchdog_seconds = watchdog_seconds
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._kept: deque[bytes] = deque(maxlen=_MOST_KEPT)
        self._status = ""
        self._stopping = False
        self._failing = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """What the environment says, of which it is removed: no child speaks for us. Raises BadHandover."""
        address = environ.pop("NOTIFY_SOCKET", "")
        pid = take_number(environ, "WATCHDOG_PID", _LARGEST_PID)
        microseconds = take_number(environ, "WATCHDOG_USEC", _INFINITE_USEC)
        if not address:
            return cls()
        if address[0] not in "/@" or not 1 < len(os.fsencode(address)) <= _LONGEST_ADDRESS:
            raise BadHandover(
                f"NOTIFY_SOCKET is {address[:120]!r}; a path, or @ and a name, of at most "
                f"{_LONGEST_ADDRESS} bytes is understood"
            )
        meant = pid in (None, os.getpid()) and microseconds not in (None, 0, _INFINITE_USEC)
        return cls(address, microseconds / 1e6 if meant and microseconds else None)

    def ready(self, status: str) -> None:
        """The node serves, for the first time or again after `reloading`."""
        if not self._stopping:
            self._status = _line(status)
            self._send("READY=1", f"STATUS={self._status}")

    def reloading(self) -> None:
        """The files are being read again; `ready` must follow, whatever came of it."""
        if not self._stopping:
            self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reloading")

    def stopping(self, status: str, seconds: float) -> None:
        """The end has begun and may take so long; the manager waits for it, whatever its own limit is."""
        self._stopping = True
        self._send("STOPPING=1", f"STATUS={_line(status)}", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    async def run(self, status: Callable[[], str]) -> None:
        """Feed the watchdog and keep the status line current, until cancelled."""
        if not self._address:
            return
        # Half of the time, as sd_watchdog_enabled(3) has it.
        tick = min(_TICK_SECONDS, (self.watchdog_seconds or _TICK_SECONDS * 2) / 2)
        while True:
            self._retry()
            lines = ["WATCHDOG=1"] if self.watchdog_seconds is not None else []
            if not self._stopping and (now := _line(status())) != self._status:
                self._status = now
                lines.append(f"STATUS={now}")
            if lines:
                self._send(*lines, keep=False)
            await trio.sleep(min(tick, _RETRY_SECONDS) if self._kept else tick)

    def _send(self, *lines: str, keep: bool = True) -> None:
        if not self._address:
            return
        message = "\n".join(lines).encode()
        # In order: a RELOADING that overtakes its READY would never end.
        if self._kept or not self._sent(message):
            if keep:
                self._kept.append(message)
            else:
                self._status = ""  # said again with the next look

    def _retry(self) -> None:
        while self._kept and self._sent(self._kept[0]):
            self._kept.popleft()

    def _sent(self, message: bytes) -> bool:
        # A socket for each: nothing to keep open, and a manager that made a new one is found.
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.setblocking(False)
                sock.sendto(message, self._address)
        except OSError as error:
            if not self._failing:
                log.warning("the service manager can't be told", error=str(error))
            self._failing = True
            return False
        self._failing = False
        return True


def _line(text: str) -> str:
    """`text` as one line that fits: a line break would begin another assignment."""
    plain = "".join(character if character.isprintable() else " " for character in text)
    return plain.encode()[:_STATUS_BYTES].decode(errors="ignore")
