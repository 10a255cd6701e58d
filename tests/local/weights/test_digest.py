"""SHA-256 that is put down and taken up again."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.local.weights import digest


def test_this_python_can_do_it() -> None:
    assert digest.RESUMABLE


@given(st.lists(st.integers(0, 500), max_size=6), st.data())
def test_taken_up_anywhere_it_is_the_same(lengths: list[int], data: st.DataObject) -> None:
    content = bytearray(data.draw(st.binary(min_size=sum(lengths), max_size=sum(lengths))))
    found, at = digest.sha256(), 0
    for length in lengths:
        found.update(memoryview(content)[at : at + length])
        at += length
        state = found.save()
        assert (state is None) == bool(at % 64)
        if state is not None:
            found = digest.sha256(state)
            assert found.size == at
        assert found.hexdigest() == hashlib.sha256(content[:at]).hexdigest()


def test_beyond_four_gigabits() -> None:
    """The length is counted in bits, in two words."""
    piece = bytearray(1 << 20)
    one, other = digest.sha256(), hashlib.sha256()
    for _ in range(520):
        one.update(memoryview(piece))
        other.update(piece)
    one = digest.sha256(one.save())
    one.update(memoryview(piece))
    other.update(piece)
    assert one.hexdigest() == other.hexdigest()


@pytest.mark.parametrize("state", ["", "zz", "00" * 10, "00" * 39 + "01", "ff" * 40])
def test_what_is_no_state_is_refused(state: str) -> None:
    with pytest.raises(ValueError, match=r".*"):
        digest.sha256(state)


def test_without_openssl_s_functions_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "RESUMABLE", False)
    plain = digest.sha256()
    plain.update(memoryview(bytearray(128)))
    assert plain.save() is None
    assert plain.hexdigest() == hashlib.sha256(bytes(128)).hexdigest()
    with pytest.raises(ValueError, match="can't be taken up again"):
        digest.sha256("00" * 40)


def test_git_s_own_hash() -> None:
    found = digest.git_sha1(5)
    found.update(memoryview(bytearray(b"hello")))
    assert found.hexdigest() == "b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0"  # git hash-object
