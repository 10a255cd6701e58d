"""The slots of one instance, counted on our side: which are leased, which were abandoned.

llama-server notices at once that a streaming client left, but runs any other request to its end. A
slot that was abandoned like that stays busy here until `/slots` says that nobody works on it. The
reply names tasks, not callers, so what is known is narrowed down from look to look:

- An abandoned request was at work at every look since it was abandoned, or it is done. A task that
  wasn't there at one of them is someone else's.
- A lease that was old at the first of these looks and still runs explains one of the tasks that
  are left. What no lease explains may be an abandoned request, and keeps its slot.

So a slot is given away early only when a caller reads an answer that llama-server has finished, and
the price is that one request waits a while inside llama-server.
"""

from __future__ import annotations

# Slot number and task number, -1 where the engine doesn't say which task.
Task = tuple[int, int]


class Slots:
    """Leases by number, and a count of abandoned slots."""

    __slots__ = ("_explained", "_given", "_tasks", "abandoned", "abandonments", "leased")

    def __init__(self) -> None:
        self.leased: set[int] = set()
        self.abandoned = 0
        self.abandonments = 0  # ever; tells whether one came between two moments
        self._given = 0
        # At work at every look since the last abandonment; None before the first of them.
        self._tasks: set[Task] | None = None
        self._explained: set[int] = set()

    @property
    def busy(self) -> int:
        """Slots that can't be given away."""
        return len(self.leased) + self.abandoned

    def occupy(self) -> int:
        """Lease one more; the number of the lease."""
        self._given += 1
        self.leased.add(self._given)
        return self._given

    def vacate(self, lease: int) -> None:
        """End a lease whose request is over."""
        self.leased.remove(lease)

    def abandon(self, lease: int) -> None:
        """End a lease whose request llama-server may still be working on."""
        self.leased.remove(lease)
        self.abandoned += 1
        self.abandonments += 1
        self._tasks = None

    def release_abandoned(self) -> None:
        """Take all abandoned slots for free: there is no way to know better, or no engine any more."""
        self.abandoned = 0

    def look(self, tasks: set[Task], old: frozenset[int]) -> bool:
        """Take in what is at work; whether a slot got free by it.

        `old`: the leases of some time before the question, long enough for their requests to have
        reached llama-server. Nothing may have been abandoned while the question was on its way.
        """
        if self._tasks is None:
            self._tasks, self._explained = set(tasks), set(old)
        else:
            self._tasks &= tasks
        self._explained &= self.leased
        before = self.abandoned
        self.abandoned = min(before, max(0, len(self._tasks) - len(self._explained)))
        return self.abandoned < before


def tasks_at_work(reply: object) -> set[Task] | None:
    """The tasks in a reply to `GET /slots`, None when it is no such reply."""
    if not isinstance(reply, list):
        return None
    tasks: set[Task] = set()
    for number, slot in enumerate(reply):
        if not isinstance(slot, dict):
            return None
        if slot.get("is_processing"):
            task = slot.get("id_task")
            tasks.add((number, task if isinstance(task, int) else -1))
    return tasks
