"""Prompts that begin alike share the marks up to where they differ, and no more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.prefixes import MARKS, NOTHING, SHORTEST, Prefix, prefix_of


def shared(one: Prefix, other: Prefix) -> int:
    """How many marks from the first on are the same; those behind have to differ."""
    pairs = list(zip(one.marks, other.marks, strict=False))
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))
    assert all(a != b for a, b in pairs[same:])
    return same


@given(st.integers(0, 300_000), st.integers(0, 20_000), st.integers(0, 20_000), st.data())
def test_what_is_shared_is_what_is_alike(common: int, more: int, other: int, data: st.DataObject) -> None:
    start = (b"0123456789abcdef" * 20_000)[:common]
    one = prefix_of("m", (), start + b"x" * more)
    two = prefix_of("m", (), memoryview(start + b"y" * other))
    assert len(one.marks) == sum(mark <= common + more for mark in MARKS) if one else one.length < SHORTEST
    if one and two:
        assert shared(one, two) == sum(mark <= common for mark in MARKS)


def test_marks_are_in_order_and_bounded() -> None:
    assert list(MARKS) == sorted(set(MARKS))
    assert len(MARKS) < 100
    assert len(prefix_of("m", (), b"x" * 1_000_000).marks) == len(MARKS)


def test_what_comes_before_the_prompt_counts_wholly() -> None:
    prompt = b"p" * 2048
    plain = prefix_of("m", (), prompt)
    assert shared(plain, prefix_of("m", (b"tools",), prompt)) == 0
    assert shared(plain, prefix_of("n", (), prompt)) == 0
    assert prefix_of("m", (b"a", b"b"), prompt) == prefix_of("m", (memoryview(b"a"), b"b"), prompt)


def test_what_is_short_or_nameless_is_nothing() -> None:
    assert not prefix_of("m", (), b"x" * (SHORTEST - 1))
    assert not NOTHING
    named = prefix_of("m", (), b"hi", b"session-1")
    assert named
    assert named.marks == ()
    assert named.session == prefix_of("m", (), b"more of it", b"session-1").session
    assert named.session != prefix_of("n", (), b"hi", b"session-1").session
