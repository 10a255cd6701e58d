"""What happened to the members, for whoever keeps something per member.

A member is there from Joined to Died or Left. After Died may come Recovered (the same life was still there)
or Joined (a new one); after Left only Joined.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Joined:
    """A node that wasn't there before, or was dead or left and lives a new life."""

    id: str


@dataclass(frozen=True, slots=True)
class Updated:
    """Some of its state changed; `keys` are those that were written or deleted, sorted."""

    id: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Suspected:
    """It didn't answer a probe of ours."""

    id: str


@dataclass(frozen=True, slots=True)
class Recovered:
    """It isn't suspect or dead any more; its life went on all the time."""

    id: str


@dataclass(frozen=True, slots=True)
class Died:
    """It is considered dead; its state is gone from `members()`."""

    id: str


@dataclass(frozen=True, slots=True)
class Left:
    """It said that it leaves."""

    id: str


@dataclass(frozen=True, slots=True)
class Restarted:
    """It was never missed, but this is a new life of it: nothing of the earlier one is true any more."""

    id: str


@dataclass(frozen=True, slots=True)
class Contested:
    """Somebody speaks of a later life under our own id, `epoch`; we took a later one still.

    Once after a start it means that the clock had jumped back. Again and again it means that another node
    uses this node's id.
    """

    id: str
    epoch: int


Event = Joined | Updated | Suspected | Recovered | Died | Left | Restarted | Contested
