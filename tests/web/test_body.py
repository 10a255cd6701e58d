"""Bodies in memory and on disk, within one budget."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.errors import InternalError
from llamesh.web.body import SPOOL_ABOVE, Body, Budget


def fill(body: Body, size: int, piece: int = 65_536) -> bytes:
    data = (bytes(range(256)) * (size // 256 + 1))[:size]
    for at in range(0, size, piece):
        body.add(data[at : at + piece])
    return data


@pytest.mark.parametrize("size", [0, 1, SPOOL_ABOVE, SPOOL_ABOVE + 1, 3 * SPOOL_ABOVE])
def test_what_was_added_can_be_read_again_and_again(size: int) -> None:
    budget = Budget()
    with Body(budget) as body:
        data = fill(body, size)
        assert body.length == size
        for _ in range(2):
            assert bytes(body.view()) == data
            assert b"".join(body.parts()) == data
        assert budget.used == (size if size <= SPOOL_ABOVE else 0)
    assert budget.used == 0


def test_past_the_budget_small_bodies_go_to_disk() -> None:
    budget = Budget(1000)
    with Body(budget) as one, Body(budget) as two, Body(budget) as three:
        fill(one, 600)
        data = fill(two, 600, 100)
        assert budget.used == 600
        fill(three, 400)
        assert budget.used == 1000
        assert bytes(two.view()) == data
    assert budget.used == 0


def test_closing_twice_and_with_a_view_still_held() -> None:
    budget = Budget()
    body = Body(budget)
    data = fill(body, 2 * SPOOL_ABOVE)
    view = body.view()
    body.close()
    body.close()
    assert bytes(view[:10]) == data[:10]
    assert budget.used == 0


def test_a_full_disk_is_an_error_of_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_room)
    budget = Budget(10)
    with pytest.raises(InternalError), Body(budget) as body:
        body.add(b"x" * 20)
    assert budget.used == 0


def test_files_have_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with Body(Budget(0)) as body:
        body.add(b"private")
        assert list(tmp_path.iterdir()) == []


@given(st.lists(st.binary(max_size=50), max_size=20), st.integers(0, 200))
def test_any_pieces_under_any_budget(pieces: list[bytes], limit: int) -> None:
    budget = Budget(limit)
    with Body(budget) as body:
        for piece in pieces:
            body.add(piece)
        assert budget.used <= limit
        assert bytes(body.view()) == b"".join(pieces)
    assert budget.used == 0
