"""Where prompts were read before is remembered for a while, and believed as far as that proves true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from llamesh.core.lifecycle import State
from llamesh.core.prefixes import Prefix, prefix_of
from llamesh.dispatch.affinity import _MOST_HASHES, COLD, Affinity

KEY = "m:default"


@dataclass
class Instance:
    id: str
    state: State = State.READY


class Pool:
    def __init__(self) -> None:
        self.there = [Instance("m:default#1"), Instance("m:default#2")]

    def instances(self, key: str) -> list[Instance]:
        assert key == KEY
        return self.there


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def affinity(pool: Pool) -> Affinity:
    return Affinity(cast(Any, pool))


def prompt(text: str, length: int = 4096) -> Prefix:
    return prefix_of(KEY, (), (text * length)[:length].encode())


async def test_the_next_turn_is_known(affinity: Affinity) -> None:
    first = b"a" * 4096
    assert affinity.find(KEY, prefix_of(KEY, (), first)) is COLD
    affinity.note(prefix_of(KEY, (), first), ("", "m:default#2"))
    second = prefix_of(KEY, (), first + b"b" * 4096)
    assert affinity.find(KEY, second) == ({"": 0.5}, {"m:default#2": 0.5})
    # It went to a peer: both have something, the peer more.
    affinity.note(second, ("b", ""))
    third = prefix_of(KEY, (), first + b"b" * 4096 + b"c" * 8192)
    assert affinity.find(KEY, third) == ({"": 0.25, "b": 0.5}, {"m:default#2": 0.25})
    assert affinity.find(KEY, prompt("z")) is COLD


async def test_an_instance_takes_its_cache_along(affinity: Affinity, pool: Pool) -> None:
    affinity.note(prompt("a"), ("", "m:default#1"))
    pool.there[0].state = State.DRAINING
    assert affinity.find(KEY, prompt("a")) is COLD
    pool.there[0].state = State.READY
    assert affinity.find(KEY, prompt("a")).nodes == {"": 1.0}
    pool.there = []
    assert affinity.find(KEY, prompt("a")) is COLD


async def test_it_is_forgotten(affinity: Affinity, autojump_clock: MockClock) -> None:
    affinity.note(prompt("a"), ("b", ""))
    await trio.sleep(3599)
    assert affinity.find(KEY, prompt("a")).nodes == {"b": 1.0}
    await trio.sleep(2)
    assert affinity.find(KEY, prompt("a")) is COLD


async def test_a_name_says_something_too(affinity: Affinity) -> None:
    affinity.note(prefix_of(KEY, (), b"hi", b"chat-1"), ("b", ""))
    assert affinity.find(KEY, prefix_of(KEY, (), b"and", b"chat-1")).nodes == {"b": 0.5}
    assert affinity.find(KEY, prefix_of(KEY, (), b"and", b"chat-2")) is COLD
    # What is really alike says more.
    long = b"a" * 4096
    affinity.note(prefix_of(KEY, (), long, b"chat-1"), ("c", ""))
    assert affinity.find(KEY, prefix_of(KEY, (), long, b"chat-1")).nodes == {"b": 0.5, "c": 1.0}


async def test_what_turns_out_to_keep_nothing_is_expected_to_keep_little(affinity: Affinity) -> None:
    affinity.note(prompt("a"), ("b", ""))
    for _ in range(20):
        affinity.learn("b", KEY, affinity.find(KEY, prompt("a")).nodes["b"], 0.0)
    assert 0 < affinity.find(KEY, prompt("a")).nodes["b"] < 0.05
    # It has more memory now.
    for _ in range(20):
        affinity.learn("b", KEY, affinity.find(KEY, prompt("a")).nodes["b"], 0.9)
    assert affinity.find(KEY, prompt("a")).nodes["b"] > 0.8
    # What nobody expected says nothing.
    affinity.learn("b", KEY, 0.0, 0.0)
    assert affinity.find(KEY, prompt("a")).nodes["b"] > 0.8


async def test_it_is_bounded(affinity: Affinity) -> None:
    for number in range(2000):
        affinity.note(prompt(f"{number:06d}", 16_384), ("b", ""))
        affinity.note(prompt("the same"), (f"node-{number}", ""))
    assert len(affinity._seen) <= _MOST_HASHES
    assert len(affinity.find(KEY, prompt("the same")).nodes) == 8
    assert affinity.find(KEY, prompt("000000", 16_384)) is COLD
    assert affinity.find(KEY, prompt("001999", 16_384)).nodes
