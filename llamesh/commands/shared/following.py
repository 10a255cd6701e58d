"""The state of the mesh, kept up to date by a thread that reads the node's stream of it."""

from __future__ import annotations

import json
import threading
from types import TracebackType
from typing import Any, Self

from llamesh.commands.shared.client import Answer, Client, events_in
from llamesh.commands.shared.failed import Failed

State = dict[str, Any]

_STATE = "/api/v1/state"

# Between two tries to reach a node that went away.
_AGAIN_SECONDS = 1.0


class Following:
    """`state` is the newest; `problem` says what is wrong with the connection, "" when nothing is."""

    def __init__(self, client: Client) -> None:
        """Reads the state once. Raises Failed."""
        self._client = client
        self.state: State = client.get(_STATE)
        self.problem = ""
        self._changed = threading.Event()
        self._ended = threading.Event()
        # A daemon: it may be in the middle of a read when the command ends.
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()

    def wait(self, seconds: float) -> bool:
        """Until something changed, or so long; whether it did."""
        changed = self._changed.wait(seconds)
        self._changed.clear()
        return changed

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                with self._client.lines("GET", f"{_STATE}/stream") as answer:
                    self._read(answer)
                self._say("the node closed the connection")
            except Failed as error:
                self._say(error.message)
            self._ended.wait(_AGAIN_SECONDS)

    def _read(self, answer: Answer) -> None:
        for name, data, _ in events_in(iter(answer)):
            if self._ended.is_set():
                return
            if name not in ("snapshot", "change"):
                continue
            try:
                news = json.loads(data)
            except (ValueError, RecursionError):
                continue  # the next snapshot has it
            self.state = news if name == "snapshot" else {**self.state, **news}
            self._say("")

    def _say(self, problem: str) -> None:
        self.problem = problem
        self._changed.set()
