"""The decoder: what it takes, what it refuses, and that nothing refused leaves a trace."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamesh.core.membership import BadMessage, Membership, Options
from llamesh.core.membership.messages import (
    MAX_EPOCH,
    MAX_MESSAGE,
    MAX_NESTING,
    MAX_VALUE,
    check_id,
    check_key,
    check_value,
    decode,
    encode,
)


def member(name: str = "a", epoch: int = 1000) -> Membership:
    """Somebody who knows b (with an entry) and c (dead)."""
    here = Membership(name, epoch, Options(), random.Random(1))
    here.set("own", b"1")
    here.answer("b", whole(deltas=[["b", 5, 0, 0, 0, 3, [["k", 2, 7]], [["l", 3]]]]), 0.0)
    here.answer("b", whole(deltas=[["c", 5, 0, 0, 0, 2, [["k", 2, 7]]]]), 0.0)
    for now in (1.0, 2.0):
        here.start_round(now)
        here.probe_result("c", False, now)
    here.take_events()
    assert here.members()["c"].status == "dead"
    return here


def whole(**sections: Any) -> bytes:
    return json.dumps({"v": 1, "me": [5, 0, 1], **sections}).encode()


def fingerprint(here: Membership) -> tuple[Any, ...]:
    return repr(here), dict(here.members()), here.root, here.take_events()


GOOD = {
    "nothing": whole(),
    "you": whole(s=3, you=[1000, 0, 2]),
    "lives": whole(lives=[["b", 5, 1, 0], ["c", 5, 1, 0], ["a", 1000, 0, 2], ["z", 1, 1, 2]]),
    "root": whole(root="0123456789abcdef", n=3),
    "hashes": whole(bits=1, hashes="0" * 24),
    "digests": whole(bits=0, buckets=[0], digests=[["b", 5, 0, 3], ["c", 5, 0, 2, 2], ["d", 5, 0, 9]]),
    "want": whole(want=[["a", 1000, 0], ["b", 5, 0], ["nobody", 1, 0]]),
    "deltas": whole(deltas=[["b", 5, 0, 0, 3, 4, [["k", 4, {"x": [1, None]}]], []]], more=True, buckets=[0]),
}


@pytest.mark.parametrize("what", GOOD)
def test_a_good_message_is_answered_with_a_good_one(what: str) -> None:
    reply = member().answer("b", GOOD[what], 3.0)
    assert encode(decode(reply)) == reply


# The same with what a later version may add: members to objects, elements at the end of lists, ranks.
LATER = {
    "nothing": whole(me=[5, 0, 1, 0, "more"], new={"deep": [[[1]]]}),
    "you": whole(s=3, you=[1000, 0, 2, {}]),
    "lives": whole(
        lives=[
            ["b", 5, 1, 0, 9],
            ["c", 5, 1, 0],
            ["a", 1000, 0, 2],
            ["z", 1, 1, 2],
            ["b", 9, 0, 200],
            ["a", 2000, 0, 4],
        ]
    ),
    "root": whole(root="0123456789abcdef", n=3, shape=None),
    "hashes": whole(bits=1, hashes="0" * 24, more_hashes=[]),
    "digests": whole(
        bits=0, buckets=[0], digests=[["b", 5, 0, 3, 0, 1], ["c", 5, 0, 2, 2, [2]], ["d", 5, 0, 9, 0, None]]
    ),
    "want": whole(want=[["a", 1000, 0, 1], ["b", 5, 0, "x"], ["nobody", 1, 0]]),
    "deltas": whole(
        deltas=[["b", 5, 0, 0, 3, 4, [["k", 4, {"x": [1, None]}, "codec"]], [], {"x": 1}]],
        more=True,
        buckets=[0],
    ),
}


@pytest.mark.parametrize("what", GOOD)
def test_what_is_not_known_yet_is_ignored(what: str) -> None:
    one, other = member(), member()
    assert other.answer("b", LATER[what], 3.0) == one.answer("b", GOOD[what], 3.0)
    assert fingerprint(one) == fingerprint(other)


BAD = {
    "empty": b"",
    "not JSON": b"{",
    "not an object": b"[]",
    "not UTF-8": whole()[:-1] + b',"x":"\xff"}',
    "no version": b'{"me": [5, 0, 1]}',
    "no sender": b'{"v": 1}',
    "bool for a number": whole(s=True),
    "fraction": whole(s=1.5),
    "negative": whole(s=-1),
    "epoch beyond": whole(me=[MAX_EPOCH + 1, 0, 1]),
    "huge": whole(me=[10**40, 0, 1]),
    "short list": whole(me=[5]),
    "empty id": whole(want=[["", 1, 1]]),
    "long id": whole(want=[["x" * 65, 1, 1]]),
    "id with a line break": whole(want=[["a\n", 1, 1]]),
    "id with a space": whole(lives=[["a b", 1, 1, 0]]),
    "root too short": whole(root="0123"),
    "root not hex": whole(root="0123456789abcdeg"),
    "hashes of another length": whole(bits=1, hashes="0" * 12),
    "bits beyond": whole(bits=9, hashes="0" * (12 << 9)),
    "bucket beyond": whole(bits=1, buckets=[2], digests=[]),
    "value too long": whole(deltas=[["b", 5, 0, 0, 3, 4, [["k", 4, "x" * MAX_VALUE]]]]),
    "value too deep": whole()[:-1]
    + b',"deltas":[["b",5,0,0,3,4,[["k",4,'
    + b"[" * (MAX_NESTING + 1)
    + b"]" * (MAX_NESTING + 1)
    + b"]]]]}",
    "value that is no JSON": whole()[:-1] + b',"deltas":[["b",5,0,0,3,4,[["k",4,[1,}]]]]}',
    "value with a number beyond": whole()[:-1] + b',"deltas":[["b",5,0,0,3,4,[["k",4,1e999]]]]}',
    "value with half a surrogate": whole()[:-1] + b',"deltas":[["b",5,0,0,3,4,[["k",4,"\\ud800"]]]]}',
    "key with a control character": whole(deltas=[["b", 5, 0, 0, 3, 4, [["k\x00", 4, 1]]]]),
    "empty key": whole(deltas=[["b", 5, 0, 0, 3, 4, [["", 4, 1]]]]),
    "key too long": whole(deltas=[["b", 5, 0, 0, 3, 4, [["k" * 129, 4, 1]]]]),
    "version before the delta": whole(deltas=[["b", 5, 0, 0, 3, 4, [["k", 3, 1]]]]),
    "version after the delta": whole(deltas=[["b", 5, 0, 0, 3, 4, [["k", 5, 1]]]]),
    "key twice": whole(deltas=[["b", 5, 0, 0, 3, 5, [["k", 4, 1]], [["k", 5]]]]),
    "version twice": whole(deltas=[["b", 5, 0, 0, 3, 5, [["k", 4, 1], ["l", 4, 1]]]]),
    "nested without end": whole()[:-1] + b',"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a good delta before a bad one": whole(
        deltas=[["b", 5, 0, 0, 3, 4, [["k", 4, 1]]], ["b", 5, 0, 0, 4, 4, [["k", 9, 1]]]]
    ),
    "too long": whole(x="x" * MAX_MESSAGE),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_message_is_refused_and_changes_nothing(what: str) -> None:
    here = member()
    before = fingerprint(here)
    with pytest.raises(BadMessage, match=r"^'b': "):
        here.answer("b", BAD[what], 3.0)
    with pytest.raises(BadMessage):
        here.take_reply("b", BAD[what], 3.0)
    assert fingerprint(here) == before
    assert here.counters["refused.message"] == 2


@pytest.mark.parametrize(
    "said", [{"v": 2, "me": [5, 0, 1]}, {"v": 2, "me": {"other": "shape"}}, {"v": 0, "me": [5, 0, 1]}]
)
def test_another_major_version_is_named(said: dict[str, Any]) -> None:
    with pytest.raises(
        BadMessage, match=rf"format {said['v']}; this node speaks 1. Run the same major version"
    ):
        member().answer("b", json.dumps(said).encode(), 3.0)


@pytest.mark.parametrize("sender", ["a", "", "x" * 65, "a b", "ä"])
def test_a_sender_that_cannot_be_is_refused(sender: str) -> None:
    here = member()
    before = fingerprint(here)
    with pytest.raises(BadMessage):
        here.answer(sender, whole(), 3.0)
    assert fingerprint(here) == before


def take(here: Membership, message: bytes) -> None:
    """Both ends of an exchange, with something that may be no message at all."""
    for verb in (here.answer, here.take_reply):
        before = fingerprint(here)
        try:
            reply = verb("b", message, 3.0)
        except BadMessage:
            assert fingerprint(here) == before
        else:
            assert reply is None or encode(decode(reply)) == reply


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    take(member(), data)


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
number = st.integers(0, 6) | st.sampled_from([1000, 1001, MAX_EPOCH, 2**40])
ids = st.sampled_from(["a", "b", "c", "d"])
row = st.tuples(number, number).map(list)
shaped = st.fixed_dictionaries(
    {"v": st.just(1), "me": st.lists(number, min_size=3, max_size=4)},
    optional={
        "s": st.integers(0, 30),
        "you": st.lists(number, min_size=3, max_size=3),
        "lives": st.lists(st.tuples(ids, number, number, st.integers(0, 5)).map(list), max_size=4),
        "root": st.sampled_from(["0" * 16, "f" * 16]),
        "n": st.integers(0, 5000),
        "bits": st.integers(0, 8),
        "hashes": st.sampled_from(["0" * 12, "1" * 24]),
        "buckets": st.lists(st.integers(0, 3), max_size=3),
        "digests": st.lists(st.tuples(ids, number, number, number, st.integers(0, 4)).map(list), max_size=4),
        "want": st.lists(st.tuples(ids, number, number).map(list), max_size=4),
        "deltas": st.lists(
            st.tuples(
                ids,
                number,
                number,
                st.integers(0, 3),
                st.integers(0, 3),
                st.integers(0, 9),
                st.lists(st.tuples(st.sampled_from("kl"), st.integers(1, 9), plain).map(list), max_size=2),
                st.lists(st.tuples(st.sampled_from("mn"), st.integers(1, 9)).map(list), max_size=2),
            ).map(list),
            max_size=3,
        ),
        "more": st.booleans(),
    },
)


@settings(max_examples=400)
@given(shaped)
def test_anything_of_the_right_shape(message: dict[str, Any]) -> None:
    here = member()
    own = here.members()["a"]
    take(here, json.dumps(message).encode())
    # Whatever anybody says: our own state is ours, and we live.
    mine = here.members()["a"]
    assert mine.state == own.state
    assert mine.status == "alive"


@given(st.sampled_from(list(GOOD.values())), st.data())
def test_a_good_message_with_something_else_somewhere(message: bytes, data: st.DataObject) -> None:
    document = json.loads(message)
    here: Any = document
    while True:
        key = data.draw(st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here))))
        if not (isinstance(here[key], list | dict) and here[key] and data.draw(st.booleans())):
            break
        here = here[key]
    here[key] = data.draw(plain)
    take(member(), json.dumps(document).encode())


@given(st.sampled_from(list(GOOD.values())), st.integers(0, 400), st.binary(max_size=3))
def test_a_good_message_with_other_bytes_in_it(message: bytes, where: int, other: bytes) -> None:
    where %= len(message)
    take(member(), message[:where] + other + message[where + len(other) :])


@given(plain.filter(lambda value: not isinstance(value, float)))
def test_a_value_arrives_as_it_was_written(value: Any) -> None:
    here, there = (Membership(one, 5, Options(), random.Random(1)) for one in "ab")
    try:
        text = msgspec.json.encode(value)
        check_value(text)
    except (ValueError, msgspec.MsgspecError):
        return
    there.set("k", text)
    message = there.answer("a", whole(want=[["b", 5, 0]]), 0.0)
    here.answer("b", message, 3.0)
    assert here.members()["b"].state["k"] == text


@pytest.mark.parametrize(
    "value",
    [b"", b"x", b"[", b'"\xff"', b"1 2", b'"' + b"x" * MAX_VALUE + b'"', b"[" * 65 + b"]" * 65],
    ids=["empty", "word", "open", "not UTF-8", "two", "long", "deep"],
)
def test_values_that_others_would_refuse_are_refused_here(value: bytes) -> None:
    here = member()
    before = fingerprint(here)
    with pytest.raises(ValueError, match=r"not JSON|at most|nested"):
        here.set("k", value)
    assert fingerprint(here) == before


def test_brackets_within_strings_and_beside_each_other_are_no_depth() -> None:
    check_value(json.dumps(["[" * 200, '"[' * 100, *([] for _ in range(200))]).encode())
    check_value(b"[" * 64 + b"]" * 64)


@pytest.mark.parametrize("key", ["", "x" * 129, "a\nb", "\x7f"])
def test_keys_that_others_would_refuse_are_refused_here(key: str) -> None:
    with pytest.raises(ValueError, match="a key has 1 to 128 characters"):
        check_key(key)


def test_ids_and_epochs_that_others_would_refuse_are_refused_here() -> None:
    check_id("A-z_0.9")
    for bad in ("", "a b", "x" * 65, "é"):
        with pytest.raises(ValueError, match="a node id has"):
            Membership(bad, 1, Options(), random.Random(1))
    for epoch in (-1, MAX_EPOCH):
        with pytest.raises(ValueError, match="an epoch is Unix time"):
            Membership("a", epoch, Options(), random.Random(1))
