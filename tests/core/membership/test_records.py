"""The join of two records: its laws, and that deltas in any order lead to it."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.membership import Options
from llamesh.core.membership.exchange import delta_of
from llamesh.core.membership.messages import Delta
from llamesh.core.membership.records import Entry, Life, Rank, Record, changed_keys, join, reborn, written
from llamesh.core.membership.table import Table

lives = st.builds(
    Life, st.integers(1, 2), st.integers(0, 2), st.sampled_from([Rank.ALIVE, Rank.DEAD, Rank.LEFT])
)
entries = st.builds(Entry, st.integers(1, 5), st.sampled_from([None, b"1", b"2"]))
records = st.builds(
    Record, st.just("x"), lives, st.integers(0, 5), st.dictionaries(st.sampled_from("abc"), entries)
)


@given(records)
def test_joining_with_itself_changes_nothing(one: Record) -> None:
    assert join(one, one) is one


@given(records, records)
def test_the_order_of_two_does_not_matter(one: Record, other: Record) -> None:
    assert join(one, other) == join(other, one)


@given(records, records, records)
def test_the_grouping_of_three_does_not_matter(one: Record, two: Record, three: Record) -> None:
    assert join(join(one, two), three) == join(one, join(two, three))


@given(records, records)
def test_a_join_says_no_less_than_either(one: Record, other: Record) -> None:
    both = join(one, other)
    assert join(both, one) == both
    assert join(both, other) == both
    assert both.life >= one.life
    assert (both == one) or (join(one, other) is not one)


@given(records, records)
def test_who_has_the_same_mark_tells_the_same(one: Record, other: Record) -> None:
    told = (one.life[:2], one.version) == (other.life[:2], other.version)
    assert (one.mark == other.mark) is told


def history(chance: random.Random, length: int) -> list[Record]:
    """An owner's record after each of its writes; sometimes in a new epoch."""
    record = Record("x", Life(1, 0, Rank.ALIVE), 1)
    past = [record]
    for number in range(length):
        if chance.random() < 0.1:
            record = reborn(record, record.life.epoch + 1)
        else:
            value = None if chance.random() < 0.2 else str(number).encode()
            record = written(record, chance.choice("abcd"), value)
        past.append(record)
    return past


def deltas(chance: random.Random, past: list[Record], count: int) -> list[Delta]:
    """What somebody who was at one point of that history would tell somebody at another, perhaps cut."""
    told = []
    for _ in range(count):
        there = chance.choice(past)
        after = chance.choice([0, 0, chance.randint(0, there.version)])
        delta, _, _ = delta_of(there, after, chance.choice([None, 160]))
        told.append(delta)
    return told


@given(st.randoms(use_true_random=False))
def test_any_order_of_any_deltas_ends_where_the_owner_is(chance: random.Random) -> None:
    past = history(chance, 20)
    owner = past[-1]
    table = Table(Record("me", Life(1, 0, Rank.ALIVE), 1), Options(), Counter())
    for delta in deltas(chance, past, 30):
        before = table.records.get("x")
        table.merge(delta)
        now = table.records.get("x")
        assert before is None or now is not None
        if now is not None:
            # Never beyond the owner, never back, and whatever is there was once the owner's word.
            assert (now.life.epoch, now.version) <= (owner.life.epoch, owner.version)
            assert before is None or (before.life.epoch, before.version) <= (now.life.epoch, now.version)
            words = {(one.life.epoch, key, entry) for one in past for key, entry in one.entries.items()}
            assert {(now.life.epoch, key, entry) for key, entry in now.entries.items()} <= words
    # Then the rest, in pieces as small as they get.
    for _ in range(100):
        record = table.records.get("x")
        known = 0 if record is None or record.life.epoch < owner.life.epoch else record.version
        delta, _, whole = delta_of(owner, known, 1)
        table.merge(delta)
        if whole:
            break
    assert table.records["x"] == owner


@given(st.randoms(use_true_random=False))
def test_two_who_heard_the_same_in_another_order_know_the_same(chance: random.Random) -> None:
    past = history(chance, 12)
    told = [delta_of(chance.choice(past), 0, None)[0] for _ in range(8)]
    tables = []
    for _ in range(2):
        table = Table(Record("me", Life(1, 0, Rank.ALIVE), 1), Options(), Counter())
        chance.shuffle(told)
        for delta in [*told, *told]:
            table.merge(delta)
        tables.append(table)
    assert tables[0].records == tables[1].records
    assert tables[0].index.root == tables[1].index.root


def test_a_delta_with_a_gap_before_it_is_not_taken() -> None:
    table = Table(Record("me", Life(1, 0, Rank.ALIVE), 1), Options(), Counter())
    owner = Record("x", Life(1, 0, Rank.ALIVE), 1)
    for number in range(6):
        owner = written(owner, f"k{number}", b"1")
    assert not table.merge(delta_of(owner, 3, None)[0])
    first, _, whole = delta_of(owner, 0, 160)
    assert not whole
    assert table.merge(first)
    assert table.records["x"].version == first.upto < owner.version
    assert table.merge(delta_of(owner, first.upto, None)[0])
    assert table.records["x"] == owner


def test_a_new_epoch_forgets_what_was_deleted_and_keeps_the_rest() -> None:
    owner = Record("x", Life(5, 3, Rank.ALIVE), 1)
    for key, value in (("a", b"1"), ("b", b"2"), ("a", None), ("c", b"3")):
        owner = written(owner, key, value)
    again = reborn(owner, 6)
    assert again.life == (6, 0, Rank.ALIVE)
    assert set(again.entries) == {"b", "c"}
    assert again.state() == owner.state()
    assert again.version == max(entry.version for entry in again.entries.values())


def test_changed_keys_are_those_whose_value_differs() -> None:
    old = {"same": Entry(1, b"1"), "gone": Entry(2, b"1"), "went": Entry(3, None), "new": Entry(4, b"1")}
    new = {"same": Entry(7, b"1"), "gone": Entry(8, None), "new": Entry(9, b"2"), "more": Entry(10, b"1")}
    assert changed_keys(old, new) == ["gone", "more", "new"]


@pytest.mark.parametrize("room", [150, 300, 1000, 20_000])
def test_a_delta_costs_no_more_on_the_wire_than_it_says(room: int) -> None:
    owner = Record("x" * 64, Life(1_700_000_000_000, 10**9, Rank.ALIVE), 10**15)
    for number in range(60):
        owner = written(
            owner, f'kä"y\\{number}', None if number % 3 else b'{"x": "' + b"y" * number * 9 + b'"}'
        )
    delta, cost, whole = delta_of(owner, 0, room)
    assert len(msgspec.json.encode(delta)) <= cost
    assert cost <= room or len(delta.writes) + len(delta.deletions) == 1
    assert whole is (delta.upto == owner.version)
