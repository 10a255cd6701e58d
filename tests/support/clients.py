"""Clients that don't pause, for tests of what must not interrupt them."""

from __future__ import annotations

import httpx

from tests.end_to_end.cookbooks import CHAT, chat
from tests.support.node import PATIENCE_SECONDS, wait_until


class Clients:
    """Clients that ask without a pause, one on a new connection each time, one on a kept one."""

    def __init__(self, url: str, model: str = "m") -> None:
        self.url = url
        self.model = model
        self.answered = 0
        self.failed: list[str] = []
        self.stopped = False
        self._there = 0

    async def ask(self, *, kept: bool) -> None:
        """Until `stopped`, or a failure."""
        self._there += 1
        try:
            await self._ask(kept=kept)
        finally:
            self._there -= 1

    async def _ask(self, *, kept: bool) -> None:
        headers = {} if kept else {"connection": "close"}
        async with httpx.AsyncClient(
            base_url=self.url, headers=headers, trust_env=False, timeout=PATIENCE_SECONDS
        ) as client:
            while not self.stopped:
                try:
                    reply = await client.post(
                        CHAT, json=chat(self.model, tokens=3, stream=self.answered % 2 == 0)
                    )
                except httpx.HTTPError as error:
                    self.failed.append(f"kept={kept} after {self.answered}: {error!r}")
                    return
                if reply.status_code != 200:
                    self.failed.append(f"kept={kept} after {self.answered}: {reply.status_code} {reply.text}")
                    return
                self.answered += 1

    async def wait_gone(self) -> None:
        """Wait until all have their last answer."""
        await wait_until(lambda: not self._there, "a client gets no answer")

    async def wait_answered(self, more: int) -> None:
        """Wait for so many more answers."""
        wanted = self.answered + more
        await wait_until(
            lambda: self.answered >= wanted or bool(self.failed), lambda: f"{self.answered} of {wanted}"
        )
