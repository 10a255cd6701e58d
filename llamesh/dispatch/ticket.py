"""A place in a profile's queue, and the queue itself."""

from __future__ import annotations

import math
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING

import trio

from llamesh.config.cookbook import Profile
from llamesh.dispatch.lease import AnyLease, Ask
from llamesh.errors import LlameshError, QueueTimeout

if TYPE_CHECKING:
    from llamesh.dispatch.dispatch import Dispatch


class Ticket:
    """A place in a queue. Leaving the `with` block frees it, or the lease that nobody took over."""

    def __init__(self, ask: Ask, line: Line, dispatch: Dispatch) -> None:
        self.ask = ask
        self.since = trio.current_time()
        self.number = next(dispatch._numbers)  # the order of coming, over all queues
        self._line = line
        self._dispatch = dispatch
        self._turn = trio.Event()
        self._lease: AnyLease | None = None
        self._error: LlameshError | None = None

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lease is not None:
            lease, self._lease = self._lease, None
            lease.release()
        self._dispatch._leave(self)

    @property
    def waiting_for(self) -> str:
        """What this waits for, for people: "loading tiny:default for 3 s"."""
        return self._dispatch.patience.describe(self)

    async def wait(self, at_most: float = math.inf) -> AnyLease | None:
        """The lease, which is the caller's from now on; None when `at_most` seconds passed first.

        Raises QueueTimeout when the profile's `max_wait_in_queue_ms` is used up, and whatever the
        queue was refused for; the place is given up then. Time in which the awaited model makes
        progress isn't counted.
        """
        until = trio.current_time() + at_most
        while not self._turn.is_set():
            now = trio.current_time()
            if now >= until:
                return None
            try:
                left = self._dispatch.patience.charge(self, now)
            except QueueTimeout:
                self._dispatch._leave(self)
                raise
            with trio.move_on_after(min(left, until - now)):
                await self._turn.wait()
        if self._error is not None:
            raise self._error
        lease, self._lease = self._lease, None
        assert lease is not None  # noqa: S101
        return lease

    def _grant(self, lease: AnyLease) -> None:
        self._lease = lease
        self._turn.set()

    def _refuse(self, error: LlameshError) -> None:
        self._error = error
        self._turn.set()


class Line:
    """One profile's queue."""

    __slots__ = ("profile", "reason", "spent", "tickets")

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.tickets: deque[Ticket] = deque()
        self.reason = ""
        self.spent: dict[Ticket, tuple[float, float]] = {}  # ticket -> (seconds counted, last look)
