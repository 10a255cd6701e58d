"""What an operator tells a node over HTTP: bad wishes, who may, and what is answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.web.raw import Http1, get
from tests.web.served import Served, served

ADMIN = {"X-Node-Key": "admin-key"}
CHAT: dict[str, Any] = {"model": "m", "messages": []}
ACTS = (
    "/admin/prewarm",
    "/admin/unload",
    "/admin/drain",
    "/admin/undrain",
    "/admin/pause",
    "/admin/reload",
    "/models/load",
    "/models/unload",
)


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A node of this module's own: it is drained and paused."""
    with served(tmp_path_factory.mktemp("ruled"), {"m": {}, "other": {}}) as running:
        yield running


def tell(node: Served, path: str, document: Any = None, method: str = "POST") -> Any:
    """One act that must succeed; its document."""
    reply = node.ask("fast", {} if document is None else document, path, method=method)
    assert reply.status in (200, 202), (path, reply.body)
    return reply.json()


def status_of(node: Served, path: str, document: Any = None, lane: str = "fast") -> tuple[int, str]:
    """Status and error type of what must be refused."""
    method = "GET" if document is None else "POST"
    reply = node.ask(lane, document, path, method=method)
    return reply.status, reply.error["type"]


# Bad wishes.


@pytest.mark.parametrize(
    ("path", "document"),
    [
        *[(path, body) for path in ACTS for body in (b"{", b"[]", b"7", b'"m"', b"\xff", b"null")],
        ("/admin/prewarm", {}),
        ("/admin/prewarm", {"model": ""}),
        ("/admin/prewarm", {"model": None}),
        ("/admin/prewarm", {"model": ["m"]}),
        ("/admin/prewarm", {"model": "m", "wait": "yes"}),
        ("/admin/prewarm", {"model": "m", "wait": None}),
        ("/admin/prewarm", {"model": "m", "wait": 1}),
        ("/admin/unload", {"model": None}),
        ("/admin/unload", {"model": 7}),
        ("/admin/unload", {"modell": "m"}),
        ("/admin/drain", {"nodes": "node-b"}),
        ("/admin/drain", {"node": ""}),
        ("/admin/drain", {"node": None}),
        ("/admin/drain", {"node": "node-b"}),
        ("/admin/undrain", {"node": ["node-a"]}),
        ("/admin/reload", {"model": "m"}),
        ("/admin/prewarm", {"model": "m", "profile": "x"}),
        ("/admin/prewarm", {"model": "m", "node": "node-b"}),
        ("/models/load", {}),
        ("/models/unload", {}),
        ("/admin/pause", {"seconds": "30m"}),
        ("/admin/pause", {"seconds": -1}),
        ("/admin/pause", {"seconds": True}),
        ("/admin/pause", {"seconds": None}),
        ("/admin/pause", {"time": 5}),
        ("/admin/pause", b'{"seconds": NaN}'),
    ],
)
def test_what_cant_be_meant_is_refused(ruled: Served, lane: str, path: str, document: Any) -> None:
    assert status_of(ruled, path, document, lane) == (400, "invalid_request_error")
    ready = ruled.page("/readyz")
    assert (ready["status"], ready["reason"]) == ("ready", None)
    assert ruled.find("starting") == []


@pytest.mark.parametrize("path", ["/admin/prewarm", "/admin/unload", "/models/load", "/models/unload"])
def test_unknown_models(ruled: Served, path: str) -> None:
    for name in ("nobody", "m:nothing", "x" * 5000):
        assert status_of(ruled, path, {"model": name}) == (404, "model_not_found")


def test_other_methods(ruled: Served, lane: str) -> None:
    for path in ACTS:
        reply = ruled.ask(lane, None, path, method="GET")
        assert (reply.status, reply.error["type"]) == (405, "method_not_allowed"), path
        assert "POST" in reply.headers["allow"]
    reply = ruled.ask(lane, {}, "/unload")
    assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


def test_a_body_that_is_too_large(ruled: Served) -> None:
    body = b'{"model": "' + b"x" * (2 << 20) + b'"}'
    reply = ruled.ask("http2", body, "/admin/prewarm")
    assert (reply.status, reply.error["type"]) == (413, "request_too_large")


# Who may.


def test_every_act_needs_the_key_of_an_administrator(guarded: Served, lane: str) -> None:
    for path in (*ACTS, "/unload"):
        method, document = ("GET", None) if path == "/unload" else ("POST", {"model": "nobody"})
        assert guarded.ask(lane, document, path, {}, method).status == 401
        assert guarded.ask(lane, document, path, {"X-Node-Key": "wrong"}, method).status == 401
        assert guarded.ask(lane, document, path, {"X-Node-Key": "plain-key"}, method).status == 403
    for path in ("/models/load", "/models/unload"):
        assert guarded.ask(lane, {"model": "nobody"}, path, ADMIN).status == 404
    assert guarded.ask(lane, {}, "/admin/reload", ADMIN).status == 200
    assert guarded.page("/readyz")["status"] == "ready"


def test_a_page_in_a_browser_cant_unload_by_a_link(ruled: Served) -> None:
    """An image of another site sends no Origin; what browsers send instead is looked at."""
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 403), ("none", 200)):
        with Http1(ruled.port) as client:
            client.send(get("/unload", f"Sec-Fetch-Site: {site}"))
            assert client.answer().status == status, site
    assert ruled.ask("http2", None, "/unload", method="HEAD").status == 405


# What they do.


def test_load_and_unload_by_the_names_of_neighbours(ruled: Served, lane: str) -> None:
    loaded = tell(ruled, "/models/load", {"model": "m", "wait": True})
    assert loaded == {"success": True, "model": "m", "status": "loaded"}
    at_once = tell(ruled, "/models/load", {"model": "other"})
    assert at_once["success"] is True
    assert at_once["status"] in ("loading", "loaded")
    tell(ruled, "/admin/prewarm", {"model": "other"})
    running = ruled.page("/running")["running"]
    assert {entry["model"] for entry in running} == {"m", "other"}
    ids = {entry["model"]: entry["instance"] for entry in running}
    assert tell(ruled, "/models/unload", {"model": "m"}) == {"success": True, "unloading": [ids["m"]]}
    reply = ruled.ask(lane, None, "/unload", method="GET", host="localhost")
    assert (reply.status, ids["other"] in reply.json()["unloading"]) == (200, True)
    ruled.wait(lambda: ruled.page("/running")["running"] == [], "all gone")
    assert tell(ruled, "/admin/unload") == {"unloading": []}


def test_drain_and_undrain(ruled: Served, lane: str) -> None:
    tell(ruled, "/admin/prewarm", {"model": "m"})
    assert tell(ruled, "/admin/drain") == {"status": "draining"}
    assert tell(ruled, "/admin/drain") == {"status": "draining"}
    ready = ruled.ask(lane, None, "/readyz", method="GET")
    assert (ready.status, ready.json()["status"], ready.json()["can_spawn"]) == (503, "draining", False)
    for path, document in (("/v1/chat/completions", CHAT), ("/admin/prewarm", {"model": "other"})):
        reply = ruled.ask(lane, document, path)
        assert (reply.status, reply.error["type"], reply.headers["retry-after"]) == (503, "draining", "5")
    for path in ("/v1/models", "/running", "/metrics", "/cluster/nodes"):
        assert ruled.ask(lane, None, path, method="GET").status == 200
    assert ruled.page("/cluster/nodes")["nodes"]["node-a"]["ready"] is False
    assert tell(ruled, "/admin/reload")["added"] == []
    assert tell(ruled, "/admin/undrain") == {"status": "ready"}
    assert ruled.ask(lane, CHAT).status == 200
    assert ruled.page("/readyz")["status"] == "ready"


def test_this_node_by_its_name(ruled: Served) -> None:
    """As if it hadn't been named, but that the answer says it, too."""
    me = {"node": "node-a"}
    assert tell(ruled, "/admin/drain", me) == {"status": "draining", **me}
    assert tell(ruled, "/admin/undrain", me) == {"status": "ready", **me}
    assert tell(ruled, "/admin/prewarm", {"model": "m", **me}) == {"model": "m", "status": "loaded", **me}
    assert tell(ruled, "/admin/unload", {"model": "m", **me})["node"] == "node-a"
    for path in ("/admin/builds?node=node-a", "/unload?node=node-a"):
        reply = ruled.ask("fast", None, path, method="GET", host="localhost")
        assert reply.json()["node"] == "node-a"
    reply = ruled.ask("fast", None, "/admin/builds?node=node-b", method="GET")
    assert (reply.status, "node-a is alone" in reply.error["message"]) == (400, True)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({}, "paused"),
        ({"seconds": 3600}, "paused for another"),
        (b'{"seconds": 1' + b"0" * 400 + b"}", "paused"),
    ],
    ids=["until further notice", "an hour", "a number beyond all clocks"],
)
def test_pause(ruled: Served, lane: str, document: Any, words: str) -> None:
    tell(ruled, "/admin/prewarm", {"model": "m"})
    answer = tell(ruled, "/admin/pause", document)
    assert answer["status"] == "paused"
    assert answer["reason"].startswith(words)
    ruled.wait(lambda: ruled.page("/running")["running"] == [], "the machine is free")
    reply = ruled.ask(lane, CHAT)
    assert (reply.status, reply.error["type"], reply.headers["retry-after"]) == (503, "draining", "5")
    assert "paused" in reply.error["message"]
    ready = ruled.ask(lane, None, "/readyz", method="GET")
    assert (ready.status, words in ready.json()["reason"]) == (503, True)
    # Other reasons to take nothing are told apart.
    tell(ruled, "/admin/drain")
    assert tell(ruled, "/admin/pause", {"seconds": 0}) == {"status": "ready", "reason": ""}
    assert ruled.page("/readyz")["reason"] == "is draining"
    tell(ruled, "/admin/undrain")
    assert ruled.ask(lane, CHAT).status == 200


def test_a_pause_ends_by_itself(ruled: Served) -> None:
    tell(ruled, "/admin/pause", {"seconds": 0.3})
    ruled.wait(lambda: ruled.page("/readyz")["status"] == "ready", "ready again")
    assert ruled.ask("fast", CHAT).status == 200
