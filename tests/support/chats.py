"""Replies to chats: whole ones, and streams that a test reads word by word."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import trio


@dataclass(frozen=True)
class Answer:
    """A whole reply to a chat. `text` is what was said, whether it was streamed or not."""

    status: int
    headers: httpx.Headers
    body: bytes
    text: str = ""
    events: list[Any] = field(default_factory=list)

    @property
    def node(self) -> str:
        """The node that says that it served this."""
        return str(self.headers.get("x-llamesh-node", ""))

    @property
    def error(self) -> dict[str, Any]:
        """The error, which must have OpenAI's four members."""
        error = json.loads(self.body)["error"]
        assert isinstance(error, dict)
        assert set(error) == {"message", "type", "param", "code"}, error
        return error


class Talk:
    """A streamed reply in the making."""

    def __init__(self, reply: httpx.Response, lines: AsyncIterator[str]) -> None:
        self.reply = reply
        self._lines = lines

    @property
    def node(self) -> str:
        """The node that says that it serves this."""
        return str(self.reply.headers.get("x-llamesh-node", ""))

    async def word(self) -> str:
        """What the next event says that says anything; "" when the stream has ended as it should.

        Raises httpx.RemoteProtocolError when it is cut.
        """
        async for line in self._lines:
            data = line.removeprefix("data: ")
            if data != line and data != "[DONE]" and (said := said_in(json.loads(data))):
                return said
            if data == "[DONE]":
                return ""
        raise AssertionError("the stream ended without [DONE]")

    async def rest(self) -> str:
        """All that is still said, to the end."""
        said = ""
        while word := await self.word():
            said += word
        return said


def read_answer(status: int, headers: httpx.Headers, body: bytes) -> Answer:
    """What a whole reply says, streamed or not."""
    text, events = "", list[Any]()
    if headers.get("content-type", "").startswith("text/event-stream"):
        lines = body.decode().splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        events = [line if line == "[DONE]" else json.loads(line) for line in data]
        text = "".join(said_in(event) for event in events)
    elif status == 200:
        text = json.loads(body)["choices"][0]["message"]["content"]
    return Answer(status, headers, body, text, events)


@contextlib.asynccontextmanager
async def reading(reply: httpx.Response) -> AsyncIterator[Talk]:
    """A streamed reply as a talk; at the end of the block nothing more is read of it."""
    lines = reply.aiter_lines()
    try:
        yield Talk(reply, lines)
    finally:
        # httpx is a tower of generators that only an end or an exception from below takes down.
        with trio.CancelScope() as scope, contextlib.suppress(httpx.HTTPError):
            scope.cancel()
            async for _ in lines:
                pass


def said_in(event: Any) -> str:
    """What an event of a streamed chat adds to the reply."""
    if not isinstance(event, dict) or not event.get("choices"):
        return ""
    return event["choices"][0].get("delta", {}).get("content") or ""
