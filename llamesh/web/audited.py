"""Acts of administration, and what the audit file says of them: done, refused or broken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import trio

from llamesh.errors import InternalError, LlameshError
from llamesh.telemetry.audit import Audit
from llamesh.web.caller import Caller


@dataclass(slots=True)
class Deed:
    """An act while it goes. document: what was asked for; status: of the answer; quiet: only a refusal is
    worth a line.
    """

    caller: Caller = field(default_factory=Caller)
    document: Mapping[str, Any] = field(default_factory=dict)
    status: int = 0
    quiet: bool = False


@contextmanager
def audited(
    audit: Audit | None, path: str, address: str, *, request_id: str = "", origin: str = ""
) -> Iterator[Deed]:
    """Around an act, from the check of its caller on. `origin`: the node that asked for it, "" = a client."""
    deed, outcome, reason = Deed(), "ok", ""
    try:
        yield deed
    except LlameshError as error:
        deed.status, outcome, reason = error.status, error.type, error.message
        raise
    except trio.Cancelled:
        deed.status, outcome = 0, "cancelled"
        raise
    except BaseException:
        deed.status, outcome = InternalError.status, InternalError.type
        raise
    finally:
        if audit is not None and not (deed.quiet and outcome == "ok"):
            if outcome == "ok" and deed.status >= 400:
                outcome = "error"
            audit.act(
                deed.caller.name,
                address,
                path,
                _named(deed.document, "node"),
                _named(deed.document, "model"),
                (deed.status, outcome, reason),
                request_id=request_id,
                origin=origin,
                about=_named(deed.document, "request_id"),
            )


def _named(document: Mapping[str, Any], member: str) -> str:
    value = document.get(member)
    return value if isinstance(value, str) else ""
