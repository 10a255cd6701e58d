"""One answer of a model, as it comes: `POST /v1/chat/completions` with `stream: true`."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

from llamesh.commands.shared.client import Client, events_in
from llamesh.commands.shared.failed import Failed
from llamesh.commands.shared.words import count, one_line

Message = dict[str, str]

# A node tells at least every ten seconds what a request waits for, unless that is switched off.
_SILENCE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Piece:
    """kind: `text`, `thought` (reasoning), or `waiting` (what for)."""

    kind: str
    text: str


@dataclass(slots=True)
class Figures:
    """What is known of an answer. node: where it came from, "" while that can't be told; speed: tokens a
    second; first_seconds: until the first piece; tokens: of the answer.
    """

    node: str = ""
    first_seconds: float | None = None
    tokens: int = 0
    cached: int = 0
    speed: float | None = None
    ended: bool = False
    _began: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        words = [count(self.tokens, "token")]
        if self.speed is not None:
            words.append(f"{self.speed:.1f} tokens/s")
        if self.first_seconds is not None:
            words.append(f"the first after {self.first_seconds:.1f} s")
        if self.node:
            words.append(self.node)
        return ", ".join(words)

    def first(self) -> None:
        """The first piece is here."""
        if self.first_seconds is None:
            self.first_seconds = time.monotonic() - self._began

    def read(self, event: dict[str, Any]) -> None:
        """Take over what an event tells of the whole."""
        usage, timings = event.get("usage"), event.get("timings")
        if isinstance(usage, dict):
            self.tokens = int(usage.get("completion_tokens") or self.tokens)
        if isinstance(timings, dict) and isinstance(timings.get("predicted_per_second"), int | float):
            self.speed = float(timings["predicted_per_second"])

    def close(self) -> None:
        """The answer is over: what wasn't told is worked out."""
        if self.speed is None and self.first_seconds is not None and self.tokens > 1:
            seconds = time.monotonic() - self._began - self.first_seconds
            self.speed = (self.tokens - 1) / seconds if seconds > 0 else None


def answer(
    client: Client,
    model: str,
    messages: list[Message],
    options: dict[str, Any],
    headers: dict[str, str],
    figures: Figures,
) -> Generator[Piece]:
    """The pieces. Closing the generator ends the request. Raises Failed."""
    body = {
        "model": model,
        "messages": messages,
        "stream": True,
        "stream_options": {"include_usage": True},
        **options,
    }
    with client.lines(
        "POST", "/v1/chat/completions", body, seconds=_SILENCE_SECONDS, headers=headers
    ) as lines:
        figures.node = one_line(lines.headers.get("x-llamesh-node") or "")
        for name, data, _ in events_in(iter(lines)):
            if name == ":":
                # The head went out before anybody knew who would answer.
                figures.node = ""
                yield Piece("waiting", one_line(data))
            elif data == "[DONE]":
                figures.ended = True
            elif not name:
                yield from _pieces(_document(data), figures)
    figures.close()
    if not figures.ended:
        raise Failed("the answer was cut: the node or its llama-server broke off")


def _document(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError):
        event = None
    if not isinstance(event, dict):
        raise Failed("the answer isn't what a model sends")
    return event


def _pieces(event: dict[str, Any], figures: Figures) -> Iterator[Piece]:
    error = event.get("error")
    if isinstance(error, dict):
        raise Failed(one_line(str(error.get("message") or error)))
    figures.read(event)
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        for kind, member in (("thought", "reasoning_content"), ("text", "content")):
            text = delta.get(member)
            if isinstance(text, str) and text:
                figures.first()
                figures.tokens += 1  # until the usage says it better
                yield Piece(kind, text)
