"""The two values that a reload replaces. Parts keep this, and read from it each time, so that what
they do is always what the files say now."""

from __future__ import annotations

from dataclasses import dataclass

from llamesh.config.cookbook import Cookbook
from llamesh.config.settings import Settings


@dataclass(slots=True)
class Current:
    """Settings and cookbook in force."""

    settings: Settings
    cookbook: Cookbook
