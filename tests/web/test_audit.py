"""The audit file of a real node: a line for each request and act by every lane, and never a key or a word."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.web.raw import Cut, Http1, Http2, post
from tests.web.served import Served, served

PROMPT = "purple-elephants-on-the-moon"
CHAT = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
KEYS = {"plain": "plain-key-5a1", "admin": "admin-key-7f2", "wrong": "wrong-key-9c3"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that asks for keys, and writes down who uses them."""
    directory = tmp_path_factory.mktemp("written")
    config = {
        "auth": {"enabled": True, "allowed_keys": [KEYS["plain"]], "admin_keys": [KEYS["admin"]]},
        "http": {"request_body_limit_bytes": 100_000},
        "audit": {"enabled": True, "directory": str(directory / "audits")},
    }
    models = {"m": {"slots": 2}, "dies": {"launches": [{"die_after_requests": 0}] * 2}}
    with served(directory, models, config) as running:
        yield running


def audited(node: Served) -> list[dict[str, Any]]:
    path: Path = node.directory / "audits" / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def wait_line(node: Served, **fields: Any) -> dict[str, Any]:
    """The one line that has these fields."""

    def look() -> list[dict[str, Any]]:
        return [line for line in audited(node) if all(line.get(k) == v for k, v in fields.items())]

    [found] = node.wait(look, f"an audit line with {fields}")
    return found


def key(name: str, id: str) -> dict[str, str]:  # noqa: A002
    return {"Authorization": f"Bearer {KEYS[name]}", "X-Request-Id": id}


def test_a_request(written: Served, lane: str) -> None:
    assert written.ask(lane, CHAT, headers=key("plain", f"asked-{lane}")).status == 200
    line = wait_line(written, request_id=f"asked-{lane}")
    assert (line["what"], line["path"], line["model"]) == ("request", "/v1/chat/completions", "m:default")
    assert (line["status"], line["outcome"], line["address"]) == (200, "ok", "127.0.0.1")
    assert line["node"] == line["served_by"] != ""
    assert line["prompt_tokens"] > 0
    assert line["completion_tokens"] > 0
    assert line["ms"] > 0


@pytest.mark.parametrize(
    ("name", "status", "outcome"), [("wrong", 401, "authentication_error"), ("", 401, "authentication_error")]
)
def test_a_request_with_a_wrong_key(written: Served, lane: str, name: str, status: int, outcome: str) -> None:
    id = f"refused-{lane}-{name}"  # noqa: A001
    headers = key(name, id) if name else {"X-Request-Id": id}
    assert written.ask(lane, CHAT, headers=headers).status == status
    line = wait_line(written, request_id=id)
    assert (line["what"], line["key"], line["status"], line["outcome"]) == ("request", "", status, outcome)
    assert line["address"] == "127.0.0.1"
    assert "key" in line["reason"]


def test_requests_that_come_to_nothing(written: Served, lane: str) -> None:
    wishes: list[tuple[str, Any, dict[str, str], str]] = [
        ("unknown", {"model": "nobody"}, {}, "model_not_found"),
        ("nojson", b"{", {}, "invalid_request_error"),
        ("hops", CHAT, {"X-Llama-Mesh-Hops": "99"}, "invalid_request_error"),
        ("large", b" " * 100_001, {}, "request_too_large"),
    ]
    for what, document, more, outcome in wishes:
        id = f"{what}-{lane}"  # noqa: A001
        assert written.ask(lane, document, headers=key("plain", id) | more).status >= 400
        line = wait_line(written, request_id=id)
        assert line["outcome"] == outcome
        assert line["completion_tokens"] == 0


def test_a_child_that_breaks(written: Served) -> None:
    reply = written.ask("fast", {**CHAT, "model": "dies"}, headers=key("plain", "broke"))
    assert reply.status == 502
    line = wait_line(written, request_id="broke")
    assert (line["outcome"], line["reason"], line["model"]) == ("upstream_error", "", "dies:default")


def test_acts(written: Served, lane: str) -> None:
    asked: list[tuple[str, str, Any, int, str]] = [
        ("admin", "/admin/prewarm", {"model": "m"}, 200, "ok"),
        ("admin", "/admin/prewarm", {"model": "nobody"}, 404, "model_not_found"),
        ("admin", "/admin/unload", b"{", 400, "invalid_request_error"),
        ("admin", "/admin/cancel", {"request_id": "nothing"}, 404, "not_found"),
        ("plain", "/admin/drain", {}, 403, "forbidden"),
        ("wrong", "/admin/drain", {}, 401, "authentication_error"),
        ("admin", "/upstream/m/tokenize", {"content": "x"}, 200, "ok"),
        ("plain", "/upstream/m/tokenize", {"content": "x"}, 403, "forbidden"),
    ]
    for number, (name, path, document, status, outcome) in enumerate(asked):
        id = f"act-{lane}-{number}"  # noqa: A001
        reply = written.ask(lane, document, path, key(name, id))
        assert reply.status == status, (path, reply.body)
        line = wait_line(written, request_id=id)
        assert (line["what"], line["path"], line["status"], line["outcome"]) == (
            "admin",
            path,
            status,
            outcome,
        )
        assert line["address"] == "127.0.0.1"
        named = document.get("model", "") if isinstance(document, dict) else ""
        assert line["model"] in (named, "m:default" if "/upstream/" in path and status == 200 else named)
        assert line["about"] == ("nothing" if path == "/admin/cancel" else "")
    assert written.ask(lane, None, "/admin/builds", key("admin", f"look-{lane}"), "GET").status == 200
    assert written.ask(lane, None, "/admin/builds", key("plain", f"peep-{lane}"), "GET").status == 403
    wait_line(written, request_id=f"peep-{lane}")
    assert not [line for line in audited(written) if line["request_id"] == f"look-{lane}"], (
        "looking is no act"
    )


def test_a_client_that_leaves(written: Served) -> None:
    wish = {**CHAT, "stream": True, "fake": {"token_delay": 0.05, "tokens": 2000}}
    lines = [f"{name}: {value}" for name, value in key("plain", "left").items()]
    with Http1(written.port) as client:
        client.send(post(wish, "/v1/chat/completions", *lines))
        client.until(b"data: ")
    line = wait_line(written, request_id="left")
    assert (line["outcome"], line["address"]) == ("cancelled", "127.0.0.1")


NEWLINES = ["bad\r\nX-Forged: yes", "bad\nid", "bad\rid", "bad\x00id", '{"what": "admin"}', "\u2028", "a b"]


@pytest.mark.parametrize("id", NEWLINES)
def test_no_header_forges_a_line(written: Served, id: str) -> None:  # noqa: A002
    """A newline in a header is another header, or no request at all."""
    before = len(audited(written))
    with Http1(written.port) as client:
        bearer = f"Authorization: Bearer {KEYS['plain']}"
        client.send(
            post(CHAT, "/v1/chat/completions", bearer, "X-Request-Id: " + id.encode().decode("latin-1"))
        )
        reply = client.answer()
    assert reply.status in (200, 400)
    with Http1(written.port) as client:
        client.send(post(CHAT, "/v1/chat/completions", "X-Request-Id: end\r\n\tfolded"))
        client.answer()
    written.ask("fast", CHAT, headers=key("plain", f"after-{NEWLINES.index(id)}"))
    wait_line(written, request_id=f"after-{NEWLINES.index(id)}")
    new = audited(written)[before:]
    assert {line["what"] for line in new} == {"request"}
    assert all(line["request_id"].isprintable() and " " not in line["request_id"] for line in new)
    said = [entry for entry in written.events if "time" not in entry]
    assert said == [], "every line of the log is one of the node's own"


@pytest.mark.parametrize("value", ["bad\nid", "bad\r\nid", "bad\x00id"])
def test_no_header_forges_a_line_by_http_2(written: Served, value: str) -> None:
    """There a header could hold a newline; such a request ends its connection."""
    before = len(audited(written))
    fields = [("authorization", f"Bearer {KEYS['plain']}"), ("x-request-id", value)]
    with Http2(written.port, unchecked=True) as two, contextlib.suppress(Cut, ConnectionError):
        reply = two.answer(two.start("POST", "/v1/chat/completions", fields, json.dumps(CHAT).encode()))
        assert reply.status == 400
    id = f"two-{value.encode().hex()}"  # noqa: A001
    written.ask("fast", CHAT, headers=key("plain", id))
    wait_line(written, request_id=id)
    assert [line["request_id"] for line in audited(written)[before:]] == [id]
    assert [entry for entry in written.events if "time" not in entry] == []


def test_neither_keys_nor_words(written: Served) -> None:
    """Last in this file: all of the above is in it."""
    written.ask("fast", CHAT, headers=key("plain", "the-last"))
    wait_line(written, request_id="the-last")
    text = (written.directory / "audits" / "audit.jsonl").read_text()
    assert PROMPT not in text
    assert not [value for value in KEYS.values() if value in text]
    assert "t0 t1" not in text
    assert (written.directory / "audits" / "audit.jsonl").stat().st_mode & 0o777 == 0o600
