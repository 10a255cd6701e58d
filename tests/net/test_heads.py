"""Request heads and chunked bodies: what is taken, what is refused, and that the cuts don't matter."""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.net.heads import MAX_REQUEST_HEAD, BadRequest, ChunkDecoder, RequestHead, find_head, parse_head

HOST = b"Host: x\r\n"


def request(*lines: bytes, first: bytes = b"POST /v1/completions?a=b HTTP/1.1", host: bytes = HOST) -> bytes:
    return first + b"\r\n" + host + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def parse(data: bytes) -> RequestHead:
    assert find_head(data) == len(data)
    return parse_head(data)


def test_a_head_is_taken_apart() -> None:
    head = parse(request(b"Content-Length: 12", b"X-Thing:  a b ", b"Expect: 100-continue"))
    assert (head.method, head.version) == (b"POST", "1.1")
    assert (head.target, head.path, head.query) == (
        b"/v1/completions?a=b",
        b"/v1/completions",
        b"a=b",
    )
    assert head.length == 12
    assert not head.chunked
    assert head.expects_continue
    assert head.keep_alive
    assert head.get(b"x-thing") is not None
    assert head.get(b"absent") is None


def test_what_follows_the_head_stays() -> None:
    data = request()
    assert find_head(data + b"body\r\n\r\n") == len(data)


@pytest.mark.parametrize(
    ("lines", "first", "keeps"),
    [
        ((), b"GET / HTTP/1.1", True),
        ((b"Connection: close",), b"GET / HTTP/1.1", False),
        ((b"Connection: keep-alive, Close",), b"GET / HTTP/1.1", False),
        ((b"Connection: x", b"Connection: close"), b"GET / HTTP/1.1", False),
        ((b"Transfer-Encoding: chunked",), b"POST / HTTP/1.1", True),
        ((), b"GET / HTTP/1.0", False),
    ],
)
def test_keep_alive(lines: tuple[bytes, ...], first: bytes, keeps: bool) -> None:
    assert parse(request(*lines, first=first)).keep_alive is keeps


def test_upgrades_are_recognised() -> None:
    assert parse(request(b"Connection: Upgrade", b"Upgrade: h2c", first=b"GET / HTTP/1.1")).upgrade
    assert not parse(request()).upgrade


def test_http_1_0_needs_no_host() -> None:
    assert parse(request(first=b"GET / HTTP/1.0", host=b"")).version == "1.0"


SMUGGLED = {
    "two lengths": request(b"Content-Length: 5", b"Content-Length: 6"),
    "the same length twice": request(b"Content-Length: 5", b"Content-Length: 5"),
    "a list of lengths": request(b"Content-Length: 5,5"),
    "a signed length": request(b"Content-Length: +5"),
    "a negative length": request(b"Content-Length: -5"),
    "a hexadecimal length": request(b"Content-Length: 0x5"),
    "an empty length": request(b"Content-Length:"),
    "a length past 64 bits": request(b"Content-Length: 99999999999999999999999"),
    "a length of thousands of digits": request(b"Content-Length: " + b"0" * 5000 + b"5"),
    "length and chunks": request(b"Content-Length: 5", b"Transfer-Encoding: chunked"),
    "chunks and length": request(b"Transfer-Encoding: chunked", b"Content-Length: 5"),
    "nearly chunked": request(b"Transfer-Encoding: xchunked"),
    "chunked after another": request(b"Transfer-Encoding: gzip, chunked"),
    "chunked before another": request(b"Transfer-Encoding: chunked, identity"),
    "chunked twice": request(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "chunked with a tab": request(b"Transfer-Encoding: \x0bchunked"),
    "empty transfer encoding": request(b"Transfer-Encoding:"),
    "a folded line": request(b"X: a", b" b"),
    "a folded transfer encoding": request(b"Transfer-Encoding:", b" chunked"),
    "a folded first header": request(host=b" Host: x\r\n"),
    "a blank before the colon": request(b"Content-Length : 5"),
    "a name without a colon": request(b"X"),
    "an empty name": request(b": x"),
    "NUL in a value": request(b"X: a\x00b"),
    "NUL in a name": request(b"X\x00: a"),
    "CR in a value": request(b"X: a\rY: b"),
    "LF ends a header": request(b"X: a\nY: b"),
    "LF ends the request line": b"GET / HTTP/1.1\nHost: x\r\n\r\n",
    "a second request behind LF LF": b"GET / HTTP/1.1\nHost: x\n\nGET /b HTTP/1.1\r\nHost: x\r\n\r\n",
    "no Host": request(host=b""),
    "two Hosts": request(b"Host: y"),
    "absolute target": request(first=b"GET http://x/ HTTP/1.1"),
    "authority target": request(first=b"CONNECT x:1 HTTP/1.1"),
    "a blank in the target": request(first=b"GET /a b HTTP/1.1"),
    "a control character in the target": request(first=b"GET /\x01 HTTP/1.1"),
    "a high byte in the target": request(first=b"GET /\xff HTTP/1.1"),
    "no version": b"GET /\r\n\r\n",
    "HTTP/0.9": request(first=b"GET / HTTP/0.9"),
    "HTTP/1.2": request(first=b"GET / HTTP/1.2"),
    "HTTP/2.0": b"PRI * HTTP/2.0\r\n\r\n",
    "RTSP": request(first=b"DESCRIBE / RTSP/1.0"),
    "ICE": request(first=b"SOURCE / ICE/1.0"),
    "an unknown method": request(first=b"FOO / HTTP/1.1"),
    "a lower case method": request(first=b"get / HTTP/1.1"),
    "another expectation": request(b"Expect: something"),
    "only an empty line": b"\r\n\r\n",
}


@pytest.mark.parametrize("data", list(SMUGGLED.values()), ids=list(SMUGGLED))
def test_what_could_be_read_in_two_ways_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequest) as caught:
        parse_head(data[: find_head(data)])
    assert not caught.value.too_large


def test_too_many_header_lines() -> None:
    assert len(parse(request(*[b"X: y"] * 127)).headers) == 128
    with pytest.raises(BadRequest) as caught:
        parse(request(*[b"X: y"] * 128))
    assert caught.value.too_large


@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"])
def test_a_huge_head(end: bytes) -> None:
    data = b"GET / HTTP/1.1\r\nX: " + b"y" * MAX_REQUEST_HEAD
    with pytest.raises(BadRequest) as caught:
        find_head(data + end)
    assert caught.value.too_large


@pytest.mark.parametrize(
    "start",
    [b"\x16\x03\x01", b"\x00", b"get ", b"GET\t/", b" GET /", b"G" * 40, b"{}", b"GET / HTTP/1.1\n\n"],
)
def test_no_more_bytes_are_awaited_for_what_is_no_request(start: bytes) -> None:
    with pytest.raises(BadRequest):
        find_head(start)


@pytest.mark.parametrize("start", [b"G", b"GET", b"GET ", b"M-SEARCH", b"GET / HTTP/1.1\r\nHost: x\r\n"])
def test_an_incomplete_head_is_awaited(start: bytes) -> None:
    assert find_head(start) == 0


HEADS = st.builds(
    lambda names, values: request(*(n + b": " + v for n, v in zip(names, values, strict=False))),
    st.lists(
        st.from_regex(rb"[A-Za-z][A-Za-z0-9-]{0,15}", fullmatch=True).map(lambda n: b"X-" + n), max_size=5
    ),
    st.lists(st.from_regex(rb"[!-~]([ -~]{0,20}[!-~])?", fullmatch=True), max_size=5),
)


@given(HEADS)
def test_byte_by_byte_finds_the_same_head(data: bytes) -> None:
    for end in range(1, len(data)):
        assert find_head(data[:end]) == 0
    assert parse(data).target == b"/v1/completions?a=b"


@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda junk: b"GET /" + junk + b"\r\n\r\n"))
def test_random_bytes_are_a_head_or_refused(data: bytes) -> None:
    with contextlib.suppress(BadRequest):
        size = find_head(data)
        if size:
            parse_head(data[:size])


# Bodies in chunks.


def chunked(*chunks: bytes, trailers: bytes = b"") -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(c), c) for c in chunks if c) + b"0\r\n" + trailers + b"\r\n"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(ends)]


def decode(pieces: list[bytes]) -> tuple[bytes, bytes]:
    """The body and what follows it; fails unless it ends."""
    decoder = ChunkDecoder()
    body = b""
    for number, piece in enumerate(pieces):
        body += decoder.feed(piece)
        if decoder.done:
            return body, decoder.rest + b"".join(pieces[number + 1 :])
    raise AssertionError("no end")


def test_chunks_with_extensions_and_trailers() -> None:
    data = b"5;a=b\r\nhello\r\n1 \r\n!\r\nA\r\n0123456789\r\n0;last\r\nX: y\r\nZ: w\r\n\r\nGET /"
    assert decode([data]) == (b"hello!0123456789", b"GET /")


@given(
    st.lists(st.binary(max_size=40), max_size=6),
    st.sampled_from([b"", b"X: y\r\n"]),
    st.binary(max_size=10),
    st.lists(st.integers(0, 400), max_size=10),
)
def test_any_cut_decodes_to_the_same(
    chunks: list[bytes], trailers: bytes, rest: bytes, places: list[int]
) -> None:
    data = chunked(*chunks, trailers=trailers) + rest
    whole = (b"".join(chunks), rest)
    assert decode([data]) == whole
    assert decode(cut(data, places)) == whole
    assert decode([data[i : i + 1] for i in range(len(data))]) == whole


@pytest.mark.parametrize(
    "data",
    [
        b"x\r\n",
        b"\r\n",
        b"-1\r\n",
        b"+5\r\nhello\r\n",
        b"0x5\r\nhello\r\n",
        b" 5\r\nhello\r\n",
        b"5\nhello\r\n0\r\n\r\n",
        b"5\rhello\r\n",
        b"5;a\nb\r\nhello\r\n",
        b"100000000\r\n",
        b"5\r\nhelloX\r\n",
        b"5\r\nhello0\r\n\r\n",
        b"5;" + b"e" * 2000,
        b"5;" + b"e" * 2000 + b"\r\n",
        b"0\r\n" + b"X: y\r\n" * 2000,
        b"0\r\nX: " + b"y" * 2000,
    ],
)
def test_malformed_chunks(data: bytes) -> None:
    decoder = ChunkDecoder()
    with pytest.raises(BadRequest):
        decoder.feed(data)


@given(st.lists(st.binary(max_size=50), max_size=8))
def test_random_bytes_decode_or_are_refused(pieces: list[bytes]) -> None:
    decoder = ChunkDecoder()
    with contextlib.suppress(BadRequest):
        for piece in pieces:
            if not decoder.done:
                decoder.feed(piece)
