"""What nodes tell each other about profiles: read strictly, and never a reason to fail."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.offers import (
    IDLE,
    News,
    NodeEntry,
    Offer,
    Situation,
    decode_entry,
    decode_news,
    decode_offer,
    decode_situation,
    encode,
)

DECODERS = (decode_offer, decode_situation, decode_news, decode_entry)


def test_what_is_told_is_understood() -> None:
    offer = Offer("Qwen", "Fast", kind="rerank", aliases=("q", "best one"), n_slots=4, service_ms=12.5)
    assert decode_offer(encode(offer)) == offer
    situation = Situation(slots=2, others=3, loading_left_ms=1.5, room_ms=None, failing=True)
    assert decode_situation(encode(situation)) == situation
    news = News(
        "b", closed="is draining", profiles={"m:default": situation}, dial_back=False, summary={"x": [1]}
    )
    assert decode_news(encode(news)) == news
    entry = NodeEntry(version="1", addresses=("h:1",), cut=("c",), started=5.0)
    assert decode_entry(encode(entry)) == entry


def test_names() -> None:
    assert (Offer("Qwen").key, Offer("Qwen").public_name) == ("Qwen:default", "Qwen")
    assert (Offer("Qwen", "Fast").key, Offer("Qwen", "Fast").public_name) == ("Qwen:Fast", "Qwen:Fast")
    assert Offer("Qwen", "DEFAULT").public_name == "Qwen"


def test_an_idle_profile_costs_nothing() -> None:
    assert encode(IDLE) == b"{}"
    assert decode_situation(b"{}") == IDLE


def test_unknown_members_are_ignored() -> None:
    """A newer version may say more."""
    assert decode_offer(b'{"model":"m","of the future":{"a":[1]}}') == Offer("m")
    assert decode_situation(b'{"x":1,"slots":2}') == Situation(slots=2)
    assert decode_news(b'{"x":1}') == News()
    assert decode_entry(b'{"x":1}') == NodeEntry()


@pytest.mark.parametrize(
    "name",
    ["", "a\n", "a\r\nx-evil: 1", "a\x00", "a\x7f", "a:b", "\n", "x" * 257],
    ids=["empty", "ends a line", "another header", "nul", "delete", "colon", "a line end", "long"],
)
def test_names_that_no_cookbook_has(name: str) -> None:
    """They go into headers and mean profiles."""
    for member in ({"model": name}, {"model": "m", "profile": name}, {"model": "m", "aliases": [name]}):
        assert decode_offer(msgspec.json.encode(member)) is None


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"null", b"{", b"\xff", b'{"model":1}', b'{"model":"m","n_slots":-1}',
        b'{"model":"m","load_ms":-1}', b'{"model":"m","load_ms":NaN}', b'{"model":"m","load_ms":1e16}',
        b'{"model":"m","kind":"other"}', b'{"model":"m","n_slots":99999999999999999999}',
        b'{"model":"m","description":"' + b"x" * 5000 + b'"}', b'{"model":"m","runs":1}',
        b'{"model":"m","aliases":[' + b",".join([b'"a"'] * 65) + b"]}", b'{"x":' + b"[" * 5000,
    ],
)  # fmt: skip
def test_an_offer_that_is_none(data: bytes) -> None:
    assert decode_offer(data) is None


@pytest.mark.parametrize(
    "data",
    [
        b'{"slots":-1}',
        b'{"slots":1.5}',
        b'{"others":"1"}',
        b'{"room_ms":-1}',
        b'{"loading_left_ms":1e99}',
        b"7",
    ],
)
def test_a_situation_that_is_none(data: bytes) -> None:
    assert decode_situation(data) is None


def test_news_have_limits() -> None:
    many = {f"m{number}:default": {} for number in range(513)}
    assert decode_news(msgspec.json.encode({"profiles": many})) is None
    assert decode_news(msgspec.json.encode({"closed": "x" * 513})) is None
    assert decode_entry(msgspec.json.encode({"cut": ["x"] * 257})) is None
    assert decode_entry(msgspec.json.encode({"addresses": ["x"] * 33})) is None


@given(st.one_of(st.binary(), st.text().map(str.encode), st.builds(msgspec.json.encode, st.dictionaries(
    st.sampled_from(["model", "profile", "slots", "others", "profiles", "closed", "summary", "n_ctx", "cut"]),
    st.recursive(st.one_of(st.none(), st.integers(-(2**63), 2**63), st.text()), st.lists, max_leaves=5),
))))  # fmt: skip
def test_garbage_is_nothing(data: bytes) -> None:
    for decode in DECODERS:
        decode(data)
