"""An operator ends a request: the same in every lane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.web.raw import Cut
from tests.web.served import LANES, Asking, Served

CANCEL = "/admin/cancel"


def requests(node: Served) -> list[dict[str, Any]]:
    """Those of this module's model that are under way."""
    return [one for one in node.page("/api/v1/state")["requests"] if one["model"] == "large:default"]


def under_way(node: Served) -> str:
    """The id of the one request, once an instance has it."""
    found = requests(node)
    return str(found[0]["id"]) if [one["phase"] for one in found] in (["prefill"], ["decode"]) else ""


@pytest.mark.parametrize("lane", LANES)
def test_before_the_answer_began_the_client_gets_the_error(node: Served, lane: str, tmp_path: Path) -> None:
    # Loaded before, since a stream that waits for a load has begun, with comments.
    assert node.ask("fast", {"model": "large", "messages": []}).status == 200
    fake = {"head_gate": str(tmp_path / "later")}
    with Asking(node, lane, {"model": "large", "messages": [], "fake": fake, "stream": True}) as asking:
        live = node.wait(lambda: under_way(node), "the request is under way")
        assert node.ask("fast", {"request_id": live}, CANCEL).status == 200
        reply = asking.answer()
    assert (reply.status, reply.error["type"]) == (499, "cancelled_by_operator")
    node.wait(lambda: not requests(node), "it is over")


@pytest.mark.parametrize("lane", LANES)
def test_in_the_middle_of_a_stream_the_client_sees_a_cut(node: Served, lane: str, tmp_path: Path) -> None:
    fake = {"gate": str(tmp_path / "later"), "gate_after": 2}
    with Asking(node, lane, {"model": "large", "messages": [], "fake": fake, "stream": True}) as asking:
        asking.until(b"data: ")
        live = node.wait(lambda: under_way(node), "the request is under way")
        assert node.ask("fast", {"request_id": live}, CANCEL).status == 200
        with pytest.raises((Cut, OSError)):
            asking.answer()
    node.wait(lambda: not requests(node), "it is over")
