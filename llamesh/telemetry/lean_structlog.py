"""What we use of structlog, imported without rich.

Where rich is installed, structlog imports it for its own console output, which is not ours: that
is 5 MB and 40 ms at each start for nothing. While structlog is being imported, rich therefore
looks as if it weren't installed, which structlog is made for. Import structlog only through here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast


@contextmanager
def _as_if_missing(name: str) -> Iterator[None]:
    """Makes `import name` raise ImportError in the block, unless the program has it already."""
    if name in sys.modules:
        yield
        return
    # None there makes the import fail; so says the reference of the import system.
    cast(dict[str, object], sys.modules)[name] = None
    try:
        yield
    finally:
        del sys.modules[name]


with _as_if_missing("rich"):
    from structlog import BoundLoggerBase, DropEvent

__all__ = ["BoundLoggerBase", "DropEvent"]
