"""What needs attention about other nodes, and about strangers."""

from __future__ import annotations

import pytest

import llamesh
from llamesh.telemetry.recorder import Happening
from llamesh.web.attention import _of_event
from llamesh.web.mesh_state import _findings


@pytest.mark.parametrize(
    ("entry", "what", "words"),
    [
        ({"version": "99.0"}, "version_skew", f"runs version 99.0, this node {llamesh.__version__}"),
        ({"status": "suspect"}, "peer_silent", "doesn't answer"),
        ({"status": "alive", "link": {"direct": False, "problem": "refused"}}, "no_link", "(refused)"),
        ({"status": "alive", "link": {"direct": True, "breaker": "open"}}, "breaker_open", "broke several"),
    ],
)
def test_what_is_wrong_with_a_node(entry: dict[str, object], what: str, words: str) -> None:
    [found] = _findings("b", {"version": llamesh.__version__, **entry})
    assert (found.level, found.what, found.subject) == ("warning", what, "b")
    assert words in found.text
    assert found.fix


def test_all_is_well() -> None:
    entry = {"version": llamesh.__version__, "status": "alive", "link": {"direct": True, "breaker": "closed"}}
    assert list(_findings("b", entry)) == []


@pytest.mark.parametrize("event", ["a node wasn't let in", "a handshake failed"])
def test_a_stranger_is_told_with_what_to_do(event: str) -> None:
    found = _of_event(Happening(1, 0.0, "warning", event, "10.0.0.9: the cluster tokens differ"))
    assert found is not None
    assert (found.what, found.text) == ("unknown_key", "10.0.0.9: the cluster tokens differ")
    assert "llamesh invite" in found.fix
