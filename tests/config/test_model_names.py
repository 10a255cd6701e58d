"""Names from people and from hubs: what is one, and what leads elsewhere."""

from __future__ import annotations

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.model_names import (
    BadName,
    check_file,
    check_sha256,
    check_url,
    file_of_url,
    is_loopback,
    split_repo,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("owner/name", ("owner/name", None)),
        ("o/n-1.2_GGUF:Q4_K_M", ("o/n-1.2_GGUF", "Q4_K_M")),
        ("o/n:UD-Q4_K_XL", ("o/n", "UD-Q4_K_XL")),
    ],
)
def test_repositories(text: str, expected: tuple[str, str | None]) -> None:
    assert split_repo(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "a/b/c", "../b", "a/..", "/a/b", "a/b/", "-a/b", "a/-b", ".a/b", "a/b.", "a--b/c",
        "a/b..c",
        "a/b.git", "a/b\n", "a/b c", "a/b:", "a/b:../x", "a/b:-x", "a\\b/c", "ä/b", "a/b:" + "Q" * 70,
        "a/" + "b" * 100, "--upload-pack/x",
    ],
)  # fmt: skip
def test_what_is_no_repository(text: str) -> None:
    with pytest.raises(BadName) as caught:
        split_repo(text)
    assert "owner/name" in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "name",
    [
        "", "/etc/passwd", "../a.gguf", "a/../b.gguf", "a//b.gguf", "./a.gguf", "a/.", "a\\b.gguf",
        "a\0.gguf",
        "a\n.gguf", "a\x7f.gguf", "a\x85.gguf", "x" * 300, "a/" * 300 + "b", "\ud800.gguf",
    ],
)  # fmt: skip
def test_what_is_no_file_of_a_repository(name: str) -> None:
    with pytest.raises(BadName, match="not a file of a repository"):
        check_file(name)


@given(st.text(max_size=60))
def test_a_file_that_passes_stays_below_its_root(name: str) -> None:
    try:
        check_file(name)
    except BadName:
        return
    path = PurePosixPath("/root") / name
    assert path.parts[:2] == ("/", "root")
    assert ".." not in path.parts
    assert len(path.parts) >= 3


@pytest.mark.parametrize(
    "url",
    [
        "https://example.org/a/model.gguf?download=true",
        "https://example.org:8443/m.gguf",
        "http://127.0.0.1:80/m.gguf",
        "http://[::1]/m.gguf",
        "http://localhost/m.gguf",
    ],
)
def test_addresses(url: str) -> None:
    assert check_url(url) == url


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/m.gguf", "isn't https"),
        ("http://localhost.example.org/m.gguf", "isn't https"),
        ("ftp://example.org/m.gguf", "not an address"),
        ("file:///etc/passwd", "not an address"),
        ("https:///m.gguf", "not an address"),
        ("https://exa mple.org/", "not an address"),
        ("https://example.org:x/", "not an address"),
        ("https://example.org/\nHost: x", "not an address"),
        ("https://example.org/m.gguf#part", "holds a `#`"),
        ("https://" + "a" * 3000, "not an address"),
        ("m.gguf", "not an address"),
    ],
)
def test_what_is_no_address(url: str, message: str) -> None:
    with pytest.raises(BadName, match=message):
        check_url(url)


def test_a_password_in_an_address_isnt_repeated() -> None:
    with pytest.raises(BadName, match="a user or a password") as caught:
        check_url("https://me:hunter2@example.org/m.gguf")
    assert "hunter2" not in str(caught.value)


def test_hashes_and_names_of_files() -> None:
    assert check_sha256("AB" * 32) == "ab" * 32
    with pytest.raises(BadName, match="64 hexadecimal digits"):
        check_sha256("ab")
    assert file_of_url("https://x/a%20b.gguf?c=d") == "a b.gguf"
    assert file_of_url("https://x/a/..%2F..%2Fetc%2Fpasswd") == "passwd"
    assert file_of_url("https://x/%2e%2e") == "model.gguf"
    assert file_of_url("https://x/") == "model.gguf"
    assert is_loopback("127.3.4.5")
    assert not is_loopback("10.0.0.1")
