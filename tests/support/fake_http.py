"""HTTP/1.1 as the fake llama-server speaks it: whole requests in, replies in pieces out.

Only the standard library, and the language of Python 3.9: the fake runs on whatever `python3` is.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any


@dataclass
class Request:
    """One request as it arrived; `head` includes the blank line."""

    head: bytes
    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    document: dict[str, Any]

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: str) -> str:
        return next((value for key, value in self.headers if key.lower() == name), "")


class ClientGone(Exception):
    """The client closed while we were working for it."""


class Closed(Exception):
    """This connection ends now, without another byte."""


class Connection:
    """One client connection: reads whole requests, and notices when the client leaves."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.buffer = b""
        self.chunked = False

    async def fill(self) -> bool:
        """Read more into the buffer; False at the end of the stream."""
        try:
            data = await self.reader.read(65536)
        except ConnectionError:
            data = b""
        self.buffer += data
        return bool(data)

    async def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            if not await self.fill():
                raise Closed
        end = self.buffer.index(mark) + len(mark)
        taken, self.buffer = self.buffer[:end], self.buffer[end:]
        return taken

    async def exactly(self, length: int) -> bytes:
        while len(self.buffer) < length:
            if not await self.fill():
                raise Closed
        taken, self.buffer = self.buffer[:length], self.buffer[length:]
        return taken

    async def request(self) -> Request:
        head = await self.until(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
        method, target, _ = first.split(" ", 2)
        headers = [
            (name.strip(), value.strip()) for name, _, value in (line.partition(":") for line in lines)
        ]
        names = {name.lower(): value for name, value in headers}
        if names.get("expect", "").lower() == "100-continue":
            await self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = b""
        if names.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self.until(b"\r\n")).split(b";")[0], 16):
                body += (await self.exactly(size + 2))[:-2]
            while await self.until(b"\r\n") != b"\r\n":
                pass
        elif length := int(names.get("content-length", "0")):
            body = await self.exactly(length)
        try:
            document = json.loads(body)
        except ValueError:
            document = None
        return Request(head, method, target, headers, body, document if isinstance(document, dict) else {})

    async def send(self, data: bytes) -> None:
        try:
            self.writer.write(data)
            await self.writer.drain()
        except ConnectionError:
            raise ClientGone from None

    async def head(self, status: int, kind: str, length: int | None, more: dict[str, str]) -> None:
        self.chunked = length is None
        framing = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": str(length)}
        fields = {"Server": "llama.cpp", "Access-Control-Allow-Origin": "", "Content-Type": kind} | framing
        fields |= {"Keep-Alive": "timeout=5, max=100"} | more
        lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        await self.send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def reply(self, status: int, content: Any, more: dict[str, str] | None = None) -> None:
        raw = isinstance(content, bytes)
        body = content if raw else json.dumps(content).encode()
        kind = "text/plain" if raw else "application/json; charset=utf-8"
        await self.head(status, kind, len(body), more or {})
        await self.send(body)

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))


def event(document: dict[str, Any]) -> bytes:
    """One SSE event."""
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def error(message: str, kind: str, code: int) -> dict[str, Any]:
    """llama-server's error document."""
    return {"error": {"message": message, "type": kind, "code": code}}


def counts(generated: int) -> dict[str, Any]:
    """What llama-server tells about the work it did."""
    usage = {"completion_tokens": generated, "prompt_tokens": 3, "total_tokens": generated + 3}
    timings = {
        "cache_n": 1,
        "prompt_n": 2,
        "prompt_ms": 1.0,
        "predicted_n": generated,
        "predicted_ms": 1.0,
    }
    return {"usage": usage | {"prompt_tokens_details": {"cached_tokens": 1}}, "timings": timings}
