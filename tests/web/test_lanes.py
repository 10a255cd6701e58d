"""The same requests by every lane get the same answers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.web.raw import Reply
from tests.web.served import LANES, Served

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}

CASES: dict[str, tuple[str, str, Any, dict[str, str]]] = {
    "chat": ("POST", "/v1/chat/completions", CHAT, {}),
    "stream": ("POST", "/v1/chat/completions", {**CHAT, "stream": True}, {}),
    "completion": ("POST", "/v1/completions", {"model": "M:Default", "prompt": "x"}, {}),
    "messages": ("POST", "/v1/messages", CHAT, {}),
    "count_tokens": ("POST", "/v1/messages/count_tokens", CHAT, {}),
    "embeddings": ("POST", "/v1/embeddings", {"model": "embed", "input": ["a", "b"]}, {}),
    "rerank": ("POST", "/rerank", {"model": "ranks", "query": "a", "documents": ["b"]}, {}),
    "model in the query": ("POST", "/tokenize?model=m", {"content": "x"}, {}),
    "upstream 400": ("POST", "/v1/chat/completions", {**CHAT, "fake": {"status": 400}}, {}),
    "upstream 500": ("POST", "/v1/chat/completions", {**CHAT, "fake": {"status": 500}}, {}),
    "no JSON": ("POST", "/v1/chat/completions", b"{", {}),
    "no object": ("POST", "/v1/chat/completions", [1], {}),
    "no body": ("POST", "/v1/chat/completions", b"", {}),
    "no model": ("POST", "/v1/chat/completions", {"messages": []}, {}),
    "model null": ("POST", "/v1/chat/completions", {"model": None}, {}),
    "unknown model": ("POST", "/v1/chat/completions", {"model": "nobody"}, {}),
    "chat on embeddings": ("POST", "/v1/chat/completions", {"model": "embed"}, {}),
    "embeddings on text": ("POST", "/v1/embeddings", {"model": "m", "input": "x"}, {}),
    "hops": ("POST", "/v1/chat/completions", CHAT, {"X-Llama-Mesh-Hops": "10"}),
    "too many hops": ("POST", "/v1/chat/completions", CHAT, {"X-Llama-Mesh-Hops": "11"}),
    "hops that are no number": ("POST", "/v1/chat/completions", CHAT, {"X-Llama-Mesh-Hops": "one"}),
    "too large": ("POST", "/v1/chat/completions", b"x" * 200_001, {}),
    "models": ("GET", "/v1/models", None, {}),
    "one model": ("GET", "/v1/models/m", None, {}),
    "no such model": ("GET", "/v1/models/nobody", None, {}),
    "health": ("GET", "/health", None, {}),
    "ready": ("GET", "/readyz", None, {}),
    "version": ("GET", "/version", None, {}),
    "head": ("HEAD", "/v1/models", None, {}),
    "not found": ("GET", "/nowhere", None, {}),
    "post to nowhere": ("POST", "/v1/nowhere", CHAT, {}),
    "get on inference": ("GET", "/v1/chat/completions", None, {}),
    "post on a page": ("POST", "/v1/models", {}, {}),
    "post on a page of the app": ("POST", "/metrics/json", {}, {}),
    "post on the root": ("POST", "/", {}, {}),
    "delete": ("DELETE", "/v1/models", None, {}),
}

STATUS = {
    "upstream 400": 400,
    "upstream 500": 500,
    **dict.fromkeys(
        ["no JSON", "no object", "no body", "no model", "model null", "chat on embeddings", "too many hops"],
        400,
    ),
    "hops that are no number": 400,
    **dict.fromkeys(
        ["unknown model", "embeddings on text", "no such model", "not found", "post to nowhere"], 404
    ),
    **dict.fromkeys(
        ["get on inference", "post on a page", "post on a page of the app", "post on the root", "delete"], 405
    ),
    "too large": 413,
}

PARTICULAR = {
    *("date", "x-request-id", "connection", "transfer-encoding", "content-length", "x-llamesh-queue-ms"),
    # The application says these of all it serves; they matter to the dashboard.
    *("content-security-policy", "cache-control", "x-content-type-options", "referrer-policy"),
}


def comparable(reply: Reply) -> tuple[int, dict[str, str], Any]:
    """What mustn't depend on the lane: times, ids and framing left out."""
    headers = {name: value for name, value in reply.headers.items() if name not in PARTICULAR}
    body: Any = reply.body
    if reply.headers.get("content-type", "").startswith("application/json") and body:
        body = json.loads(body)
        for name in ("created", "age_seconds"):
            body.pop(name, None)
    elif b"data: " in body:
        events = [part[6:] for part in body.split(b"\n\n") if part.startswith(b"data: {")]
        body = [{**json.loads(event), "created": 0} for event in events], body.endswith(b"data: [DONE]\n\n")
    return reply.status, headers, body


@pytest.mark.parametrize("case", list(CASES))
def test_every_lane_answers_the_same(node: Served, case: str) -> None:
    method, path, document, headers = CASES[case]
    replies = [node.ask(lane, document, path, headers, method) for lane in LANES]
    assert comparable(replies[1]) == comparable(replies[0])
    assert comparable(replies[2]) == comparable(replies[0])
    assert replies[0].status == STATUS.get(case, 200)
    assert all(reply.headers["x-request-id"] for reply in replies)
    if replies[0].status >= 400 and not case.startswith("upstream"):
        error = replies[0].error
        assert error["message"]
        assert ("allow" in replies[0].headers) is (replies[0].status == 405)
    if "model" in case and replies[0].status == 400:
        assert error["param"] == "model"
    if "many hops" in case or "hops that" in case:
        assert "Too many hops" in error["message"]


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc-123:/x@y", True), ("", False), ('a"b', False), ("a b", False), ("x" * 129, False), ("ä", False)],
)
def test_request_ids(node: Served, lane: str, sent: str, kept: bool) -> None:
    sent_header = {"X-Request-Id": sent.encode().decode("latin-1")}
    for path, document in (("/v1/chat/completions", CHAT), ("/v1/models", None), ("/nowhere", None)):
        reply = node.ask(lane, document, path, sent_header, "GET" if document is None else "POST")
        id = reply.headers["x-request-id"]  # noqa: A001
        assert (id == sent) is kept
        assert id.isascii()
        assert id


def test_own_headers_and_what_is_dropped(node: Served, lane: str) -> None:
    spoofed = {
        "X-Llamesh-Node": "evil",
        "X-Llamesh-Else": "evil",
        "X-Llama-Mesh-Hops": "1",
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Allow-Credentials": "true",
        "X-Request-Id": "evil",
        "X-Passes": "yes",
    }
    for stream in (False, True):
        reply = node.ask(lane, {**CHAT, "stream": stream, "fake": {"headers": spoofed}})
        assert reply.headers["x-llamesh-node"] == "node-a"
        assert reply.headers["x-llamesh-profile"] == "m:default"
        assert reply.headers["x-llamesh-queue-ms"].isdigit()
        assert reply.headers["x-llamesh-affinity"] == "off"
        assert reply.headers["x-passes"] == "yes"
        assert reply.headers["x-request-id"] != "evil"
        assert "x-llamesh-else" not in reply.headers
        assert not [name for name in reply.headers if name.startswith(("access-control-", "x-llama-mesh-"))]
        assert (reply.headers.get("x-accel-buffering") == "no") is stream
        assert "llama.cpp" not in str(reply.headers)


def test_the_child_sees_the_body_and_no_keys(node: Served, lane: str) -> None:
    body = b' { "model":"m", "x": "\xc3\xa4", "fake": {"echo": true}, "n": 1.50 } '
    sent = {
        "Authorization": "Bearer secret-key",
        "X-Api-Key": "secret-key",
        "Cookie": "secret-key",
        "Content-Type": "application/json",
        "Origin": "https://evil.example",
        "X-Llamesh-Attempt": "9",
        "X-Session-Id": "s1",
        "X-Conversation-Id": "c1",  # llama-server would keep the answer for whoever names it
        "X-Request-Id": "mine",
    }
    reply = node.ask(lane, body, "/v1/completions?a=b%20c", sent)
    head, _, echoed = reply.body.partition(b"\r\n\r\n")
    assert echoed == body
    assert head.startswith(b"POST /v1/completions?a=b%20c HTTP/1.1\r\n")
    lines = head.lower()
    assert b"secret-key" not in reply.body
    assert b"evil" not in lines
    assert b"x-llamesh" not in lines
    assert b"x-session-id: s1" in lines
    assert b"x-conversation-id" not in lines
    assert b"x-request-id: mine" in lines
    assert lines.count(b"content-length:") == 1
