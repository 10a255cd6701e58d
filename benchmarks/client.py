"""A few blocking HTTP calls on plain sockets: what a row asks outside its hot loop.

Not an HTTP library: one request per call on loopback, answers by length, in chunks or until close.
"""

from __future__ import annotations

import json
import socket
import time
from typing import Any

MESSAGES = [{"role": "user", "content": "hi"}]


def _head(method: str, path: str, size: int) -> bytes:
    lines = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{lines}Content-Length: {size}\r\n\r\n".encode()


def _exchange(connection: socket.socket, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    connection.sendall(_head(method, path, len(body)) + body)
    reader = connection.makefile("rb")
    status = int(reader.readline().split()[1])
    length, chunked = None, False
    while (line := reader.readline().strip().lower()) not in (b"", b"\n"):
        name, _, value = line.partition(b":")
        if name == b"content-length":
            length = int(value)
        elif name == b"transfer-encoding":
            chunked = b"chunked" in value
    if not chunked:
        return status, reader.read(length) if length is not None else reader.read()
    answer = b""
    while size := int(reader.readline().split(b";")[0], 16):
        answer += reader.read(size)
        reader.readline()
    reader.readline()
    return status, answer


def call(port: int, method: str, path: str, body: Any = None, timeout: float = 30.0) -> tuple[int, bytes]:
    """One request on a connection of its own: (status, body). Raises OSError when nobody answers."""
    payload = b"" if body is None else json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        return _exchange(connection, method, path, payload)


def get_json(port: int, path: str) -> Any:
    """The JSON behind a GET. Raises OSError or ValueError when there is none."""
    status, body = call(port, "GET", path)
    if status != 200:
        raise ValueError(f"GET {path} answered {status}: {body[:200]!r}")
    return json.loads(body)


def wait_healthy(port: int, every: float, timeout: float) -> None:
    """Poll GET /health, a fresh connection each time, every `every` seconds. Raises TimeoutError."""
    until = time.monotonic() + timeout
    while True:
        asked = time.monotonic()
        try:
            if call(port, "GET", "/health", timeout=timeout)[0] == 200:
                return
        except (OSError, ValueError, IndexError):
            pass
        if time.monotonic() > until:
            raise TimeoutError(f"nothing healthy on port {port} after {timeout:g} s")
        time.sleep(max(0.0, asked + every - time.monotonic()))


def first_token(port: int, model: str, timeout: float = 60.0) -> float:
    """Ask for a short stream; returns time.monotonic() at its first content, after reading it to its end."""
    request = {"model": model, "messages": MESSAGES, "max_tokens": 4, "stream": True}
    body = json.dumps(request).encode()
    with socket.create_connection(("127.0.0.1", port), timeout) as connection:
        connection.sendall(_head("POST", "/v1/chat/completions", len(body)) + body)
        received, at = b"", 0.0
        while b"data: [DONE]" not in received:
            piece = connection.recv(65536)
            if not piece:
                raise ConnectionError(f"the stream ended early: {received[-300:]!r}")
            received += piece
            if not at and b'"content":"' in received:
                at = time.monotonic()
            if b" 200 " not in received[:20]:
                raise ConnectionError(f"no stream: {received[:300]!r}")
    return at


def open_idle(port: int, model: str, count: int) -> list[socket.socket]:
    """`count` keep-alive connections, each idle after one answered chat completion. The caller closes."""
    body = json.dumps({"model": model, "messages": MESSAGES, "max_tokens": 1}).encode()
    connections: list[socket.socket] = []
    try:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), 30)
            connections.append(connection)
            status, answer = _exchange(connection, "POST", "/v1/chat/completions", body)
            if status != 200:
                raise ConnectionError(f"a chat completion answered {status}: {answer[:200]!r}")
    except BaseException:
        close_all(connections)
        raise
    return connections


def close_all(connections: list[socket.socket]) -> None:
    """Close every one."""
    for connection in connections:
        connection.close()
