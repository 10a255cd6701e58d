"""Files of weights for peers: read ahead in a thread, sealed and sent in small pieces in between requests.

A transfer is work of the lowest rank: it gives way to every task after each piece, and while requests are
being answered here it leaves them most of the time. Whoever downloads has its own reasons to be quick, but a
client who waits for a word has better ones.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from llamesh.errors import InvalidRequest, LlameshError, NotFound, QueueFull
from llamesh.net.exchange import Headers
from llamesh.net.heads import RequestHead
from llamesh.net.transport import Transport
from llamesh.web.headers import request_id, response_head

PREFIX = b"/mesh/weights/"

# Transfers at once, whoever asks; the next one is told to come back.
MOST_AT_ONCE = 4
_BUSY_SECONDS = 2

# What one read takes off the disk, and what is sealed and sent before others get their turn.
_READ_BYTES = 1 << 20
_PIECE_BYTES = 128 << 10

# While requests are answered here, a transfer rests so many times as long as it works.
_REST_RATIO = 1.0
_SHORTEST_REST = 0.0005

# A disk that doesn't give a megabyte in this time hangs; so does a peer that doesn't take a piece.
_SILENCE_SECONDS = 30.0

_SHA256 = re.compile(rb"[0-9a-f]{64}")
_RANGE = re.compile(rb"bytes=(\d{1,19})-(\d{1,19})?")


class File(Protocol):
    """An open file. `read` blocks and may be called in a thread; `close` doesn't block."""

    size: int

    def read(self, buffer: memoryview, at: int) -> int: ...
    def close(self) -> None: ...


class PeerFiles:
    """What this node sends to its peers. `sending`: transfers that are under way."""

    def __init__(
        self,
        open_file: Callable[[str], Awaitable[File | None]],
        unwilling: Callable[[], str],
        requests: Callable[[], int],
    ) -> None:
        """`open_file(sha256)`; `unwilling()`: why nothing is done for peers, "" = it is; `requests()`: how
        many are being answered.
        """
        self.sending = 0
        self._open = open_file
        self._unwilling = unwilling
        self._requests = requests
        self._threads = trio.CapacityLimiter(MOST_AT_ONCE + 1)

    async def answer(
        self, transport: Transport, head: RequestHead, keep_alive: bool, progress: Callable[[float], None]
    ) -> None:
        """Answer a GET below `PREFIX`. `progress(seconds)` is called when that long may pass until it is
        called again. Raises LlameshError before anything was sent.
        """
        if head.method != b"GET":
            raise InvalidRequest("weights can only be fetched")
        name = head.path.removeprefix(PREFIX)
        if not _SHA256.fullmatch(name):
            raise NotFound("weights are asked for by their SHA-256, in small letters")
        if why := self._unwilling():
            raise QueueFull(f"nothing is sent from here: {why}", retry_after=60)
        if self.sending >= MOST_AT_ONCE:
            raise QueueFull(f"{self.sending} transfers are under way already", retry_after=_BUSY_SECONDS)
        self.sending += 1
        try:
            progress(_SILENCE_SECONDS)
            file = await self._open(name.decode())
            if file is None:
                raise NotFound("these weights aren't here")
            try:
                await self._send(transport, file, head, keep_alive, progress)
            finally:
                file.close()
        finally:
            self.sending -= 1

    async def _send(
        self,
        transport: Transport,
        file: File,
        head: RequestHead,
        keep_alive: bool,
        progress: Callable[[float], None],
    ) -> None:
        headers: Headers = [
            (b"content-type", b"application/octet-stream"),
            (b"x-request-id", request_id(head.headers).encode()),
        ]
        asked = [value for name, value in head.headers if name == b"range"]
        start, end, status = 0, file.size, 200
        if asked:
            found = _RANGE.fullmatch(asked[0]) if len(asked) == 1 else None
            if found is None:
                raise InvalidRequest("one range at a time, as bytes=FIRST-LAST")
            start, status = int(found[1]), 206
            end = min(file.size, int(found[2]) + 1) if found[2] else file.size
            if start >= end:
                raise OutOfRange(f"the file has {file.size} bytes")
            headers.append((b"content-range", b"bytes %d-%d/%d" % (start, end - 1, file.size)))
        answer = response_head(status, headers, length=end - start, keep_alive=keep_alive)
        await transport.send(answer)
        try:
            async with trio.open_nursery() as nursery:
                send, receive = trio.open_memory_channel[memoryview](0)
                nursery.start_soon(self._read_ahead, file, start, end, send)
                async with receive:
                    async for block in receive:
                        await self._send_block(transport, block, progress)
        except BaseExceptionGroup as group:
            lost, rest = group.split(OSError)
            if lost is None or rest is not None:
                raise rest or group from None
            raise OSError(str(lost.exceptions[0])) from group

    async def _read_ahead(
        self, file: File, start: int, end: int, channel: trio.MemorySendChannel[memoryview]
    ) -> None:
        # One is being sent, one waits to be taken, one is being filled.
        buffers = [memoryview(bytearray(min(_READ_BYTES, end - start))) for _ in range(3)]
        async with channel:
            while start < end:
                buffer = buffers[0][: end - start]
                buffers.append(buffers.pop(0))
                count = await trio.to_thread.run_sync(
                    file.read, buffer, start, abandon_on_cancel=True, limiter=self._threads
                )
                if count < len(buffer):
                    raise OSError("the file was cut while it was sent")
                await channel.send(buffer)
                start += count

    async def _send_block(
        self, transport: Transport, block: memoryview, progress: Callable[[float], None]
    ) -> None:
        for at in range(0, len(block), _PIECE_BYTES):
            progress(_SILENCE_SECONDS)
            began = trio.current_time()
            await transport.send(block[at : at + _PIECE_BYTES])
            if self._requests():
                took = trio.current_time() - began
                await trio.sleep(max(_SHORTEST_REST, min(took, 0.002) * _REST_RATIO))
            else:
                await trio.lowlevel.checkpoint()


class OutOfRange(LlameshError):
    """A range that begins after the end."""

    status, type = 416, "invalid_request_error"
