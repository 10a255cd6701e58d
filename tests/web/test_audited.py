"""Acts as the audit file tells them, whoever asked."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import msgspec
import pytest
import trio

from llamesh.errors import Forbidden, SpawnFailed
from llamesh.web.audited import Order, audited, peers_order


class Told:
    """Keeps what an audit file would be told."""

    def __init__(self) -> None:
        self.acts: list[tuple[Any, ...]] = []

    def act(self, *told: Any, **more: Any) -> None:
        self.acts.append((*told, more))


@pytest.mark.parametrize(
    ("path", "body", "order"),
    [
        ("/mesh/prewarm", {"model": "m"}, Order("/admin/prewarm", {"model": "m"})),
        ("/mesh/cancel", {"request_id": "r"}, Order("/admin/cancel", {"request_id": "r"})),
        (
            "/mesh/admin",
            {"act": "unload", "node": "b", "document": {"model": "m"}, "asker": "c"},
            Order("/admin/unload", {"model": "m", "node": "b"}, "c"),
        ),
        ("/mesh/admin", {"act": "builds", "node": "b"}, Order("/admin/builds", {"node": "b"}, "", True)),
        ("/mesh/admin", {"act": 7, "document": []}, Order("/admin/", {"node": ""})),
        ("/mesh/admin", [], Order("/admin/", {"node": ""})),
        ("/mesh/state", {}, None),
        ("/mesh/gossip", {}, None),
    ],
)
def test_what_peers_ask_for(path: str, body: Any, order: Order | None) -> None:
    assert peers_order(path, msgspec.json.encode(body)) == order


def test_what_is_no_order() -> None:
    assert peers_order("/mesh/prewarm", b"\xff{") == Order("/admin/prewarm", {})
    assert peers_order("/mesh/prewarm", b"[" * 100_000) == Order("/admin/prewarm", {})


def test_an_error_of_the_wire() -> None:
    told: Any = Told()
    for status, body, outcome in (
        (200, b"{}", "ok"),
        (404, Forbidden("x").body(), "forbidden"),
        (503, b"<html>", "error"),
        (503, b"[]", "error"),
    ):
        with audited(told, "/admin/unload", "", origin="b") as deed:
            deed.answered(status, body)
        key, _, path, _, _, (said, kind, reason), more = told.acts.pop()
        assert (key, path, said, kind, reason) == ("", "/admin/unload", status, outcome, "")
        assert more["origin"] == "b"


async def test_whatever_becomes_of_it() -> None:
    told: Any = Told()
    for error, outcome in (
        (SpawnFailed("no memory"), (503, "spawn_failures_exhausted", "no memory")),
        (RuntimeError("a defect"), (500, "internal_error", "")),
    ):
        with suppress(type(error)), audited(told, "/admin/prewarm", "::1") as deed:
            deed.document = {"model": ["no name"], "node": "b"}
            raise error
        assert told.acts.pop() == (
            "", "::1", "/admin/prewarm", "b", "", outcome, {"request_id": "", "origin": "", "about": ""},
        )  # fmt: skip
    with trio.CancelScope() as scope, audited(told, "/admin/prewarm", ""):
        scope.cancel()
        await trio.sleep_forever()
    assert told.acts.pop()[5] == (0, "cancelled", "")


def test_looking_is_worth_a_line_only_when_it_is_refused() -> None:
    told: Any = Told()
    with audited(told, "/admin/builds", "") as deed:
        deed.quiet, deed.status = True, 200
    assert told.acts == []
    with suppress(Forbidden), audited(told, "/admin/builds", "") as deed:
        deed.quiet = True
        raise Forbidden("not you")
    assert len(told.acts) == 1


def test_off() -> None:
    with audited(None, "/admin/drain", "") as deed:
        deed.status = 200
