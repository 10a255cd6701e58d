"""Which of the addresses that nodes name are dialled."""

from __future__ import annotations

import pytest

from llamesh.mesh.hearsay import MOST, is_near, worth_dialling


@pytest.mark.parametrize(
    ("text", "far", "near"),
    [
        ("10.0.0.1:8080", True, True),
        ("[2001:db8::1]:8080", True, True),
        ("[64:ff9b::a00:1]:8080", True, True),
        ("node.example:8080", True, True),
        ("127.0.0.1:8080", False, True),
        ("127.9.9.9:8080", False, True),
        ("[::1]:8080", False, True),
        ("localhost:8080", False, True),
        ("LOCALHOST.:8080", False, True),
        ("[::ffff:127.0.0.1]:8080", False, True),
        ("[::ffff:10.0.0.1]:8080", True, True),
        ("[fe80::1]:8080", True, True),
        ("[fe80::1%3]:8080", False, True),
        ("0.0.0.0:8080", False, False),
        ("[::]:8080", False, False),
        ("224.0.0.1:8080", False, False),
        ("255.255.255.255:8080", False, False),
        ("[ff02::1]:8080", False, False),
        ("10.0.0.1:0", False, False),
        ("10.0.0.1", False, False),
        ("10.0.0.1:99999", False, False),
        ("a b:80", False, False),
        ("", False, False),
    ],
)
def test_what_is_dialled(text: str, far: bool, near: bool) -> None:
    assert bool(worth_dialling([text], near=False)) is far
    assert bool(worth_dialling([text], near=True)) is near


def test_never_ourselves_and_never_too_many() -> None:
    many = [f"10.0.0.1:{port}" for port in range(1, 200)]
    found = worth_dialling([*many[:2], *many], near=False, own=("10.0.0.1:1",))
    assert len(found) == MOST
    assert [address.port for address in found[:2]] == [2, 3]


def test_who_is_on_this_machine() -> None:
    assert is_near("127.0.0.1:5")
    assert is_near("[::1]:5")
    assert not is_near("10.0.0.1:5")
    assert not is_near("local")
