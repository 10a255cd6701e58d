"""What single keys may do, by every lane: models, limits, and who is told what."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.web.raw import Reply
from tests.web.served import LANES, Asking, Served, served

ADMIN = {"x-api-key": "boss"}


def limited(name: str, **limits: Any) -> list[dict[str, Any]]:
    """A key of that name for each lane, since each is used up."""
    return [{"name": f"{name}-{lane}", "key": f"{name}-{lane}", **limits} for lane in LANES]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("keys")
    keys = [
        "nameless",
        *limited("few", requests_per_minute=2),
        *limited("tokens", tokens_per_day=20),
        *limited("one", max_concurrent_requests=1),
        *limited("much", requests_per_minute=1000, requests_per_day=50, tokens_per_minute=5000),
        {"name": "picky", "key": "picky", "models": ["M", "*:quick"]},
    ]
    config = {
        "auth": {"enabled": True, "allowed_keys": keys, "admin_keys": [{"name": "Boss", "key": "boss"}]}
    }
    models: dict[str, dict[str, Any]] = {
        "m": {"slots": 4},
        "other": {"slots": 1},
        "n": {"profile": {"id": "quick"}},
        "slow": {"slots": 4},
    }
    with served(directory, models, config) as running:
        yield running


def ask(node: Served, lane: str, key: str, model: str = "m", path: str = "/v1/chat/completions") -> Reply:
    return node.ask(lane, {"model": model, "messages": []}, path, {"Authorization": f"Bearer {key}"})


def known(node: Served, name: str) -> dict[str, Any]:
    """What `/api/v1/keys` says of a key."""
    document = node.ask("fast", None, "/api/v1/keys", ADMIN, "GET").json()
    return next(one for one in document["keys"] if one["name"] == name)


def test_too_many_requests(node: Served, lane: str) -> None:
    key = f"few-{lane}"
    for left in (b"1", b"0"):
        reply = ask(node, lane, key)
        headers = reply.headers
        assert reply.status == 200
        assert headers["x-ratelimit-limit-requests"] == "2"
        assert headers["x-ratelimit-remaining-requests"] == left.decode()
        assert re.fullmatch(r"1m[0-5]s|[0-9]+s", headers["x-ratelimit-reset-requests"])
        assert "x-ratelimit-limit-tokens" not in headers
    for _ in range(2):
        refused = ask(node, lane, key)
        assert (refused.status, refused.error["type"]) == (429, "rate_limit_exceeded")
        assert refused.error["code"] == "rate_limit_exceeded"
        assert (
            f"the key {key} has used its requests_per_minute (2, over all nodes)" in refused.error["message"]
        )
        wait = int(refused.headers["retry-after"])
        assert 1 <= wait <= 65
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert ask(node, lane, "nameless").status == 200, "others go on"
    entry = known(node, key)
    assert entry["used"]["requests_per_minute"] == 2
    assert entry["here"]["refused"] == {"requests_per_minute": 2}
    node.wait(lambda: node.find("request", key=key, status=429, error="rate_limit_exceeded"), "its line")


def test_tokens_of_what_was_answered(node: Served, lane: str) -> None:
    key = f"tokens-{lane}"
    first = ask(node, lane, key)
    usage = first.json()["usage"]
    assert first.headers["x-ratelimit-remaining-tokens"] == "20"
    spent, answered = usage["prompt_tokens"] + usage["completion_tokens"], 1

    def is_counted() -> bool:
        return bool(known(node, key)["used"]["tokens_per_day"] == spent)

    while spent < 20:
        node.wait(is_counted, "the tokens")
        second = ask(node, lane, key)
        assert second.status == 200
        assert second.headers["x-ratelimit-remaining-tokens"] == str(20 - spent)
        spent += usage["prompt_tokens"] + usage["completion_tokens"]
        answered += 1
    node.wait(is_counted, "the tokens")
    refused = ask(node, lane, key)
    assert (refused.status, refused.error["type"]) == (429, "rate_limit_exceeded")
    assert "tokens_per_day" in refused.error["message"]
    assert 0 < int(refused.headers["retry-after"]) <= 86_400
    entry = known(node, key)
    assert entry["here"]["requests"] == answered
    assert entry["here"]["prompt_tokens"] + entry["here"]["tokens"] == spent


def test_a_cancelled_stream_counts_what_came(node: Served, lane: str, tmp_path_factory: Any) -> None:
    gate = tmp_path_factory.mktemp("gate") / "never"
    key = f"one-{lane}"
    body = {
        "model": "slow",
        "messages": [],
        "stream": True,
        "fake": {"tokens": 50, "gate": str(gate), "gate_after": 7},
    }
    with Asking(node, lane, body, headers={"x-api-key": key}) as asking:
        asking.until(b"t6 ")
        assert known(node, key)["here"]["running"] == 1
        refused = ask(node, lane, key)
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert "max_concurrent_requests allows (1)" in refused.error["message"]
    node.wait(lambda: known(node, key)["used"]["max_concurrent_requests"] == 0, "the end of it")
    entry = known(node, key)
    assert entry["here"]["tokens"] >= 7
    assert entry["used"]["tokens_per_minute"] == entry["here"]["tokens"] + entry["here"]["prompt_tokens"]
    assert ask(node, lane, key).status == 200


def test_the_tightest_limit_is_told(node: Served, lane: str) -> None:
    headers = ask(node, lane, f"much-{lane}").headers
    assert headers["x-ratelimit-limit-requests"] == "50"
    assert headers["x-ratelimit-remaining-requests"] == "49"
    assert headers["x-ratelimit-limit-tokens"] == "5000"
    assert re.fullmatch(r"(\d+h\d+m|\d+m)?\d+s", headers["x-ratelimit-reset-requests"])


def test_a_stream_tells_it_too(node: Served, lane: str) -> None:
    reply = node.ask(
        lane, {"model": "m", "messages": [], "stream": True}, headers={"x-api-key": f"much-{lane}"}
    )
    assert reply.headers["x-ratelimit-limit-requests"] == "50"


def test_without_limits_nothing_is_told(node: Served, lane: str) -> None:
    reply = ask(node, lane, "nameless")
    assert not [name for name in reply.headers if name.startswith("x-ratelimit")]


def test_models_that_a_key_may_not_use(node: Served, lane: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize", "/v1/messages", "/infill"):
        assert ask(node, lane, "picky", "m", path).status == 200, path
        refused = ask(node, lane, "picky", "OTHER", path)
        assert (refused.status, refused.error["type"]) == (403, "forbidden"), path
        assert "the key picky may not use other:default" in refused.error["message"]
        assert refused.error["param"] == "model"
    assert ask(node, lane, "picky", "n:quick").status == 200
    assert ask(node, lane, "picky", "nowhere").status == 404
    assert ask(node, lane, "boss", "other").status == 200


def test_only_those_are_listed(node: Served, lane: str) -> None:
    def listed(key: str) -> list[str]:
        reply = node.ask(lane, None, "/v1/models", {"x-api-key": key}, "GET")
        return [entry["id"] for entry in reply.json()["data"]]

    assert listed("picky") == ["m", "n:quick"]
    assert listed("nameless") == listed("boss") == ["m", "other", "n:quick", "slow"]
    for model, status in (("m", 200), ("other", 403), ("nowhere", 404)):
        assert node.ask(lane, None, f"/v1/models/{model}", {"x-api-key": "picky"}, "GET").status == status


@pytest.mark.parametrize("path", ["/upstream/{}/props", "/props?model={}", "/slots?model={}&autoload=true"])
def test_the_list_holds_for_what_is_asked_of_instances(node: Served, path: str) -> None:
    for model, status in (("m", 200), ("other", 403)):
        reply = node.ask("fast", None, path.format(model), {"x-api-key": "picky"}, "GET")
        assert reply.status == status, (path, reply.body)


def test_the_list_holds_for_logs(node: Served) -> None:
    for path in ("/logs/stream", "/logs/stream/other", "/logs/stream/other:default?node=elsewhere"):
        reply = node.ask("fast", None, path, {"x-api-key": "picky"}, "GET")
        assert (reply.status, reply.error["type"]) == (403, "forbidden"), path


def test_who_may_see_the_keys(node: Served, lane: str) -> None:
    assert node.ask(lane, None, "/api/v1/keys", {"x-api-key": "nameless"}, "GET").status == 403
    assert node.ask(lane, None, "/api/v1/keys", {}, "GET").status == 401
    reply = node.ask(lane, None, "/api/v1/keys", ADMIN, "GET")
    names = [one["name"] for one in reply.json()["keys"]]
    assert names[0] == "key-1"
    assert names[-2:] == ["picky", "Boss"]
    assert b"nameless" not in reply.body
    assert known(node, "Boss")["administers"]
    assert known(node, "picky") | {"here": 0} == {
        "name": "picky",
        "administers": False,
        "models": ["M", "*:quick"],
        "limits": {
            "requests_per_minute": None,
            "requests_per_day": None,
            "tokens_per_minute": None,
            "tokens_per_day": None,
            "max_concurrent_requests": None,
        },
        "used": None,
        "here": 0,
    }


def test_records_lines_and_metrics_say_who(node: Served, lane: str) -> None:
    reply = ask(node, lane, "nameless")
    id = reply.headers["x-request-id"]  # noqa: A001
    record = node.ask("fast", None, f"/api/v1/requests/{id}", ADMIN, "GET").json()
    assert record["key"] == "key-1"
    [line] = node.wait(lambda: node.find("request", request_id=id), "its line")
    assert line["key"] == "key-1"
    text = node.ask("fast", None, "/metrics", ADMIN, "GET").body.decode()
    requests = re.search(r'^llamesh_key_requests_total\{key="key-1"\} (\d+)', text, re.MULTILINE)
    assert requests is not None
    assert int(requests[1].split(".")[0]) >= 1
    assert 'llamesh_key_tokens_generated_total{key="key-1"}' in text
    assert 'llamesh_key_requests_running{key="key-1"}' in text
    said = "".join(map(str, node.events)) + text
    assert "nameless" not in said
