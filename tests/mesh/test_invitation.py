"""The invitation line: what goes in comes out, what was cut or changed is refused, nothing shows."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.settings import Address
from llamesh.mesh.cluster_token import new_token
from llamesh.mesh.invitation import (
    LONGEST_LINE,
    MOST_ADDRESSES,
    BadInvitation,
    decode,
    encode,
)
from llamesh.mesh.trust import key_text

KEY = bytes(range(32))
TOKEN = "correct horse battery staple"
ADDRESSES = (Address("192.0.2.7", 8080), Address("fd00::7", 8080), Address("box.example", 443))
LINE = encode("box-a", KEY, TOKEN, ADDRESSES)


def line_of(**members: Any) -> str:
    """A line with a right checksum around these members, whatever they are."""
    told = {"id": "box-a", "key": key_text(KEY), "token": TOKEN, "at": ["192.0.2.7:8080"]} | members
    content = json.dumps({name: value for name, value in told.items() if value != "gone"}).encode()
    return sealed(content)


def sealed(content: bytes) -> str:
    raw = content + hashlib.sha256(content).digest()[:6]
    return "llamesh1:" + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def test_there_and_back() -> None:
    found = decode(LINE)
    assert (found.node_id, found.key, found.token, found.addresses) == ("box-a", KEY, TOKEN, ADDRESSES)
    assert "\n" not in LINE
    assert decode(encode("b", KEY, TOKEN, ())).addresses == ()


def test_what_copying_adds_is_ignored() -> None:
    broken = "\r\n  ".join(LINE[start : start + 40] for start in range(0, len(LINE), 40))
    for text in (f"  {LINE}\n", f"'{LINE}'", f'"{LINE}"', f"`{LINE}`", broken):
        assert decode(text) == decode(LINE)


def test_the_largest_fits() -> None:
    addresses = [Address(f"{number:02d}." + ".".join(["x" * 61] * 4)[:249], 65_535) for number in range(20)]
    line = encode("x" * 64, KEY, "t" * 256, addresses)
    assert len(line) <= LONGEST_LINE
    assert decode(line).addresses == tuple(addresses[:MOST_ADDRESSES])


@given(st.integers(0, len(LINE) - 1))
def test_a_line_that_was_cut_is_known_as_such(length: int) -> None:
    with pytest.raises(BadInvitation):
        decode(LINE[:length])


@given(
    st.integers(0, len(LINE) - 1),
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="'\"`"),
)
def test_a_changed_character_is_noticed(at: int, letter: str) -> None:
    changed = LINE[:at] + letter + LINE[at + 1 :]
    if changed == LINE or letter.isspace():
        return
    with pytest.raises(BadInvitation) as caught:
        decode(changed)
    assert len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("  \n", "it is empty"),
        ("https://example.org/", "doesn't start with llamesh1:"),
        ("LLAMESH1:abc", "doesn't start with llamesh1:"),
        ("llamesh2:" + LINE[9:], "another version of llamesh"),
        ("llamesh1:", "cut short"),
        ("llamesh1:AAAA", "cut short"),
        (LINE[:-3], "cut short"),
        (LINE + "=", "cut short"),
        (LINE + "A", "cut short"),
        ("x" * (LONGEST_LINE + 1), "longer than"),
        (line_of(id="a b"), "no node id"),
        (line_of(id=""), "no node id"),
        (line_of(id=7), "doesn't hold"),
        (line_of(id="gone"), "doesn't hold"),
        (line_of(key="gone"), "doesn't hold"),
        (line_of(key="noise25519:AAAA"), "doesn't hold"),
        (line_of(token="short"), "doesn't hold"),
        (line_of(token="\x1b[31m secret secret secret"), "doesn't hold"),
        (line_of(at="192.0.2.7:8080"), "doesn't hold"),
        (line_of(at=["192.0.2.7:0"]), "doesn't hold"),
        (line_of(at=["192.0.2.7"]), "doesn't hold"),
        (line_of(at=["evil host:80"]), "doesn't hold"),
        (line_of(at=["192.0.2.7:1"] * 17), "more than 16"),
        (sealed(b"[" * 3000), "doesn't hold"),
        (sealed(b"{"), "doesn't hold"),
        (sealed(b"\xff\xfe"), "doesn't hold"),
        (sealed(b"[]"), "doesn't hold"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadInvitation, match=words) as caught:
        decode(text)
    assert "secret secret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_members_of_later_versions_are_ignored() -> None:
    assert decode(line_of(until="2030-01-01", more={"x": [1]})).node_id == "box-a"


def test_an_address_said_twice_is_one() -> None:
    assert decode(line_of(at=["192.0.2.7:80", "192.0.2.7:80"])).addresses == (Address("192.0.2.7", 80),)


@given(st.text(max_size=300) | st.text(max_size=200).map("llamesh1:".__add__))
def test_any_text_is_refused_in_words(text: str) -> None:
    with pytest.raises(BadInvitation) as caught:
        decode(text)
    assert str(caught.value).isascii()


@given(st.binary(max_size=200))
def test_any_content_with_a_right_checksum(content: bytes) -> None:
    with pytest.raises(BadInvitation):
        decode(sealed(content))


@given(
    st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
    st.binary(min_size=32, max_size=32),
    st.lists(st.tuples(st.ip_addresses(), st.integers(1, 65_535)), max_size=16, unique=True),
)
def test_whatever_goes_in_comes_out(node_id: str, key: bytes, places: list[tuple[Any, int]]) -> None:
    addresses = tuple(Address(str(host), port) for host, port in places)
    token = new_token()
    found = decode(encode(node_id, key, token, addresses))
    assert (found.node_id, found.key, found.token, found.addresses) == (node_id, key, token, addresses)


def test_the_token_doesnt_show() -> None:
    assert TOKEN not in repr(decode(LINE))
    assert TOKEN not in str(decode(LINE))
