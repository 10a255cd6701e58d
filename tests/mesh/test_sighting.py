"""What is believed of an announcement: bounded, checked, and otherwise refused as a whole."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.values import Address
from llamesh.mesh.interfaces import MOST_ADDRESSES
from llamesh.mesh.sighting import MOST_TXT, Record, Sighting, read_record, written_txt


def record(*addresses: str, port: int = 8080, properties: dict[bytes, bytes | None] | None = None) -> Record:
    return Record("box.local.", port, addresses or ("192.0.2.1",), properties or {b"id": b"box"})


def test_a_good_one() -> None:
    properties: dict[bytes, bytes | None] = {
        b"id": b"box",
        b"key": b"noise25519:AA=",
        b"wire": b"1",
        b"x": b"",
    }
    seen = read_record(
        record("192.0.2.1", "fd00::1", "fe80::1%2", "192.0.2.1", properties=properties), loopback=False
    )
    hosts = ["192.0.2.1", "fd00::1", "fe80::1%2"]
    txt = {"key": "noise25519:AA=", "wire": "1", "x": ""}
    assert seen == Sighting("box", tuple(Address(host, 8080) for host in hosts), txt)
    # Its addresses are addresses by our own rules.
    assert all(Address.parse(str(address)) == address for address in seen.addresses)


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "::", "224.0.0.251", "ff02::fb", "255.255.255.255", "::ffff:127.0.0.1", "127.0.0.1", "::1",
     "", "box.lan", "1.2.3.4:5"],
)  # fmt: skip
def test_what_cannot_be_dialled_is_left_out(address: str) -> None:
    assert read_record(record(address, "192.0.2.1"), loopback=False).addresses == (
        Address("192.0.2.1", 8080),
    )
    with pytest.raises(ValueError, match="no address"):
        read_record(record(address), loopback=False)


def test_loopback_counts_on_loopback() -> None:
    assert read_record(record("127.0.0.1"), loopback=True).addresses == (Address("127.0.0.1", 8080),)


def test_many_addresses_are_cut() -> None:
    many = record(*(f"192.0.2.{number}" for number in range(1, 100)))
    assert len(read_record(many, loopback=False).addresses) == MOST_ADDRESSES


@pytest.mark.parametrize(
    "bad",
    [
        record(port=0),
        record(port=65536),
        record(port=-1),
        record(properties={b"x": b"y"}),
        record(properties={b"id": None}),
        record(properties={b"id": b""}),
        record(properties={b"id": b"a b"}),
        record(properties={b"id": b"../x"}),
        record(properties={b"id": b"x\n"}),
        record(properties={b"id": "é".encode()}),
        record(properties={b"id": b"x" * 65}),
        record(properties={b"id": b"box", b"k": b"\xff"}),
        record(properties={b"id": b"box", b"k": b"\x1b[2J"}),
        record(properties={b"id": b"box", b"k": b"x" * 254}),
        record(properties={b"id": b"box", b"k": None}),
        record(properties={b"id": b"box", b"\xff": b""}),
        record(properties={b"id": b"box", b"": b""}),
        record(properties={b"id": b"box", **{b"%d" % number: b"" for number in range(MOST_TXT + 1)}}),
    ],
)
def test_a_bad_one_is_refused_as_a_whole(bad: Record) -> None:
    with pytest.raises(ValueError, match=r"."):
        read_record(bad, loopback=False)


@given(
    st.lists(st.text(max_size=20) | st.ip_addresses().map(str), max_size=20),
    st.integers(-1, 70_000),
    st.dictionaries(st.binary(max_size=40) | st.just(b"id"), st.none() | st.binary(max_size=80), max_size=20),
)
def test_any_record_is_a_sighting_within_bounds_or_a_value_error(
    addresses: list[str], port: int, properties: dict[bytes, bytes | None]
) -> None:
    try:
        seen = read_record(Record("x.", port, tuple(addresses), properties), loopback=True)
    except ValueError:
        return
    assert 1 <= len(seen.addresses) <= MOST_ADDRESSES
    assert len(seen.txt) <= MOST_TXT
    assert all(text.isprintable() for pair in seen.txt.items() for text in pair)


def test_what_is_announced_can_be_read() -> None:
    pairs = written_txt("box", {"wire": "1"})
    encoded: dict[bytes, bytes | None] = {key.encode(): value.encode() for key, value in pairs.items()}
    assert read_record(record(properties=encoded), loopback=False).txt == {"wire": "1"}
    for bad in ({"id": "x"}, {"k": "x" * 254}, {"k": "\n"}, {"k=": "x"}, {str(n): "" for n in range(17)}):
        with pytest.raises(ValueError, match=r"."):
            written_txt("box", bad)
