"""Keys and origins, by every lane."""

from __future__ import annotations

from typing import Any

import pytest

from tests.web.raw import Http1, post
from tests.web.served import Served

CHAT: dict[str, Any] = {"model": "m", "messages": []}
ORIGIN = "https://chat.example.org"

ACCEPTED: list[dict[str, str]] = [
    {"Authorization": "Bearer plain-key"},
    {"authorization": "bearer plain-key"},
    {"X-Node-Key": "plain-key"},
    {"X-Node-Key": "hashed-key"},
    {"Authorization": "Bearer admin-key"},
    {"Authorization": "Bearer dummy", "X-Node-Key": "plain-key"},
    {"X-Node-Key": "dummy", "Authorization": "Bearer plain-key"},
]
REFUSED: list[dict[str, str]] = [
    {},
    {"Authorization": "Bearer wrong"},
    {"Authorization": "Bearer "},
    {"Authorization": "Basic plain-key"},
    {"X-Node-Key": ""},
    {"X-Api-Key": "plain-key"},
    {"X-Node-Key": "sha256:8ca7f8ed09e1b4a4e5d53f6a2cc5bd0b8d2e45b1e3cfb13d30b3a9f6d0b5b4ac"},
]


@pytest.mark.parametrize("headers", ACCEPTED, ids=str)
def test_keys_that_open(guarded: Served, lane: str, headers: dict[str, str]) -> None:
    assert guarded.ask(lane, CHAT, headers=headers).status == 200
    assert guarded.ask(lane, None, "/v1/models", headers, "GET").status == 200
    assert guarded.ask(lane, None, "/metrics/json", headers, "GET").status == 200


@pytest.mark.parametrize("headers", REFUSED, ids=str)
def test_keys_that_do_not(guarded: Served, lane: str, headers: dict[str, str]) -> None:
    for method, path, document in (
        ("POST", "/v1/chat/completions", CHAT),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/m", None),
        ("GET", "/metrics/json", None),
        ("GET", "/metrics", None),
        ("POST", "/admin/unload", {"model": "m"}),
    ):
        reply = guarded.ask(lane, document, path, headers, method)
        assert (reply.status, reply.error["type"]) == (401, "authentication_error"), path
        assert "plain-key" not in reply.body.decode()


def test_only_admins_administer(guarded: Served, lane: str) -> None:
    told = {"model": "m"}
    reply = guarded.ask(lane, told, "/admin/prewarm", {"X-Node-Key": "plain-key"})
    assert (reply.status, reply.error["type"]) == (403, "forbidden")
    assert guarded.ask(lane, told, "/admin/prewarm", {"X-Node-Key": "admin-key"}).status == 200


def test_health_needs_no_key(guarded: Served, lane: str) -> None:
    for path in ("/health", "/healthz", "/readyz", "/version"):
        assert guarded.ask(lane, None, path, {}, "GET").status == 200


def test_refused_uploads_do_not_spoil_the_connection(guarded: Served) -> None:
    with Http1(guarded.port) as client:
        client.send(post(CHAT) + post(CHAT, "/v1/chat/completions", "X-Node-Key: plain-key"))
        assert client.answer().status == 401
        assert client.answer().status == 200


def test_keys_stay_with_the_node(guarded: Served, lane: str) -> None:
    headers = {"X-Node-Key": "plain-key", "Authorization": "Bearer plain-key", "X-Api-Key": "other"}
    reply = guarded.ask(lane, {**CHAT, "fake": {"echo": True}}, headers=headers)
    assert b"plain-key" not in reply.body
    assert b"x-node-key" not in reply.body.lower()
    assert "plain-key" not in str(guarded.events)


# Origins.


@pytest.mark.parametrize(
    ("path", "document"), [("/v1/chat/completions", CHAT), ("/v1/models", None), ("/metrics/json", None)]
)
def test_answers_to_an_allowed_origin(guarded: Served, lane: str, path: str, document: Any) -> None:
    method = "GET" if document is None else "POST"
    for key, status in (("plain-key", 200), ("wrong", 401)):
        reply = guarded.ask(lane, document, path, {"Origin": ORIGIN, "X-Node-Key": key}, method)
        assert reply.status == status
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in reply.headers["access-control-expose-headers"]
        assert reply.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", [None, "https://evil.example", "null", ORIGIN + ".evil.example"])
def test_answers_to_another_origin(guarded: Served, lane: str, origin: str | None) -> None:
    headers = {"X-Node-Key": "plain-key"} | ({"Origin": origin} if origin else {})
    for path, document, method in (
        ("/v1/chat/completions", CHAT, "POST"),
        ("/v1/models", None, "GET"),
        ("/v1/models", None, "OPTIONS"),
    ):
        reply = guarded.ask(lane, document, path, headers, method)
        assert "access-control-allow-origin" not in reply.headers
        assert reply.headers["vary"] == "Origin"


def test_preflights(guarded: Served, lane: str) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    wanted = {"Access-Control-Request-Headers": "Authorization,content-type"}
    for path in ("/v1/chat/completions", "/v1/models", "/metrics/json"):
        reply = guarded.ask(lane, None, path, asked | wanted, "OPTIONS")
        assert (reply.status, reply.body) == (204, b"")
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert "POST" in reply.headers["access-control-allow-methods"]
        assert reply.headers["access-control-allow-headers"] == "authorization,content-type"
    refused = guarded.ask(
        lane, None, "/v1/chat/completions", {**asked, "Origin": "https://evil.example"}, "OPTIONS"
    )
    assert refused.status == 405
    assert "access-control-allow-methods" not in refused.headers


def test_no_origin_is_allowed_by_default(node: Served, lane: str) -> None:
    reply = node.ask(lane, CHAT, headers={"Origin": ORIGIN, "Content-Type": "application/json"})
    assert reply.status == 200
    assert not [name for name in reply.headers if name.startswith("access-control-")]
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert node.ask(lane, None, "/v1/chat/completions", asked, "OPTIONS").status == 405


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("127.0.0.1:8080", None, 200),
        ("127.0.0.1:8080", "http://127.0.0.1:8080", 200),
        ("localhost:8080", "http://localhost:8080", 200),
        ("127.0.0.1:8080", "https://evil.example", 403),
        ("127.0.0.1:8080", "http://127.0.0.1:9999", 403),
        ("127.0.0.1:8080", "null", 403),
        ("rebound.example", "http://rebound.example", 403),
    ],
)
def test_web_pages_cannot_administer(node: Served, host: str, origin: str | None, status: int) -> None:
    lines = [f"Origin: {origin}"] if origin else []
    with Http1(node.port) as client:
        client.send(post({"model": "spare"}, "/admin/prewarm", *lines, host=host))
        assert client.answer().status == status
