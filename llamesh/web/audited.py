"""Acts of administration, and what the audit file says of them: done, refused or broken."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import trio

from llamesh.errors import InternalError, LlameshError
from llamesh.telemetry.audit import Audit
from llamesh.web.caller import Caller

_REFUSED = (401, 403)


class _Error(msgspec.Struct, frozen=True):
    type: str = ""


class _Answer(msgspec.Struct, frozen=True):
    error: _Error = _Error()


@dataclass(slots=True)
class Deed:
    """An act while it goes. document: what was asked for; status: of the answer, error: its type, where none
    was raised; quiet: only a refusal is worth a line.
    """

    caller: Caller = field(default_factory=Caller)
    document: Mapping[str, Any] = field(default_factory=dict)
    status: int = 0
    error: str = ""
    quiet: bool = False

    def answered(self, status: int, body: bytes) -> None:
        """It was answered in the wire's form, errors included."""
        self.status = status
        if status >= 400:
            with suppress(msgspec.MsgspecError, UnicodeDecodeError):
                self.error = msgspec.json.decode(body, type=_Answer).error.type


class Order(NamedTuple):
    """An act that another node asks for. path: of the same act by HTTP; asker: the node whose operator wants
    it, "" = the one that asks; only_looks: it changes nothing.
    """

    path: str
    document: Mapping[str, Any]
    asker: str = ""
    only_looks: bool = False


# Paths of acts between nodes -> paths of the same acts for clients.
_BETWEEN_NODES = {
    "/mesh/prewarm": "/admin/prewarm",
    "/mesh/cancel": "/admin/cancel",
    "/mesh/admin": "/admin/",
}


def peers_order(path: str, body: bytes) -> Order | None:
    """What a peer asks for, as the audit file says it; None where it is no act. Whoever carries it out says
    what is wrong with it.
    """
    shown = _BETWEEN_NODES.get(path)
    if shown is None:
        return None
    try:
        document = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        document = {}
    if path != "/mesh/admin":
        return Order(shown, document)
    inner = document.get("document")
    told = inner if isinstance(inner, dict) else {}
    act = _named(document, "act")
    named = {**told, "node": _named(document, "node")}
    return Order(shown + act, named, _named(document, "asker"), act == "builds")


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
        if audit is not None and not (deed.quiet and deed.status not in _REFUSED):
            if outcome == "ok" and deed.status >= 400:
                outcome = deed.error or "error"
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
