"""An encrypted connection that a thread uses by itself, with calls that block: for what is large.

It is opened in trio's thread like any other, and given away there. Bytes that a thread decrypts cost the
tasks of the node nothing but their share of the interpreter.
"""

from __future__ import annotations

import contextlib
import socket
import threading

from llamesh.mesh.noise_transport import NoiseTransport, Truncated

_READ_SIZE = 262_144
_RECEIVE_BUFFER = 1 << 20


class BlockingLink:
    """See the module. One thread calls everything but `cut`; all errors are OSErrors."""

    def __init__(self, stream: NoiseTransport, silence: float) -> None:
        """In trio's thread; takes the stream over. `silence`: seconds that a call may wait for bytes."""
        self.who = f"node {stream.remote.node_id}"
        try:
            self._sock, self._session, self._records = stream.detach()
        except OSError:
            stream.close()
            raise
        self._sock.settimeout(silence)
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        self._lock = threading.Lock()
        self._closed = False

    def send(self, data: bytes) -> None:
        """All of it. Raises OSError."""
        self._sock.sendall(self._session.seal(data))

    def receive(self) -> bytes:
        """What came, at least a byte; b"" at the authenticated end. Raises OSError."""
        records = self._records
        while not records.ended:
            data = self._sock.recv(_READ_SIZE)
            if not data:
                raise Truncated(f"{self.who} cut the connection")
            if plain := records.feed(data):
                return plain
        return b""

    def cut(self) -> None:
        """Have whatever blocks fail at once; from any thread."""
        with self._lock:
            if not self._closed:
                with contextlib.suppress(OSError):
                    self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._closed = True
            self._sock.close()
