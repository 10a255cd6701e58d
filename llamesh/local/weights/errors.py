"""What can go wrong when weights are to be had, in words for the one who asked for the model."""

from __future__ import annotations

from typing import ClassVar


class WeightsError(Exception):
    """The weights can't be had. The message says of what, why, and what to do.

    `transient`: another try, a little later, may well work.
    """

    transient: ClassVar[bool] = False


class NotAllowed(WeightsError):
    """The hub wants a token, another one, or that its conditions are accepted on a page."""


class NotFound(WeightsError):
    """There is no such repository, revision or file."""


class WrongContent(WeightsError):
    """What came isn't what was promised: another size, another hash. Nothing of it is kept."""


class Hostile(WeightsError):
    """A server asked for something that isn't done: a name that leads out of the cache, plain http."""


class DiskFull(WeightsError):
    """There is no room for it, on the disk or in `disk_budget_gb`."""


class Offline(WeightsError):
    """It isn't on this machine, and the hub may not be asked (HF_HUB_OFFLINE)."""


class Unusable(WeightsError):
    """The cache can't be written, or its disk doesn't answer."""


class TooSlow(WeightsError):
    """`download_timeout_seconds` ran out. What has come is kept; the next try goes on from there."""

    transient = True


class Unreachable(WeightsError):
    """The server doesn't answer, breaks off, or has trouble of its own. `retry_after`: seconds, if it said
    so.
    """

    transient = True

    def __init__(self, message: str, *, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WholeOnly(Unreachable):
    """The server sends a file as a whole or not at all: one connection, and from the beginning each time."""


class Stopped(Exception):
    """The download was told to stop; what has come is kept."""
