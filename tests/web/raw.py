"""Clients that tests steer byte by byte: HTTP/1.x and HTTP/2 with prior knowledge, blocking."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import h2.config
import h2.connection
import h2.events

PATIENCE = 20.0


class Cut(Exception):
    """The answer ended in the middle. `got`: the body up to there."""

    def __init__(self, got: bytes) -> None:
        super().__init__(f"cut after {len(got)} bytes of body")
        self.got = got


@dataclass
class Reply:
    """One answer. `headers` have lower case names; of several with one name the last counts."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; fails unless the body is an error document."""
        document = self.json()
        assert set(document["error"]) == {"message", "type", "param", "code"}, document
        found: dict[str, Any] = document["error"]
        return found


def post(
    document: Any,
    path: str = "/v1/chat/completions",
    *headers: str,
    version: str = "1.1",
    host: str = "x",
) -> bytes:
    """A whole HTTP/1 request with a JSON body (bytes go as they are)."""
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    lines = [f"POST {path} HTTP/{version}", f"Host: {host}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1", host: str | None = "x") -> bytes:
    """A whole HTTP/1 request without a body; `host` None sends no such header."""
    named = [] if host is None else [f"Host: {host}"]
    return "\r\n".join([f"{method} {path} HTTP/{version}", *named, *headers, "", ""]).encode("latin-1")


class Http1:
    """One HTTP/1 connection."""

    def __init__(self, port: int, *, receive_buffer: int = 0) -> None:
        self.sock = socket.socket()
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.buffer = b""

    def __enter__(self) -> Http1:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def close(self) -> None:
        self.sock.close()

    def fill(self) -> bool:
        """Receive once; False at the end of the stream, be it clean or not."""
        try:
            data = self.sock.recv(65_536)
        except ConnectionError:
            data = b""
        self.buffer += data
        return bool(data)

    def until(self, mark: bytes, got: bytes = b"") -> bytes:
        """Everything up to and with `mark`."""
        while mark not in self.buffer:
            if not self.fill():
                raise Cut(got + self.buffer)
        end = self.buffer.index(mark) + len(mark)
        taken, self.buffer = self.buffer[:end], self.buffer[end:]
        return taken

    def exactly(self, size: int, got: bytes = b"") -> bytes:
        while len(self.buffer) < size:
            if not self.fill():
                raise Cut(got + self.buffer)
        taken, self.buffer = self.buffer[:size], self.buffer[size:]
        return taken

    def head(self) -> Reply:
        """Status and headers of the next answer."""
        first, *lines = self.until(b"\r\n\r\n").decode("latin-1").strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert first.startswith("HTTP/1."), first
        return Reply(int(first.split()[1]), headers, b"")

    def chunks(self) -> Iterator[bytes]:
        """The chunks of a body, to its proper end; raises Cut."""
        while size := int(self.until(b"\r\n").strip() or b"0", 16):
            yield self.exactly(size)
            assert self.exactly(2) == b"\r\n"
        assert self.exactly(2) == b"\r\n"

    def answer(self, *, has_body: bool = True) -> Reply:
        """The next whole answer. Raises Cut, also when a connection without framing is reset."""
        reply = self.head()
        if not has_body or reply.status in (204, 304):
            return reply
        if reply.headers.get("transfer-encoding") == "chunked":
            body = bytearray()
            try:
                for chunk in self.chunks():
                    body += chunk
            except Cut:
                raise Cut(bytes(body)) from None
            reply.body = bytes(body)
        elif "content-length" in reply.headers:
            reply.body = self.exactly(int(reply.headers["content-length"]))
        else:
            body, self.buffer = bytearray(self.buffer), b""
            try:
                while data := self.sock.recv(65_536):
                    body += data
            except ConnectionError:
                raise Cut(bytes(body)) from None
            reply.body = bytes(body)
        return reply

    def rest(self) -> bytes:
        """Everything until the other side closes."""
        while self.fill():
            pass
        taken, self.buffer = self.buffer, b""
        return taken


class Http2:
    """One HTTP/2 connection with prior knowledge."""

    def __init__(self, port: int, *, unchecked: bool = False) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), PATIENCE)
        config = h2.config.H2Configuration(
            header_encoding="latin-1",
            validate_outbound_headers=not unchecked,
            normalize_outbound_headers=not unchecked,
        )
        self.state = h2.connection.H2Connection(config)
        self.state.initiate_connection()
        self.replies: dict[int, Reply] = {}
        self.bodies: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        try:
            self.flush()
        except OSError:
            self.sock.close()
            raise

    def __enter__(self) -> Http2:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def flush(self) -> None:
        self.sock.sendall(self.state.data_to_send())

    def start(
        self,
        method: str,
        path: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes | None = None,
        host: str = "x",
    ) -> int:
        """Begin a request and, with a body, send all of that; the stream's number."""
        stream = self.state.get_next_available_stream_id()
        fields = [(":method", method), (":scheme", "http"), (":authority", host), (":path", path), *headers]
        if body is not None:
            fields.append(("content-length", str(len(body))))
        self.state.send_headers(stream, fields, end_stream=body is None)
        self.flush()
        while body:
            room = min(self.state.local_flow_control_window(stream), self.state.max_outbound_frame_size)
            if not room:
                self.step()
                if stream in self.ended:  # answered before all of it was sent
                    return stream
                continue
            self.state.send_data(stream, body[:room])
            body = body[room:]
            self.flush()
        if body is not None:
            self.state.end_stream(stream)
            self.flush()
        return stream

    def step(self) -> None:
        """Receive once and take note; raises Cut at the end of the connection."""
        try:
            data = self.sock.recv(65_536)
        except ConnectionError:
            data = b""
        if not data:
            raise Cut(b"".join(self.bodies.values()))
        for event in self.state.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                headers = {str(name): str(value) for name, value in event.headers or ()}
                assert event.stream_id is not None
                self.replies[event.stream_id] = Reply(int(headers.pop(":status")), headers, b"")
                self.bodies[event.stream_id] = bytearray()
            elif isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                assert event.data is not None
                self.bodies[event.stream_id] += event.data
                self.state.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                assert event.stream_id is not None
                self.ended.add(event.stream_id)
            elif isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated):
                raise Cut(b"".join(self.bodies.values()))
        with contextlib.suppress(ConnectionError):
            self.flush()

    def answer(self, stream: int) -> Reply:
        """The whole answer on a stream. Raises Cut."""
        while stream not in self.ended:
            self.step()
        self.replies[stream].body = bytes(self.bodies[stream])
        return self.replies[stream]

    def until(self, stream: int, mark: bytes) -> None:
        """Receive until the answer on a stream holds `mark`."""
        while mark not in self.bodies.get(stream, b""):
            self.step()

    def reset(self, stream: int) -> None:
        self.state.reset_stream(stream, 8)
        self.flush()
