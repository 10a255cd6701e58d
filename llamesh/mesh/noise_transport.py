"""`Transport` over an established Noise session: the same verbs as a plain socket, encrypted.

Rules
- One task may send while another receives.
- `receive` may be cancelled anywhere and loses nothing. It returns b"" only after the other side's
  authenticated end (`send_end`); an end of the connection without it is `Truncated`.
- A `send` that is cancelled has written a part of a record: the connection is closed then.
- After any error of `receive` nothing more will be received; after any of `send`, nothing sent.
"""

from __future__ import annotations

import socket
from typing import Final, NoReturn

import trio

from llamesh.mesh.hello import Hello, Welcome, decode_refusal
from llamesh.mesh.records import END, Records, Session
from llamesh.net.transport import READ_SIZE

# Plaintext that is encrypted ahead of what the kernel has taken, in one `send`.
_BATCH: Final = 262_144

# Bytes that `send_now` may leave for the next send. A peer that takes less than this isn't reading.
_MAX_LEFT: Final = 65_536

_wait_readable = trio.lowlevel.wait_readable
_wait_writable = trio.lowlevel.wait_writable


class Truncated(ConnectionError):
    """The connection ended without the other side's authenticated end: somebody cut it."""


class NoiseTransport:
    """`net.transport.Transport`, encrypted. It owns the socket.

    Attributes: `sock`; `remote`: what the other side said, a Hello on the acceptor's side and a
    Welcome on the dialler's; `remote_key`: its proven public key, 32 bytes; `address`: where it is,
    for people; `opened_at`: `trio.current_time()` when the handshake was done.
    """

    __slots__ = (
        "_failure",
        "_left",
        "_records",
        "_sending",
        "_session",
        "_torn",
        "address",
        "closed",
        "opened_at",
        "remote",
        "remote_key",
        "sock",
    )

    def __init__(self, sock: socket.socket, session: Session, remote: Hello | Welcome, address: str) -> None:
        self.sock = sock
        self.remote = remote
        self.remote_key = session.remote_static
        self.address = address
        self.opened_at = trio.current_time()
        self.closed = False
        self._session = session
        self._records = Records(session)
        self._failure: Exception | None = None
        self._left = b""  # of `send_now`, not yet taken by the kernel
        self._sending = False
        self._torn: str | None = None  # why nothing more can be sent

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<NoiseTransport with {self.remote.node_id} at {self.address}, {state}>"

    async def receive(self) -> bytes:
        """See `Transport.receive`. Raises Truncated, RecordBroken, Refused, all of them OSErrors.

        One read of the kernel's buffer, and everything that is complete in it, joined.
        """
        records = self._records
        while True:
            if self._failure is not None:
                raise self._failure
            if records.ended:
                return b""
            if self.closed:
                raise trio.ClosedResourceError
            # Waits first, as `SocketTransport` does: fairness, and events coalesce meanwhile.
            await _wait_readable(self.sock)
            try:
                data = self.sock.recv(READ_SIZE)
            except BlockingIOError:
                continue
            if not data:
                self._fail(Truncated(f"{self.remote.node_id} at {self.address} cut the connection"))
            try:
                plain = records.feed(data)
            except OSError as error:
                self._fail(error)
            if records.refusal is not None:
                who = f"{self.remote.node_id} at {self.address}"
                self._failure = decode_refusal(records.refusal, who, own_key=False)
            if plain:
                return plain

    def _fail(self, error: OSError) -> NoReturn:
        self._failure = error
        raise error

    async def send(self, data: bytes | memoryview) -> None:
        """See `Transport.send`. Doesn't yield while the kernel's buffer has room."""
        if self._torn is not None or self._sending:
            self._refuse_send()
        if len(data) > _BATCH:
            view = memoryview(data)
            for at in range(0, len(view), _BATCH):
                await self._write(self._session.seal(view[at : at + _BATCH]))
        elif data:
            await self._write(self._session.seal(data))

    def send_now(self, data: bytes) -> bool:
        """Send without waiting, for what is worth little later (interim heads).

        What the kernel doesn't take now goes with the next send. False when `data` wasn't sent and
        won't be: another task is sending, too much is left over, or nothing can be sent any more.
        Call it only where a whole message of the inner protocol may stand.
        """
        if self._torn is not None or self._sending or self.closed or len(self._left) + len(data) > _MAX_LEFT:
            return False
        sealed = self._left + self._session.seal(data)
        try:
            self._left = sealed[self.sock.send(sealed) :]
        except BlockingIOError:
            self._left = sealed
        except OSError as error:
            self._torn = f"the connection is lost: {error}"
            return False
        return True

    async def send_end(self) -> None:
        """Tell the other side, authenticated, that nothing more will come. Bounded by the caller."""
        if self._torn is not None or self._sending:
            self._refuse_send()
        await self._write(self._session.encrypt(END, b""))
        self._torn = "the end was sent"

    async def _write(self, sealed: bytes) -> None:
        """All of it, after what `send_now` left."""
        if self._left:
            sealed, self._left = self._left + sealed, b""
        try:
            try:
                sent = self.sock.send(sealed)
            except BlockingIOError:
                sent = 0
            if sent == len(sealed):
                return
            self._sending = True
            rest = memoryview(sealed)[sent:]
            while rest:
                await _wait_writable(self.sock)
                try:
                    rest = rest[self.sock.send(rest) :]
                except BlockingIOError:
                    continue
            self._sending = False
        except OSError as error:
            # What the other side said before may still be there to read: no close here.
            self._torn = f"the connection is lost: {error}"
            self._sending = False
            raise
        except BaseException:
            self._torn = "an earlier send was cut off in the middle of a record"
            self._sending = False
            self.close()
            raise

    def _refuse_send(self) -> NoReturn:
        if self._torn is None:
            raise trio.BusyResourceError("another task is sending")
        raise OSError(f"can't send to {self.remote.node_id} at {self.address}: {self._torn}")

    def detach(self) -> tuple[socket.socket, Session, Records]:
        """Give the connection away, between two messages: this object is closed then, the socket isn't."""
        if self.closed or self._failure is not None or self._torn is not None or self._sending or self._left:
            raise OSError(f"the connection with {self.remote.node_id} can't be used any more")
        self.closed = True
        trio.lowlevel.notify_closing(self.sock)
        return self.sock, self._session, self._records

    def close(self) -> None:
        """See `Transport.close`. Says nothing to the other side, which takes it for a cut."""
        if not self.closed:
            self.closed = True
            trio.lowlevel.notify_closing(self.sock)
            self.sock.close()
