"""A link that tests hold in their hands: a TCP proxy that listens in, and harms what passes.

    with Tap("127.0.0.1:8080") as tap:
        ...                               # somebody talks to tap.address
        assert b"secret" not in tap.heard()
        tap.stall()                       # frozen, not closed
        tap.alive[-1].to_target.flip()    # the next byte that passes arrives broken

"To the target" is what the dialler sends, "to the dialler" the answer. A tap works in a thread of its own,
so that any kind of test can use it and a failing one raises its own plain exception. What a method here does
is done when it returns. At the end of the block everything is closed.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self, TypeVar

import trio

T = TypeVar("T")

PATIENCE_SECONDS = 20.0
RECORD_LIMIT = 256 << 20
"""Bytes that one tap remembers at most; a link that brings more is cut rather than eat the memory."""

_READ_SIZE = 65_536
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 seconds: close says "reset"."""


class Flow:
    """One direction of one link."""

    def __init__(self, tap: Tap, source: trio.SocketStream, sink: trio.SocketStream) -> None:
        self._tap, self._source, self._sink = tap, source, sink
        self._recorded = bytearray()
        self._passed = 0
        self._flip_at: int | None = None
        self._end_at: int | None = None

    @property
    def recorded(self) -> bytes:
        """What came in so far, before anything was done to it."""
        return self._tap.do(lambda: bytes(self._recorded))

    @property
    def passed(self) -> int:
        """How many bytes went on so far."""
        return self._tap.do(lambda: self._passed)

    def flip(self, at: int | None = None) -> None:
        """Turn one bit of byte number `at` of this direction (None: of the next one that passes)."""

        def plan() -> None:
            self._flip_at = self._passed if at is None else at

        self._tap.do(plan)

    def truncate(self, at: int | None = None) -> None:
        """Let `at` bytes pass (None: no more than so far) and close both ways in order, as if all was said.

        It happens when the next byte comes.
        """

        def plan() -> None:
            self._end_at = self._passed if at is None else at

        self._tap.do(plan)

    async def pump(self, link: trio.CancelScope) -> None:
        """Carry bytes until the source ends, and pass the end on as it came; the tap calls it."""
        try:
            while data := await self._source.receive_some(_READ_SIZE):
                self._tap.count(len(data))
                self._recorded += data
                await self._tap.let_pass()
                data, ends = self._harm(data)
                self._passed += len(data)
                await self._sink.send_all(data)
                if ends:
                    _close_in_order(self._source, self._sink)
                    link.cancel()
            await self._tap.let_pass()
            await self._sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            # A reset goes on as a reset, and one way doesn't outlive the other's.
            link.cancel()

    def _harm(self, data: bytes) -> tuple[bytes, bool]:
        """What passes of `data`, and whether that was the last."""
        if self._flip_at is not None and self._flip_at < self._passed + len(data):
            place = max(self._flip_at - self._passed, 0)
            data = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
            self._flip_at = None
        if self._end_at is not None and self._end_at < self._passed + len(data):
            return data[: max(self._end_at - self._passed, 0)], True
        return data, False


class Link:
    """One connection through a tap, with a flow each way."""

    def __init__(self, tap: Tap, dialler: trio.SocketStream, target: trio.SocketStream) -> None:
        self.to_target = Flow(tap, dialler, target)
        self.to_dialler = Flow(tap, target, dialler)
        self.over = False
        self._tap = tap
        self._sides = (dialler, target)
        self._scope = trio.CancelScope()

    def cut(self) -> None:
        """End it now; both sides see a reset."""
        self._tap.do(self.cut_now)

    def cut_now(self) -> None:
        """The same for who is in the tap's own thread."""
        self.over = True
        self._scope.cancel()
        _reset(*self._sides)

    async def run(self) -> None:
        """Carry bytes both ways until the link is over; the tap calls it."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.to_target.pump, self._scope)
                    nursery.start_soon(self.to_dialler.pump, self._scope)
        finally:
            self.over = True
            if self._scope.cancelled_caught:
                _reset(*self._sides)
            for side in self._sides:
                side.socket.close()


class Tap:
    """Listens on a free loopback port and connects each who comes to `target` ("host:port").

    `connect` makes the connection instead, for targets that this process can't dial itself; it may
    block for a moment and raise OSError. `links` are all connections so far, the dead ones included.
    """

    def __init__(self, target: str = "", *, connect: Callable[[], socket.socket] | None = None) -> None:
        self.target = target
        self.links: list[Link] = []
        self._connect = connect or self._dial
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._counted = 0
        self._delay = 0.0
        self._down = False
        self._plan: Callable[[Link], None] | None = None
        self._passing = trio.Event()
        self._passing.set()
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._error: BaseException | None = None
        started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(started,), daemon=True)
        self._thread.start()
        assert started.wait(PATIENCE_SECONDS), "the tap's thread doesn't start"

    @property
    def address(self) -> str:
        """What to dial instead of the target."""
        return f"127.0.0.1:{self.port}"

    @property
    def alive(self) -> list[Link]:
        """The links that aren't over."""
        return self.do(lambda: [link for link in self.links if not link.over])

    def heard(self) -> bytes:
        """All bytes that came so far: of each link what went to the target, then the answer."""
        flows = self.do(lambda: [flow for link in self.links for flow in (link.to_target, link.to_dialler)])
        return b"".join(flow.recorded for flow in flows)

    def cut(self) -> None:
        """Reset all connections. New ones pass."""
        self.do(self._cut)

    def down(self) -> None:
        """Reset all connections, and each that comes, until `up`."""

        def fall() -> None:
            self._down = True
            self._cut()

        self.do(fall)

    def up(self) -> None:
        """Let connections pass again."""
        self._down = False

    def stall(self) -> None:
        """Freeze: connections stay open and new ones are accepted, but no byte passes until `resume`."""

        def freeze() -> None:
            if self._passing.is_set():
                self._passing = trio.Event()

        self.do(freeze)

    def resume(self) -> None:
        """Let pass what was held and what comes."""
        self.do(lambda: self._passing.set())

    def delay(self, seconds: float) -> None:
        """Hold each piece that passes so long. One after the other, so it bounds the rate, too."""
        self._delay = seconds

    def on_each(self, plan: Callable[[Link], None] | None) -> None:
        """Do this to each connection to come, before its first byte passes; None stops that.

        `plan` runs in the tap's thread: it may call `flip` and `truncate` of the link's flows.
        """
        self._plan = plan

    def do(self, action: Callable[[], T]) -> T:
        """Run `action` in the tap's thread, where its state lives; the result."""
        if threading.current_thread() is self._thread:
            return action()
        done, results, errors = threading.Event(), list[T](), list[BaseException]()

        def run() -> None:
            try:
                results.append(action())
            except BaseException as error:
                errors.append(error)
            done.set()

        assert self._token is not None
        try:
            self._token.run_sync_soon(run)
        except trio.RunFinishedError:
            # The thread is gone: nobody else has the state now.
            return action()
        assert done.wait(PATIENCE_SECONDS), "the tap's thread hangs"
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Reset what is left and end the thread. Raises what went wrong in it."""
        with contextlib.suppress(trio.RunFinishedError):
            assert self._token is not None
            self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(PATIENCE_SECONDS)
        assert not self._thread.is_alive(), "the tap's thread doesn't end"
        self._listener.close()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # What happens in the thread.

    def count(self, size: int) -> None:
        """Note that so much is remembered. Raises trio.BrokenResourceError beyond `RECORD_LIMIT`."""
        self._counted += size
        if self._counted > RECORD_LIMIT:
            raise trio.BrokenResourceError(f"more than {RECORD_LIMIT} bytes through one tap")

    async def let_pass(self) -> None:
        """Wait while it is stalled, and as long as it delays."""
        await self._passing.wait()
        if self._delay:
            await trio.sleep(self._delay)

    def _work(self, started: threading.Event) -> None:
        try:
            trio.run(self._serve, started)
        except BaseException as error:
            self._error = error

    async def _serve(self, started: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._listener))
        started.set()
        with self._scope:
            async with trio.open_nursery() as nursery:
                while True:
                    self._admit(await listener.accept(), nursery)

    def _admit(self, dialler: trio.SocketStream, nursery: trio.Nursery) -> None:
        sock: socket.socket | None = None
        if not self._down:
            with contextlib.suppress(OSError):
                sock = self._connect()
        if sock is None:
            _reset(dialler)
            return
        sock.setblocking(False)
        # SocketStream sets TCP_NODELAY: what comes in small pieces goes on in small pieces.
        link = Link(self, dialler, trio.SocketStream(trio.socket.from_stdlib_socket(sock)))
        if self._plan is not None:
            self._plan(link)
        self.links.append(link)
        nursery.start_soon(link.run)

    def _cut(self) -> None:
        for link in self.links:
            if not link.over:
                link.cut_now()

    def _dial(self) -> socket.socket:
        host, _, port = self.target.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), PATIENCE_SECONDS)


def replay(data: bytes, address: str) -> bytes:
    """Send `data` to "host:port" on a connection of its own; all that comes back until the other side closes.

    Fails when it doesn't close within `PATIENCE_SECONDS`. Our side stays open meanwhile, so that it is the
    bytes which make the other side close, and not the end of them.
    """
    host, _, port = address.rpartition(":")
    answer = b""
    sock = socket.create_connection((host.strip("[]"), int(port)), PATIENCE_SECONDS)
    with sock, contextlib.suppress(ConnectionError):
        sock.sendall(data)
        while piece := sock.recv(_READ_SIZE):
            answer += piece
    return answer


def _reset(*streams: trio.SocketStream) -> None:
    for stream in streams:
        if stream.socket.fileno() != -1:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            stream.socket.close()


def _close_in_order(*streams: trio.SocketStream) -> None:
    for stream in streams:
        with contextlib.suppress(OSError):
            stream.socket.shutdown(socket.SHUT_RDWR)
        stream.socket.close()
