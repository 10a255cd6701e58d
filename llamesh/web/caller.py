"""Who sent a request, once the key was looked at."""

from __future__ import annotations

from typing import NamedTuple


class Caller(NamedTuple):
    """`name`: of the client's key, "" without one."""

    name: str = ""
