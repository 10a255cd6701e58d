"""A file of a peer, as a download reads it: what a peer may answer, and what is done about all the rest."""

from __future__ import annotations

import pytest
import trio

from llamesh.local.weights.errors import NotFound, Unreachable, WeightsError, WrongContent
from llamesh.local.weights.several import Several
from llamesh.mesh.blocking import BlockingLink
from llamesh.sharing.peer_source import PeerSource

SHA256 = "ab" * 32
CONTENT = bytes(range(200))


class FakeLink:
    """Answers each request with the next of `answers`, in pieces of `step` bytes; then with silence, or the
    end."""

    def __init__(self, *answers: bytes, step: int = 50, silent: bool = False) -> None:
        self.answers = list(answers)
        self.asked: list[bytes] = []
        self.step = step
        self.silent = silent
        self.closed = False
        self.was_cut = False
        self._pending = b""

    def send(self, data: bytes) -> None:
        self.asked.append(data)
        self._pending += self.answers.pop(0) if self.answers else b""

    def receive(self) -> bytes:
        piece, self._pending = self._pending[: self.step], self._pending[self.step :]
        if not piece and self.silent:
            raise TimeoutError
        return piece

    def cut(self) -> None:
        self.was_cut = True

    def close(self) -> None:
        self.closed = True


def answer(start: int, end: int, *more: str, status: str = "206 Partial Content", body: bytes = b"") -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        f"content-range: bytes {start}-{end - 1}/{len(CONTENT)}",
        f"content-length: {end - start}",
        *more,
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + (body or CONTENT[start:end])


class FromLinks(PeerSource):
    """Connects to these, one after the other."""

    def __init__(self, *links: FakeLink, name: str = "node b") -> None:
        async def never(fresh: bool) -> BlockingLink:
            raise AssertionError

        super().__init__(name, SHA256, len(CONTENT), never, None)  # type: ignore[arg-type]
        self.links = list(links)
        self.opened = 0

    def link(self, *, fresh: bool) -> BlockingLink:
        if not self.links:
            raise Unreachable(f"{self.name} can't be reached")
        self.opened += 1
        return self.links.pop(0)  # type: ignore[return-value]


def read(source: PeerSource | Several, start: int = 0, end: int = len(CONTENT)) -> bytes:
    channel = source.channel()
    try:
        body, found, buffer = channel.open(start, end), b"", memoryview(bytearray(64))
        while count := body.readinto(buffer):
            found += bytes(buffer[:count])
        body.close()
        return found
    finally:
        channel.close()


def test_ranges_on_one_connection() -> None:
    link = FakeLink(answer(0, 150), answer(150, 200))
    source = FromLinks(link)
    channel = source.channel()
    found, buffer = b"", memoryview(bytearray(64))
    for start, end in ((0, 150), (150, 200)):
        body = channel.open(start, end)
        while count := body.readinto(buffer):
            found += bytes(buffer[:count])
    assert found == CONTENT
    assert source.opened == 1
    assert link.asked[0].startswith(f"GET /mesh/weights/{SHA256} HTTP/1.1\r\n".encode())
    assert b"\r\nrange: bytes=150-199\r\n" in link.asked[1]
    channel.close()
    assert link.closed


def test_a_kept_connection_that_was_closed_is_replaced() -> None:
    source = FromLinks(FakeLink(), FakeLink(answer(0, 200)))
    assert read(source) == CONTENT


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (answer(0, 100), WrongContent),
        (answer(0, 200, "content-length: 200"), WrongContent),
        (answer(0, 200, "transfer-encoding: chunked"), WrongContent),
        (answer(0, 200, body=CONTENT + b"more"), WrongContent),
        (answer(0, 200, status="200 OK"), WrongContent),
        (answer(0, 200, " folded: x"), WrongContent),
        (answer(0, 200, "no colon"), WrongContent),
        (answer(0, 200).replace(b"/200", b"/201"), WrongContent),
        (answer(0, 200).replace(b"HTTP/1.1", b"HTTP/9.9"), WrongContent),
        (b"x" * 40_000, WrongContent),
        (answer(0, 200, status="404 Not Found"), NotFound),
        (answer(0, 200, "retry-after: 7", status="503 Service Unavailable"), Unreachable),
        (answer(0, 200)[:-1], Unreachable),
    ],
)
def test_what_isnt_that_range_isnt_taken(reply: bytes, error: type[WeightsError]) -> None:
    link = FakeLink(reply, step=1000)
    with pytest.raises(error) as refused:
        read(FromLinks(link))
    assert link.closed
    if "retry-after" in str(reply):
        assert isinstance(refused.value, Unreachable)
        assert refused.value.retry_after == 7


def test_silence_is_an_error_and_isnt_tried_twice() -> None:
    with pytest.raises(Unreachable, match="silent"):
        read(FromLinks(FakeLink(silent=True), FakeLink(answer(0, 200))))


def test_cutting_ends_whatever_blocks() -> None:
    link = FakeLink(answer(0, 200))
    channel = FromLinks(link).channel()
    channel.open(0, 200)
    channel.cut()
    assert link.was_cut


def test_another_peer_goes_on_where_one_stopped() -> None:
    broken = FakeLink(answer(0, 200)[:-90])
    rest = FakeLink(answer(110, 200))
    several = Several([FromLinks(broken, name="node b"), FromLinks(rest, name="node c")], None)
    assert read(several) == CONTENT
    assert several.gave == {"node b", "node c"}


def test_when_no_peer_is_left_it_says_why() -> None:
    several = Several([FromLinks(FakeLink(answer(0, 200, status="404 Not Found")))], None)
    with pytest.raises(Unreachable, match="doesn't have it any more"):
        read(several)


async def test_a_link_is_opened_in_trios_thread() -> None:
    link = FakeLink(answer(0, 200))
    asked: list[bool] = []

    async def open_link(fresh: bool) -> BlockingLink:
        await trio.lowlevel.checkpoint()
        asked.append(fresh)
        if len(asked) == 1:
            raise OSError("not yet")
        return link  # type: ignore[return-value]

    token = trio.lowlevel.current_trio_token()
    source = PeerSource("node b", SHA256, len(CONTENT), open_link, token)
    with pytest.raises(Unreachable, match="not yet"):
        await trio.to_thread.run_sync(read, source)
    assert await trio.to_thread.run_sync(read, source) == CONTENT
