"""Keys and administration, without a node."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from llamesh.config.settings import Settings
from llamesh.errors import Forbidden, NotAuthenticated
from llamesh.net.exchange import Headers
from llamesh.web.access import Access
from llamesh.web.cors import Cors

HASHED = "sha256:" + hashlib.sha256(b"hashed").hexdigest()


def access(header: str = "x-api-key", **auth: Any) -> Access:
    auth = {"allowed_keys": ["key", HASHED], **auth}
    return Access(Settings.model_validate({"auth": {"enabled": True, "required_header": header, **auth}}))


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-api-key", b"key")],
        [(b"x-api-key", b"hashed")],
        [(b"authorization", b"Bearer key")],
        [(b"authorization", b"BEARER  key ")],
        [(b"authorization", b"Bearer no"), (b"x-api-key", b"key")],
        [(b"x-api-key", b"no"), (b"authorization", b"Bearer key")],
    ],
)
def test_valid_keys(headers: Headers) -> None:
    access().check(headers)
    access().check_admin(headers, loopback=False)  # without admin_keys, these administer


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"x-api-key", b"")],
        [(b"x-api-key", b"KEY")],
        [(b"x-api-key", HASHED.encode())],
        [(b"x-other", b"key")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"key")],
        [(b"authorization", b"Basic key")],
    ],
)
def test_others(headers: Headers) -> None:
    for check in (access().check, lambda h: access().check_admin(h, loopback=True)):
        with pytest.raises(NotAuthenticated) as caught:
            check(headers)
        assert "x-api-key" in caught.value.message


def test_the_header_may_be_authorization_itself() -> None:
    guard = access("Authorization")
    guard.check([(b"authorization", b"key")])
    guard.check([(b"authorization", b"Bearer key")])


def test_admin_keys() -> None:
    guard = access(admin_keys=["boss"])
    guard.check([(b"x-api-key", b"boss")])
    guard.check_admin([(b"x-api-key", b"boss")], loopback=False)
    with pytest.raises(Forbidden):
        guard.check_admin([(b"x-api-key", b"key")], loopback=True)


def test_without_auth() -> None:
    guard = Access(Settings())
    guard.check([])
    guard.check_admin([], loopback=True)
    with pytest.raises(Forbidden):
        guard.check_admin([], loopback=False)


@pytest.mark.parametrize(
    ("host", "origin", "may"),
    [
        (b"[::1]:8080", b"http://[::1]:8080", True),
        (b"LOCALHOST:8080", b"http://localhost:8080", True),
        (b"localhost:8080", b"http://localhost:8081", False),
        (b"localhost:8080", b"https://tool.example", True),
        (b"localhost:8080", b"https://evil.example", False),
        (b"evil.example", b"http://evil.example", False),
        (b"", b"null", False),
        (b"", b"http://[", False),
    ],
)
def test_pages_of_other_origins_do_not_administer(host: bytes, origin: bytes, may: bool) -> None:
    settings = Settings.model_validate({"http": {"cors_allowed_origins": ["https://tool.example"]}})
    headers: Headers = [(b"host", host), (b"origin", origin)]
    if may:
        Access(settings).check_admin(headers, loopback=True)
        return
    with pytest.raises(Forbidden):
        Access(settings).check_admin(headers, loopback=True)


# Origins.

ASKED: Headers = [
    (b"origin", b"https://a.example"),
    (b"access-control-request-method", b"POST"),
    (b"access-control-request-headers", b"Authorization"),
]


def test_no_origins_cost_nothing() -> None:
    assert Cors.of(()) is None


def test_any_origin() -> None:
    cors = Cors(["*"])
    assert (b"access-control-allow-origin", b"*") in cors.headers([])
    assert (b"access-control-allow-headers", b"authorization") in (cors.preflight("OPTIONS", ASKED) or [])


def test_preflights_only_of_allowed_origins() -> None:
    assert Cors(["https://A.example"]).preflight("OPTIONS", ASKED) is not None
    assert Cors(["https://b.example"]).preflight("OPTIONS", ASKED) is None
    assert Cors(["https://a.example"]).preflight("POST", ASKED) is None
    assert Cors(["https://a.example"]).preflight("OPTIONS", ASKED[:1]) is None


def test_asked_for_headers_that_are_none_are_not_repeated() -> None:
    asked: Headers = [*ASKED[:2], (b"access-control-request-headers", b"a\r\nb: c")]
    names = [name for name, _ in Cors(["*"]).preflight("OPTIONS", asked) or []]
    assert b"access-control-allow-headers" not in names


def test_nobody_has_a_hundred_keys() -> None:
    """Each would be compared with all that there are."""
    with pytest.raises(NotAuthenticated):
        access().check([(b"x-api-key", b"no")] * 100 + [(b"x-api-key", b"key")])
