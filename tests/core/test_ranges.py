"""Which bytes are there, against a set of numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.ranges import Ranges, pieces

SIZE = 60
SPANS = st.lists(st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)), max_size=12)


@given(SPANS)
def test_ranges_are_sets_of_numbers(spans: list[tuple[int, int]]) -> None:
    ranges, model = Ranges(spans), {n for start, end in spans for n in range(start, end)}
    assert {n for start, end in ranges for n in range(start, end)} == model
    assert ranges.total == len(model)
    # Disjoint, ascending, and nothing that touches is apart.
    flat = [edge for span in ranges for edge in span]
    assert flat == sorted(set(flat))
    missing = {n for start, end in ranges.gaps(SIZE) for n in range(start, end)}
    assert missing == set(range(SIZE)) - model
    for offset in range(SIZE):
        end = ranges.covered_from(offset)
        assert all(n in model for n in range(offset, end))
        assert end not in model


@given(SPANS, st.integers(1, 20))
def test_pieces_are_the_gaps_in_order(spans: list[tuple[int, int]], most: int) -> None:
    gaps = Ranges(spans).gaps(SIZE)
    cut = pieces(gaps, most)
    assert all(0 < end - start <= most for start, end in cut)
    assert [n for start, end in cut for n in range(start, end)] == [n for s, e in gaps for n in range(s, e)]
