"""The hash over everything, and how a difference is found."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.membership.digest import BUCKET_HEX, MAX_BITS, Index, bits_for
from llamesh.core.membership.records import Life, Rank, Record


def record(number: int, version: int = 1, rank: Rank = Rank.ALIVE, incarnation: int = 0) -> Record:
    return Record(f"n{number}", Life(1, incarnation, rank), version)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3), st.sampled_from(list(Rank)))), st.randoms())
def test_the_root_depends_on_what_is_there_and_not_on_how_it_came(
    changes: list[tuple[int, int, Rank]], chance: random.Random
) -> None:
    index, there = Index(), {}
    for number, version, rank in changes:
        new = record(number, version, rank)
        index.change(there.get(number), new)
        there[number] = new
    fresh = Index()
    rest = list(there.values())
    chance.shuffle(rest)
    for one in rest:
        fresh.change(None, one)
    assert (fresh.root, fresh.count) == (index.root, index.count)
    assert all(fresh.buckets(bits) == index.buckets(bits) for bits in range(MAX_BITS + 1))
    for one in rest:
        index.change(one, None)
    assert (index.root, index.count) == (0, 0)


@pytest.mark.parametrize("bits", range(MAX_BITS + 1))
def test_a_difference_is_in_the_bucket_of_whoever_differs(bits: int) -> None:
    one, other = Index(), Index()
    for number in range(300):
        one.change(None, record(number))
        other.change(None, record(number))
    assert one.differing(bits, other.buckets(bits)) == []
    other.change(record(17), record(17, version=2))
    other.change(record(203), record(203, incarnation=1))
    differing = one.differing(bits, other.buckets(bits))
    found = {node_id for bucket in differing for node_id in one.ids(bits, bucket)}
    assert {"n17", "n203"} <= found
    assert len(differing) <= 2
    everybody = [node_id for bucket in range(1 << bits) for node_id in one.ids(bits, bucket)]
    assert sorted(everybody) == sorted(f"n{number}" for number in range(300))


def test_the_gone_and_the_unheard_are_in_no_hash_and_in_their_bucket() -> None:
    index = Index()
    for number, one in enumerate([record(0, 1, Rank.DEAD), record(1, 1, Rank.LEFT), record(2, 0)]):
        index.change(None, one)
        assert (index.root, index.count) == (0, 0), number
    assert sorted(index.ids(0, 0)) == ["n0", "n1", "n2"]


@pytest.mark.parametrize(
    ("count", "bits"),
    [(0, 0), (1, 0), (16, 0), (17, 1), (32, 1), (33, 2), (1000, 6), (4096, 8), (10**6, 8)],
)
def test_buckets_hold_about_sixteen(count: int, bits: int) -> None:
    assert bits_for(count) == bits
    assert len(Index().buckets(bits)) == BUCKET_HEX << bits
