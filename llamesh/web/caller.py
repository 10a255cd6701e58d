"""Who sent a request, as far as the node knows."""

from __future__ import annotations

import re
from typing import NamedTuple

from llamesh.core.limits import Meter
from llamesh.telemetry.key_figures import KeyFigures


class Caller(NamedTuple):
    """A key of the configuration. name: as it is called there; "" without auth, and of a peer, whose client's
    key was checked where the client is. models: matches `model:profile` in lower case where the key may use
    it, None for all; meter: None without limits; figures: None for nobody in particular.
    """

    name: str = ""
    models: re.Pattern[str] | None = None
    meter: Meter | None = None
    figures: KeyFigures | None = None


#: Who needs no key.
ANYBODY = Caller()
