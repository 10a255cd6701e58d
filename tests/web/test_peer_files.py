"""Files for peers: what may be asked for, in which parts, how many at once, and what ends a transfer."""

from __future__ import annotations

from typing import Any

import pytest
import trio
import trio.testing

from llamesh.errors import InvalidRequest, LlameshError, NotFound, QueueFull
from llamesh.net.heads import parse_head
from llamesh.web.peer_files import MOST_AT_ONCE, OutOfRange, PeerFiles

SHA256 = "ab" * 32
CONTENT = bytes(range(256)) * 12_000  # some three megabytes


class FakeFile:
    """In memory."""

    def __init__(self, content: bytes = CONTENT, size: int | None = None) -> None:
        self.size = len(content) if size is None else size
        self.content = content
        self.closed = False
        self.reads = 0

    def read(self, buffer: memoryview, at: int) -> int:
        self.reads += 1
        data = self.content[at : at + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self.closed = True


class FakeTransport:
    """Remembers what was sent; `gate`, where it is set, holds it up after the head."""

    closed = False

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.gate: trio.Event | None = None

    async def send(self, data: bytes | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        if self.gate is not None and self.sent:
            await self.gate.wait()
        self.sent.append(bytes(data))

    async def receive(self) -> bytes:
        raise NotImplementedError

    async def send_end(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def answer(self) -> tuple[bytes, bytes]:
        return self.sent[0], b"".join(self.sent[1:])


class World:
    """A `PeerFiles` with one file in it."""

    def __init__(self, file: FakeFile | None = None) -> None:
        self.file = file or FakeFile()
        self.unwilling = ""
        self.requests = 0
        self.files = PeerFiles(self._open, lambda: self.unwilling, lambda: self.requests)

    async def _open(self, sha256: str) -> FakeFile | None:
        await trio.lowlevel.checkpoint()
        return self.file if sha256 == SHA256 else None

    async def ask(
        self, name: str = SHA256, *headers: str, transport: FakeTransport | None = None, method: str = "GET"
    ) -> tuple[bytes, bytes]:
        lines = [f"{method} /mesh/weights/{name} HTTP/1.1", "host: llamesh", *headers, "", ""]
        head = parse_head("\r\n".join(lines).encode())
        transport = transport or FakeTransport()
        await self.files.answer(transport, head, True, lambda seconds: None)
        return transport.answer()


async def test_a_file_as_a_whole() -> None:
    world = World()
    head, body = await world.ask()
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-length: %d\r\n" % len(CONTENT) in head
    assert body == CONTENT
    assert world.file.closed
    assert world.files.sending == 0


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("0-0", 0, 1), ("5-9", 5, 10), ("1500000-2600000", 1_500_000, 2_600_001), ("100-", 100, len(CONTENT)),
     ("7-9999999999999", 7, len(CONTENT))],
)  # fmt: skip
async def test_a_range_of_it(asked: str, start: int, end: int) -> None:
    world = World()
    world.requests = 1  # it gives way to requests, and comes all the same
    head, body = await world.ask(SHA256, f"range: bytes={asked}")
    assert head.startswith(b"HTTP/1.1 206 ")
    assert b"content-range: bytes %d-%d/%d\r\n" % (start, end - 1, len(CONTENT)) in head
    assert body == CONTENT[start:end]


@pytest.mark.parametrize(
    ("headers", "error"),
    [
        (["range: bytes=-5"], InvalidRequest),
        (["range: bytes=0-1,3-4"], InvalidRequest),
        (["range: bytes=0-1", "range: bytes=3-4"], InvalidRequest),
        (["range: lines=0-1"], InvalidRequest),
        (["range: bytes=9-5"], OutOfRange),
        ([f"range: bytes={len(CONTENT)}-"], OutOfRange),
        (["range: bytes=99999999999999999999-"], InvalidRequest),
    ],
)
async def test_ranges_that_are_none(headers: list[str], error: type[LlameshError]) -> None:
    world = World()
    transport = FakeTransport()
    with pytest.raises(error):
        await world.ask(SHA256, *headers, transport=transport)
    assert transport.sent == []
    assert world.file.closed
    assert world.files.sending == 0


@pytest.mark.parametrize(
    "name",
    ["", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", SHA256.upper(), SHA256[:-1], SHA256 + "0",
     SHA256 + "/..", "/" + SHA256, "cd" * 32],
)  # fmt: skip
async def test_what_isnt_there_or_isnt_a_name(name: str) -> None:
    with pytest.raises(NotFound):
        await World().ask(name)


async def test_only_to_be_fetched() -> None:
    with pytest.raises(InvalidRequest):
        await World().ask(method="DELETE")


async def test_who_is_unwilling_sends_nothing() -> None:
    world = World()
    world.unwilling = "serve_peers is never"
    with pytest.raises(QueueFull, match="serve_peers"):
        await world.ask()


async def test_so_many_at_once_and_no_more() -> None:
    world = World()
    gate = trio.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(MOST_AT_ONCE):
            transport = FakeTransport()
            transport.gate = gate
            nursery.start_soon(lambda t=transport: world.ask(transport=t))
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(QueueFull) as refusal:
            await world.ask()
        assert refusal.value.retry_after
        gate.set()
    assert world.files.sending == 0
    await world.ask()


async def test_a_cancelled_transfer_reads_no_further() -> None:
    world = World(FakeFile(CONTENT * 5))
    transport = FakeTransport()
    transport.gate = trio.Event()
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: world.ask(transport=transport))
            while world.file.reads < 2:
                await trio.sleep(0.001)
            scope.cancel()
    assert world.file.closed
    assert world.files.sending == 0
    assert world.file.reads <= 3, "it read on without anybody taking it"


async def test_a_file_that_is_cut_meanwhile_ends_the_answer() -> None:
    world = World(FakeFile(CONTENT, size=len(CONTENT) + 1))
    with pytest.raises(OSError, match="cut"):
        await world.ask()
    assert world.file.closed


async def test_a_peer_that_is_gone_ends_it() -> None:
    class Gone(FakeTransport):
        async def send(self, data: Any) -> None:
            await trio.lowlevel.checkpoint()
            if self.sent:
                raise BrokenPipeError("gone")
            self.sent.append(bytes(data))

    world = World()
    with pytest.raises(OSError, match="gone"):
        await world.ask(transport=Gone())
    assert world.file.closed
