"""HELLO, WELCOME and REFUSED: what is understood, what is refused, and what people get to see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

import pytest

from llamesh.mesh.hello import (
    MAX_ADDRESSES,
    MAX_HELLO,
    BadHello,
    Hello,
    Refused,
    Welcome,
    decode_hello,
    decode_refusal,
    decode_welcome,
    encode_hello,
    encode_refusal,
    encode_welcome,
)
from llamesh.mesh.trust import ItsMe, NotTrusted

KEY, PROOF = b"\x07" * 32, b"\x08" * 32
HELLO = Hello("one", "park", "1.2.3", 7, 8080, ("10.0.0.1:8080", "[fe80::1%eth0]:8080"), KEY, PROOF)
WELCOME = Welcome("two", "1.2.3+abc", 2**63 - 1, "10.0.0.1:5555", 0, (), None, None)
LEAST: dict[str, object] = {"node_id": "one", "purpose": "send", "version": "1", "epoch": 0}


def test_there_and_back() -> None:
    assert decode_hello(encode_hello(HELLO)) == HELLO
    assert decode_welcome(encode_welcome(WELCOME)) == WELCOME


def test_the_least_that_will_do() -> None:
    assert decode_hello(json.dumps(LEAST).encode()) == Hello("one", "send", "1", 0)


def test_what_a_later_version_adds_is_ignored() -> None:
    later = {**LEAST, "speed": 5, "more": {"deep": [None]}, "previous_key": None, "proof": None}
    assert decode_hello(json.dumps(later).encode()) == Hello("one", "send", "1", 0)


BREACHES: list[Mapping[str, object]] = [
    *({"node_id": bad} for bad in ("", "a" * 65, "a b", "a\n", "ä", "a/b", "\x1b[31m", None, 5)),
    *({"purpose": bad} for bad in ("", "sends", "send\n", None)),
    *({"version": bad} for bad in ("", "v" * 65, "1 2", "1\x00", "1\n", 1)),
    *({"epoch": bad} for bad in (-1, 2**63, 1.5, "1", True, None)),
    *({"port": bad} for bad in (-1, 65_536, "80", None)),
    *({"addresses": bad} for bad in ("a:1", ["a:1\n"], [""], ["a" * 263], [5], ["a:1"] * 33, None)),
    *({"previous_key": bad, "proof": "CAgI"} for bad in ("", "BwcH", "no base64!", 5)),
    {"previous_key": "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="},
    {"proof": "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="},
]


@pytest.mark.parametrize("breach", BREACHES, ids=str)
def test_a_breach_of_the_rules(breach: Mapping[str, object]) -> None:
    with pytest.raises(BadHello, match="HELLO") as caught:
        decode_hello(json.dumps({**LEAST, **breach}).encode())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("missing", list(LEAST))
def test_what_must_be_there(missing: str) -> None:
    with pytest.raises(BadHello, match=missing):
        decode_hello(json.dumps({name: value for name, value in LEAST.items() if name != missing}).encode())


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"node_id":"\xff"}', b"[" * 5000,
     json.dumps(LEAST).encode() + b"x"],
    ids=range(9),
)  # fmt: skip
def test_no_such_object(data: bytes) -> None:
    with pytest.raises(BadHello):
        decode_hello(data)
    with pytest.raises(BadHello):
        decode_welcome(data)


def test_too_large() -> None:
    with pytest.raises(BadHello, match="8192"):
        decode_hello(json.dumps({**LEAST, "padding": "x" * MAX_HELLO}).encode())


def test_addresses_that_do_not_fit_are_left_out() -> None:
    many = tuple(f"{number:0257}:8080" for number in range(100))
    sent = decode_hello(encode_hello(replace(HELLO, addresses=("not an address", *many))))
    assert 25 < len(sent.addresses) <= MAX_ADDRESSES
    assert sent.addresses == many[: len(sent.addresses)]
    few = tuple(f"10.0.0.{number}:1" for number in range(100))
    assert decode_hello(encode_hello(replace(HELLO, addresses=few))).addresses == few[:MAX_ADDRESSES]


def test_what_breaks_the_rules_is_not_sent() -> None:
    with pytest.raises(BadHello):
        encode_hello(replace(HELLO, purpose="chat"))
    with pytest.raises(BadHello):
        encode_welcome(replace(WELCOME, node_id="a b"))


def test_a_refusal() -> None:
    error = decode_refusal(encode_refusal(NotTrusted("another key")), "10.0.0.2:8080", own_key=True)
    assert isinstance(error, Refused)
    assert str(error) == "10.0.0.2:8080 refuses this node: another key"


def test_a_refusal_of_oneself() -> None:
    data = encode_refusal(ItsMe("that is me"))
    assert isinstance(decode_refusal(data, "x", own_key=True), ItsMe)
    assert isinstance(decode_refusal(data, "x", own_key=False), Refused)


def test_a_long_refusal_is_cut() -> None:
    error = decode_refusal(encode_refusal(NotTrusted("x" * 5000)), "far", own_key=False)
    assert len(str(error)) < 1100


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "no readable reason"),
        (b'{"message": 5}', "no readable reason"),
        (b'{"message": "' + b"x" * 1001 + b'"}', "no readable reason"),
        (b'{"message": "' + b"x" * 9000 + b'"}', "no readable reason"),
        (b'{"message": "a\\u001b]0;b\\nc\\u202ed"}', r"a\?\]0;b\?c\?d$"),
    ],
    ids=range(5),
)
def test_what_people_see_of_a_refusal(data: bytes, text: str) -> None:
    error = decode_refusal(data, "far", own_key=False)
    with pytest.raises(Refused, match=text):
        raise error
