"""The state of a real node: its schema, what it says of requests and troubles, and who may see it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from llamesh.web.state_schema import Document, Request
from tests.end_to_end.cookbooks import CHAT, chat, cookbook, error_of, profile
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS, Node, running_node

STATE = "/api/v1/state"


async def state_of(node: Node) -> dict[str, Any]:
    """The document, which must have all members that are promised, and no other."""
    reply = await node.client.get(STATE)
    assert reply.status_code == 200, reply.text
    document: dict[str, Any] = reply.json()
    # Strictly decoded and encoded again it is the same: nothing is missing, and nothing is unheard of.
    assert json.loads(msgspec.json.encode(msgspec.json.decode(reply.content, type=Document))) == document
    return document


async def wait_state(node: Node, condition: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """Look until the document is so."""
    document: dict[str, Any] = {}
    with trio.move_on_after(PATIENCE_SECONDS):
        while True:
            document = await state_of(node)
            if condition(document):
                return document
            await trio.sleep(POLL_SECONDS)
    raise AssertionError({name: value for name, value in document.items() if name != "history"})


def fakes(directory: Path, **models: dict[str, Any]) -> dict[str, Any]:
    """A cookbook of fakes; `profile` are members of the profile."""
    entries = {}
    for name, told in models.items():
        more = told.pop("profile", {})
        entries[name] = profile(fake_profile_file(directory, name, **told), **more)
    return cookbook(**entries)


@contextlib.asynccontextmanager
async def asking(node: Node, id: str, model: str = "m", **more: Any) -> AsyncIterator[dict[str, Any]]:  # noqa: A002
    """A chat that is under way in the background; what became of it is in the result afterwards."""
    outcome: dict[str, Any] = {}

    async def ask() -> None:
        try:
            reply = await node.client.post(CHAT, json=chat(model, **more), headers={"x-request-id": id})
            outcome["status"], outcome["reply"] = reply.status_code, reply
        except httpx.HTTPError as error:
            outcome["broken"] = error

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        yield outcome


async def test_an_idle_node(tmp_path: Path) -> None:
    missing = profile(tmp_path / "nowhere.gguf")
    recipes = fakes(tmp_path, m={})
    recipes["models"].append({"name": "gone", "profiles": [missing]})
    recipes["models"].append({"name": "listed", "profiles": [{**missing, "max_instances": 0}]})
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        document = await wait_state(node, lambda d: d["models"][2]["nodes"]["node-a"]["state"] == "fits")
        assert [document[name] for name in ("schema", "node_id")] == [1, "node-a"]
        [own] = document["nodes"]
        assert (own["self"], own["ready"], own["link"], own["queue"], own["running"]) == (
            True,
            True,
            None,
            0,
            0,
        )
        assert own["memory"]["ram"]["total"] > own["memory"]["ram"]["free"] > 0
        states = {model["name"]: model["nodes"]["node-a"]["state"] for model in document["models"]}
        assert states == {"m": "fits", "gone": "missing", "listed": "missing"} or states["listed"] == "never"
        assert document["instances"] == document["requests"] == document["attention"] == []
        assert {len(values) for values in document["history"]["series"].values()} == {360}


async def test_a_request_from_its_start_to_its_record(tmp_path: Path) -> None:
    load, go = tmp_path / "load", tmp_path / "go"
    recipes = fakes(tmp_path, m={"ready_when": str(load), "slots": 1, "gate": str(go), "gate_after": 2})
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        async with asking(node, "tea/1", stream=True, tokens=6) as outcome:
            document = await wait_state(node, lambda d: d["requests"])
            document = await wait_state(node, lambda d: d["requests"][0]["phase"] == "loading")
            [one] = document["requests"]
            assert (one["id"], one["node"], one["via"]) == ("tea/1", "node-a", ["node-a"])
            assert "loading m:default" in one["waiting_for"]
            assert document["models"][0]["nodes"]["node-a"]["state"] == "loading"
            load.touch()
            document = await wait_state(node, lambda d: d["requests"] and d["requests"][0]["tokens"])
            [one] = document["requests"]
            assert (one["phase"], one["served_by"], one["instance"]) == ("decode", "node-a", "m:default#1")
            assert one["first_token_ms"] >= one["queue_ms"] if one["queue_ms"] else one["first_token_ms"] > 0
            [child] = document["instances"]
            assert (child["state"], child["busy"], child["slots"], child["node"]) == ("ready", 1, 1, "node-a")
            assert document["nodes"][0]["running"] == 1
            go.touch()
        assert outcome["status"] == 200
        record = (await node.client.get("/api/v1/requests/tea/1")).json()
        assert (record["phase"], record["status"], record["error"], record["tokens"]) == (
            "done",
            200,
            None,
            6,
        )
        assert record["prompt_tokens"] > 0
        assert record["ms"] >= record["queue_ms"] > 0
        assert [one["seen_by"] for one in record["records"]] == ["node-a"]
        assert "hi" not in {str(value) for value in record.values()}
        [listed] = (await node.client.get("/api/v1/requests")).json()["requests"]
        msgspec.convert(listed, Request)
        assert listed["id"] == "tea/1"
        said = [one["event"] for one in (await node.client.get("/api/v1/events")).json()["events"]]
        assert said[-2:] == ["starting", "ready"]


async def test_lists_can_be_narrowed_and_wrong_questions_are_refused(tmp_path: Path) -> None:
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        for number in range(3):
            async with asking(node, f"good-{number}"):
                pass
        async with asking(node, "bad", model="no such model"):
            pass

        async def ids(query: str) -> list[str]:
            reply = await node.client.get(f"/api/v1/requests?{query}")
            return [one["id"] for one in reply.json()["requests"]]

        assert await ids("") == ["bad", "good-2", "good-1", "good-0"]
        assert await ids("limit=2") == ["bad", "good-2"]
        assert await ids("model=m:default") == ["good-2", "good-1", "good-0"]
        assert await ids("failed=1") == ["bad"]
        record = (await node.client.get("/api/v1/requests/bad")).json()
        assert (record["status"], record["error"], record["model"]) == (404, "model_not_found", None)
        assert "no such model" in record["message"]
        events = (await node.client.get("/api/v1/events?limit=1")).json()["events"]
        assert len(events) == 1
        assert (await node.client.get(f"/api/v1/events?after={events[0]['id']}")).json() == {"events": []}
        for wrong in ("/api/v1/requests?limit=x", "/api/v1/requests?limit=-1", "/api/v1/events?after=1e3"):
            reply = await node.client.get(wrong)
            assert (reply.status_code, error_of(reply)["type"]) == (400, "invalid_request_error"), wrong
        reply = await node.client.get("/api/v1/requests/unknown")
        assert (reply.status_code, error_of(reply)["type"]) == (404, "not_found")
        reply = await node.client.post(STATE)
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        reply = await node.client.post("/api/v1/state/stream")
        assert (reply.status_code, reply.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize("phase", ["loading", "queued", "prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_operator_ends_a_request_wherever_it_is(tmp_path: Path, phase: str, stream: bool) -> None:
    """The client hears it, the slot is free, and the next request is served."""
    # llama-server goes on with a whole answer that nobody wants any more, and the slot is busy until then.
    later, go = tmp_path / "later", tmp_path / "go"
    never = str(later)
    told: dict[str, Any] = {"slots": 1}
    if phase == "loading":
        told |= {"launches": [{"ready_when": str(go)}]}
    recipes = fakes(tmp_path, m=told)
    fake = {"head_gate": never} if phase in ("prefill", "queued") else {"gate": never, "gate_after": 2}
    if phase == "decode" and not stream:
        fake = {"head_gate": never}  # nothing of a whole answer comes before its end
    async with (
        running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node,
        trio.open_nursery() as clients,
    ):
        if phase == "queued":

            async def first() -> None:
                async with asking(node, "first", fake=fake):
                    pass

            clients.start_soon(first)
            await wait_state(node, lambda d: [one["phase"] for one in d["requests"]] == ["prefill"])
        wanted = "prefill" if phase == "decode" and not stream else phase
        async with asking(node, "it", stream=stream, fake=fake) as outcome:
            await wait_state(
                node, lambda d: any(r["id"] == "it" and r["phase"] == wanted for r in d["requests"])
            )
            if phase == "decode" and stream:
                await wait_state(node, lambda d: any(r["id"] == "it" and r["tokens"] for r in d["requests"]))
            reply = await node.client.post("/admin/cancel", json={"request_id": "it"})
            assert (reply.status_code, reply.json()) == (200, {"cancelled": "it", "node": "node-a"})
        if phase == "decode" and stream:
            assert isinstance(outcome["broken"], httpx.RemoteProtocolError)
        else:
            assert outcome["status"] == 499
            error = error_of(outcome["reply"])
            assert error["type"] == "cancelled_by_operator"
            assert "node-a" in error["message"]
            assert outcome["reply"].headers["x-request-id"] == "it"
        record = (await node.client.get("/api/v1/requests/it")).json()
        assert (record["phase"], record["error"]) == ("done", "cancelled_by_operator")
        again = await node.client.post("/admin/cancel", json={"request_id": "it"})
        assert (again.status_code, error_of(again)["type"]) == (404, "not_found")
        if phase == "queued":
            await node.client.post("/admin/cancel", json={"request_id": "first"})
        go.touch()
        later.touch()
        async with asking(node, "next") as following:
            pass
        assert following["status"] == 200
        await wait_state(node, lambda d: not d["requests"] and d["nodes"][0]["running"] == 0)


@pytest.mark.parametrize("body", [{}, {"request_id": None}, {"request_id": ""}, {"request_id": 7}, []])
async def test_a_cancel_that_names_nothing(tmp_path: Path, body: Any) -> None:
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        reply = await node.client.post("/admin/cancel", json=body)
        assert (reply.status_code, error_of(reply)["type"]) == (400, "invalid_request_error")


async def test_what_needs_attention(tmp_path: Path) -> None:
    """Each trouble is told with the line that says why, and is gone when it is mended."""
    fails = {"exit_at_start": {"code": 1, "lines": ["loading", "error: invalid magic characters", "bye"]}}
    full = {"exit_at_start": {"code": 1, "lines": ["cudaMalloc failed: out of memory"]}}
    gate = str(tmp_path / "never")
    recipes = fakes(
        tmp_path,
        bad=fails,
        big=full,
        m={"slots": 1, "head_gate": gate, "profile": {"max_queue_size": 1}},
    )
    async with running_node(
        tmp_path, recipes, {"listen_addr": "0.0.0.0:0"}, binary_path=FAKE_LLAMA_SERVER
    ) as node:
        node.client.base_url = httpx.URL(f"http://127.0.0.1:{node.port}")
        [found] = (await state_of(node))["attention"]
        assert (found["what"], found["level"]) == ("no_auth", "warning")
        assert "auth.enabled" in found["fix"]
        for model in ("bad", "big"):
            assert (await node.client.post(CHAT, json=chat(model))).status_code == 503
        document = await state_of(node)
        troubles = {one["what"]: one for one in document["attention"]}
        assert set(troubles) == {"no_auth", "load_failed", "out_of_memory"}
        assert troubles["load_failed"]["text"].endswith("error: invalid magic characters")
        assert "cudaMalloc failed: out of memory" in troubles["out_of_memory"]["text"]
        assert document["attention"][0]["level"] == "error"
        cells = {model["name"]: model["nodes"]["node-a"]["state"] for model in document["models"]}
        assert (cells["bad"], cells["big"]) == ("failed", "failed")
        async with asking(node, "one"), asking(node, "two"):
            document = await wait_state(
                node, lambda d: any(c["what"] == "queue_full" for c in d["attention"])
            )
            [limit] = [one for one in document["attention"] if one["what"] == "queue_full"]
            assert "m:default" in limit["text"]
            for id in ("one", "two"):  # noqa: A001
                await node.client.post("/admin/cancel", json={"request_id": id})
        config = tmp_path / "config.yaml"
        good = config.read_text()
        config.write_text(good.replace('"node_id"', '"nod_id"'))
        document = await wait_state(node, lambda d: any(c["what"] == "config" for c in d["attention"]))
        [mistake] = [one for one in document["attention"] if one["what"] == "config"]
        assert "nod_id" in mistake["text"]
        assert str(tmp_path) not in json.dumps(document["attention"])
        config.write_text(good)
        await wait_state(node, lambda d: all(c["what"] != "config" for c in d["attention"]))


async def test_the_stream_follows(tmp_path: Path) -> None:
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        async with node.client.stream("GET", f"{STATE}/stream") as reply:
            assert reply.headers["content-type"] == "text/event-stream"
            async with lines_of(reply) as lines:
                event, data, last = await next_event(lines)
                assert event == "snapshot"
                msgspec.convert(data, Document)
                async with asking(node, "x"):
                    pass
                while event != "change" or not data.get("instances"):
                    event, data, last = await next_event(lines)
                assert data["instances"][0]["id"] == "m:default#1"
        again = {"last-event-id": last}
        async with (
            node.client.stream("GET", f"{STATE}/stream", headers=again) as reply,
            lines_of(reply) as lines,
        ):
            async with asking(node, "y"):
                pass
            event, data, _ = await next_event(lines)
            assert event == "change"


@contextlib.asynccontextmanager
async def lines_of(reply: httpx.Response) -> AsyncIterator[AsyncIterator[str]]:
    """The lines of a stream; at the end of the block nothing more is read of it."""
    lines = reply.aiter_lines()
    try:
        yield lines
    finally:
        # httpx is a tower of generators that only an end or an exception from below takes down.
        with trio.CancelScope() as scope, contextlib.suppress(httpx.HTTPError):
            scope.cancel()
            async for _ in lines:
                pass


async def next_event(lines: AsyncIterator[str]) -> tuple[str, dict[str, Any], str]:
    """The next event of a stream: its name, data and id."""
    fields: dict[str, str] = {}
    with trio.fail_after(PATIENCE_SECONDS):
        while (line := await anext(lines)) or not fields:
            name, _, value = line.partition(": ")
            fields[name] = value
    return fields["event"], json.loads(fields["data"]), fields["id"]


async def test_many_viewers_are_borne_and_more_are_refused(tmp_path: Path) -> None:
    """500 look, a thousand don't get in, and requests are answered all the while."""
    async with running_node(tmp_path, fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        request = b"GET /api/v1/state/stream HTTP/1.1\r\nhost: x\r\n\r\n"
        heads: list[bytes] = []
        streams: list[trio.SocketStream] = []

        async def look() -> None:
            stream = await trio.open_tcp_stream("127.0.0.1", node.port)
            streams.append(stream)
            await stream.send_all(request)
            data = b""
            while b"\r\n\r\n" not in data:
                more = await stream.receive_some()
                assert more, data
                data += more
            heads.append(data)

        try:
            for _ in range(20):
                async with trio.open_nursery() as nursery:
                    for _ in range(50):
                        nursery.start_soon(look)
            statuses = [head.split(b" ", 2)[1] for head in heads]
            assert statuses.count(b"200") == 512
            assert statuses.count(b"503") == len(statuses) - 512
            refused = next(head for head in heads if head.startswith(b"HTTP/1.1 503"))
            assert b"retry-after: 30" in refused.lower()
            assert (await node.client.post(CHAT, json=chat("m"))).status_code == 200
        finally:
            for stream in streams:
                await trio.aclose_forcefully(stream)
        async with node.client.stream("GET", f"{STATE}/stream") as reply:
            assert reply.status_code in (200, 503)

        async def fits() -> bool:
            async with node.client.stream("GET", f"{STATE}/stream") as reply:
                return reply.status_code == 200

        with trio.fail_after(PATIENCE_SECONDS):
            while not await fits():
                await trio.sleep(POLL_SECONDS)


async def test_who_may_see_it_and_who_may_act(tmp_path: Path) -> None:
    config = {"auth": {"enabled": True, "allowed_keys": ["plain-key"], "admin_keys": ["admin-key"]}}
    async with running_node(tmp_path, fakes(tmp_path, m={}), config, binary_path=FAKE_LLAMA_SERVER) as node:
        pages = (STATE, f"{STATE}/stream", "/api/v1/requests", "/api/v1/requests/x", "/api/v1/events",
                 "/logs/stream", "/logs/stream/m", "/props?model=m", "/slots?model=m", "/metrics?model=m",
                 "/upstream/m/health")  # fmt: skip
        for page in pages:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic !!"}):
                reply = await node.client.get(page, headers=headers)
                assert (reply.status_code, error_of(reply)["type"]) == (401, "authentication_error"), page
        key, admin = {"authorization": "Bearer plain-key"}, {"x-api-key": "admin-key"}
        assert (await node.client.get(STATE, headers=key)).status_code == 200
        for headers, status in ((key, 403), (admin, 404), ({}, 401)):
            reply = await node.client.post("/admin/cancel", json={"request_id": "x"}, headers=headers)
            assert reply.status_code == status
            reply = await node.client.post("/upstream/m/nothing", json={}, headers=headers)
            assert reply.status_code == (status if status != 404 else 200)
        basic = httpx.BasicAuth("any name", "plain-key")
        assert (await node.client.get("/upstream/m/health", auth=basic)).status_code == 200
        reply = await node.client.get("/upstream/m/health")
        assert "Basic" in reply.headers["www-authenticate"] or "Bearer" in reply.headers["www-authenticate"]
        assert any("Basic" in value for value in reply.headers.get_list("www-authenticate"))
    async with running_node(tmp_path / "open", fakes(tmp_path, m={}), binary_path=FAKE_LLAMA_SERVER) as node:
        evil = {"origin": "https://evil.example"}
        reply = await node.client.post("/admin/cancel", json={"request_id": "x"}, headers=evil)
        assert reply.status_code == 403
        reply = await node.client.get("/upstream/m/health", headers={"sec-fetch-site": "cross-site"})
        assert reply.status_code == 403


async def test_an_instance_spoken_to_directly(tmp_path: Path) -> None:
    recipes = fakes(tmp_path, m={"slots": 1})
    recipes["models"].append({**recipes["models"][0], "name": "or/g"})
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        client = node.client
        for page in ("/slots?model=m", "/metrics?model=m", "/props?model=m&autoload=false"):
            reply = await client.get(page)
            assert (reply.status_code, error_of(reply)["type"]) == (503, "no_capacity"), page
        reply = await client.get("/upstream/m/health")  # starts it
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
        assert reply.headers["x-llamesh-instance"] == "m:default#1"
        assert "content-security-policy" not in reply.headers
        assert (await client.get("/props?model=m")).json()["total_slots"] == 1
        assert isinstance((await client.get("/slots?model=m")).json(), list)
        reply = await client.get("/upstream/or/g/health")
        assert reply.headers["x-llamesh-instance"] == "or/g:default#2"
        reply = await client.get("/upstream/m", follow_redirects=False)
        assert (reply.status_code, reply.headers["location"]) == (307, "m/")
        # What isn't known to the fake is echoed: the child sees neither our keys nor who asks.
        reply = await client.post(
            "/upstream/m/lora-adapters?x=1",
            content=b"[1]",
            headers={
                "cookie": "secret",
                "x-api-key": "secret",
                "x-conversation-id": "secret",
                "x-mine": "kept",
                "x-llamesh-via": "b",
            },
        )
        seen = reply.text
        assert "POST /lora-adapters?x=1" in seen
        assert "x-mine: kept" in seen.lower()
        assert "secret" not in seen
        assert "x-llamesh-via" not in seen.lower()
        assert "[1]" in seen
        reply = await client.post("/upstream/m" + CHAT, json=chat("m", stream=True))
        assert reply.text.rstrip().endswith("data: [DONE]")
        assert (await client.head("/upstream/m/health")).content == b""
        for path in ("tools", "TOOLS", "%74ools", "%2574ools", "a/tools", "cors-proxy?url=x", "/tools",
                     "tools;x", "cors-proxy/x", "a\\tools"):  # fmt: skip
            reply = await client.get(f"/upstream/m/{path}")
            assert reply.status_code == 404, path
        for path in ("%2e%2e/tools", "..%2ftools", "%252e%252e%252fx", "a%0d%0ab"):
            reply = await client.get(f"/upstream/m/{path}")
            assert reply.status_code in (400, 404), path
        reply = await client.get("/upstream/unknown/health")
        assert (reply.status_code, error_of(reply)["type"]) == (404, "model_not_found")


async def test_writing_to_an_instance_waits_for_a_slot_and_gives_it_back(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with running_node(tmp_path, fakes(tmp_path, m={"slots": 1}), binary_path=FAKE_LLAMA_SERVER) as node:
        async with asking(node, "one", fake={"head_gate": str(go)}), trio.open_nursery() as nursery:
            await wait_state(node, lambda d: [r["phase"] for r in d["requests"]] == ["prefill"])
            done: list[int] = []

            async def write() -> None:
                done.append((await node.client.post("/upstream/m" + CHAT, json=chat("m"))).status_code)

            nursery.start_soon(write)
            await wait_state(node, lambda d: d["nodes"][0]["queue"] == 1)
            assert done == []
            go.touch()
        assert done == [200]
        await wait_state(node, lambda d: d["nodes"][0]["running"] == 0)


async def test_logs_show_what_was_and_follow(tmp_path: Path) -> None:
    recipes = fakes(
        tmp_path,
        m={"lines": ["hello <b>", "\x1b[31mred"]},
        bad={"exit_at_start": {"code": 1, "lines": ["why"]}},
    )
    async with running_node(tmp_path, recipes, binary_path=FAKE_LLAMA_SERVER) as node:
        await node.client.post(CHAT, json=chat("m"))
        async with node.client.stream("GET", "/logs/stream/m") as reply, lines_of(reply) as lines:
            assert reply.headers["content-type"] == "text/plain; charset=utf-8"
            assert reply.headers["x-content-type-options"] == "nosniff"
            with trio.fail_after(PATIENCE_SECONDS):
                assert await anext(lines) == "hello <b>"
                assert await anext(lines) == "red"
                for _ in range(2):
                    while await anext(lines) != "request POST /v1/chat/completions":
                        pass
                    await node.client.post(CHAT, json=chat("m"))
        await node.client.post(CHAT, json=chat("bad"))
        # It has ended, and its last words are still there.
        async with node.client.stream("GET", "/logs/stream?format=sse") as reply, lines_of(reply) as lines:
            assert reply.headers["content-type"] == "text/event-stream"
            said = {"line": "", "instance": ""}
            with trio.fail_after(PATIENCE_SECONDS):
                while said["line"] != "why":
                    if line := await anext(lines):
                        said = json.loads(line.removeprefix("data: "))
            assert said["instance"].startswith("bad:default#")
        reply = await node.client.get("/logs/stream/unknown")
        assert (reply.status_code, error_of(reply)["type"]) == (404, "model_not_found")
        reply = await node.client.get("/logs/stream/m?node=nobody")
        assert (reply.status_code, error_of(reply)["type"]) == (404, "not_found")
        # A number of lines, and an end.
        whole = await node.client.get("/logs/stream/m?follow=false")
        assert whole.text.startswith("hello <b>\nred\n")
        last = await node.client.get("/logs/stream/m?follow=false&lines=2")
        assert last.text.splitlines() == whole.text.splitlines()[-2:]
        assert (await node.client.get("/logs/stream/m?follow=false&lines=0")).text == ""
        reply = await node.client.get("/logs/stream/m?lines=-1")
        assert (reply.status_code, error_of(reply)["param"]) == (400, "lines")
