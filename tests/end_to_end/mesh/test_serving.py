"""A request that is served by another node than the one that was asked: the same answer, from afar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.end_to_end.cookbooks import cookbook, profile, shape, wait_document, wait_running
from tests.end_to_end.mesh.parts import NO_MODELS, fakes, stats, wait_stats
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import running_mesh


async def test_a_model_that_only_a_peer_has(
    tmp_path: Path, tiny_model: Path, engine_binary: Path | None
) -> None:
    """Listed, served whole and streamed on every path, with a real engine at the other end."""
    recipes = cookbook(
        tiny={"profiles": [profile(tiny_model), profile(tiny_model, id="quick")], "aliases": ["best"]},
        embed=profile(tiny_model, "--embedding --pooling mean -c 1024"),
        rerank=profile(tiny_model, "--reranking -c 1024"),
    )
    async with running_mesh(
        tmp_path, {"node-a": NO_MODELS, "node-b": recipes}, binary_path=engine_binary
    ) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        entry = await mesh.wait_listed("tiny", at="node-a", by="node-b")
        assert set(await a.models()) == set(await b.models()) == {"tiny", "tiny:quick", "embed", "rerank"}
        assert entry["metadata"]["source"] == "cluster"
        assert entry["metadata"]["advertised_by"] == "node-b"
        assert entry["metadata"]["cluster_url"].rstrip("/").endswith(str(b.node.port))
        assert (await a.get("/v1/models/tiny:quick"))["owned_by"] == "node-b"

        near, far = await b.ask("tiny", max_tokens=20), await a.ask("tiny", max_tokens=20)
        assert (near.status, far.status) == (200, 200)
        assert near.text == far.text
        assert shape(json.loads(near.body)) == shape(json.loads(far.body))
        assert (near.node, far.node) == ("node-b", "node-b")
        assert far.headers["x-llamesh-profile"] == "tiny:default"
        streamed = await a.ask("tiny", stream=True, max_tokens=20)
        assert streamed.text == far.text
        assert streamed.events[-1] == "[DONE]"
        assert streamed.headers["x-accel-buffering"] == "no"
        assert (await a.ask("BEST:Quick")).headers["x-llamesh-profile"] == "tiny:quick"

        for path, body in (
            ("/v1/embeddings", {"model": "embed", "input": ["one", "another"]}),
            ("/v1/rerank", {"model": "rerank", "query": "one", "documents": ["one", "another"]}),
            ("/tokenize", {"model": "tiny", "content": "so many words"}),
            ("/v1/completions", {"model": "tiny", "prompt": "once", "max_tokens": 3, "temperature": 0}),
            # What llama-server itself refuses passes byte for byte.
            ("/v1/chat/completions", {"model": "tiny", "messages": "not a list"}),
        ):
            here, there = [await member.node.client.post(path, json=body) for member in (b, a)]
            assert here.status_code == there.status_code, (path, there.text)
            assert shape(here.json()) == shape(there.json()), path
            assert there.headers["x-llamesh-node"] == "node-b"
        unknown = await a.ask("nobody")
        assert (unknown.status, unknown.error["type"]) == (404, "model_not_found")
        wrong = await a.node.client.post("/v1/embeddings", json={"model": "tiny", "input": "x"})
        assert wrong.status_code == 404

        # Counted where the client asked, and where it was served.
        asked, served = [await member.get("/metrics/json") for member in mesh]
        assert (asked["requests_total"], served["requests_total"]) == (10, 14)
        assert served["hashes"]["tiny:default"]["requests_total"] == 9
        assert a.node.children() == []


async def test_prewarm_reaches_a_peer(tmp_path: Path) -> None:
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(tmp_path / "b", m={}, only={}),
        "node-c": fakes(tmp_path / "c", m={}),
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("only", at="node-a", by="node-b")
        warmed = await a.node.client.post("/admin/prewarm", json={"model": "only"})
        assert (warmed.status_code, warmed.json()["status"]) == (200, "loaded"), warmed.text
        await b.node.wait_event("ready", instance="only:default#1")

        named = await a.node.client.post("/admin/prewarm", json={"model": "m", "node": "node-c"})
        assert named.status_code == 200, named.text
        await c.node.wait_event("ready", instance="m:default#1")
        assert {i["instance"] for i in (await b.get("/running"))["running"]} == {"only:default#1"}
        for body in ({"model": "only", "node": "node-c"}, {"model": "only", "node": "node-x"}):
            refused = await a.node.client.post("/admin/prewarm", json=body)
            assert refused.status_code in (400, 404), (body, refused.text)
        # What is warm is asked first, as soon as that is heard of.
        await wait_document(
            a.node, "/cluster/nodes", lambda d: d["nodes"]["node-c"]["loaded_models"] == ["m:default"]
        )
        assert (await a.ask("m")).node == "node-c"
        await wait_document(a.node, "/v1/models/only", lambda d: d["status"]["value"] == "loaded")


async def test_what_travels_and_what_stays(tmp_path: Path) -> None:
    """Request and session ids go along; client keys and what clients say about the mesh don't."""
    auth: dict[str, Any] = {"auth": {"enabled": True, "allowed_keys": ["key-of-the-client"]}}
    each = {"node-a": auth, "node-b": {"auth": {"enabled": True, "allowed_keys": ["key-of-another"]}}}
    # One that may not send anything on.
    each["node-c"] = {"max_hops": 0}
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={}), "node-c": NO_MODELS}
    async with running_mesh(tmp_path, cookbooks, each=each, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        for member, key in ((a, "key-of-the-client"), (b, "key-of-another")):
            member.node.client.headers["authorization"] = f"Bearer {key}"
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        headers = {
            "x-api-key": "key-of-the-client",
            "x-request-id": "the-request",
            "x-session-id": "the-session",
            "x-llamesh-via": "node-b",
            "x-llamesh-attempt": "7",
            "x-llamesh-max-wait-ms": "0",
            "x-llamesh-deadline-ms": "1",
        }
        for stream in (False, True):
            answer = await a.ask("m", headers=headers, stream=stream)
            assert (answer.status, answer.node) == (200, "node-b"), answer.body
            assert answer.headers["x-request-id"] == "the-request"
            got = (await stats(b, "m"))["last"]
            arrived = dict(got["headers"])
            assert "key-of-the-client" not in json.dumps(got)
            assert arrived["x-request-id"] == "the-request"
            assert arrived["x-session-id"] == "the-session"
            assert not [name for name in arrived if name.startswith(("x-llamesh-", "x-llama-mesh"))]
        for member in (a, b):
            await member.node.wait_event("request", request_id="the-request", status=200)
        assert (await a.ask("m", headers={"authorization": "Bearer key-of-another"})).status == 401

        for hops in ("many", "11", "-1"):
            refused = await a.ask("m", headers={"x-llama-mesh-hops": hops})
            assert refused.status == 400
        assert "Too many hops" in (await a.ask("m", headers={"x-llama-mesh-hops": "11"})).error["message"]
        await mesh.wait_listed("m", at="node-c", by="node-b")
        stuck = await c.ask("m")
        assert (stuck.status, stuck.node) == (503, "node-c")
        assert "max_hops" in stuck.error["message"]

        # The mesh's own routes are for nodes.
        for path in ("/mesh/gossip", "/mesh/probe", "/mesh/park", "/mesh/prewarm"):
            for method in ("GET", "POST"):
                reply = await a.node.client.request(method, path)
                assert reply.status_code == 404, (method, path, reply.text)


async def test_a_client_that_leaves_frees_the_far_slot(tmp_path: Path) -> None:
    gate = str(tmp_path / "never")
    behaviour = {"slots": 1, "gate": gate, "gate_after": 1}
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m=behaviour)}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        async with a.talking("m") as talk:
            assert await talk.word() == "t0 "
        await wait_stats(b, "m", lambda s: s["running"] == 0 and s["aborted"] == 1)
        assert (await a.ask("m", fake={"gate": ""})).status == 200

        # One that isn't streamed runs on over there; its slot is nobody's until it is done.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: a.ask("m"))
            await wait_stats(b, "m", lambda s: s["running"] == 1)
            nursery.cancel_scope.cancel()
        await wait_stats(b, "m", lambda s: s["aborted"] == 2)
        assert [i["busy"] for i in (await b.get("/running"))["running"]] == [1]
        Path(gate).touch()
        assert (await a.ask("m")).status == 200


async def test_a_stream_that_breaks_over_there_is_cut_here(tmp_path: Path) -> None:
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(
            tmp_path, cut={"cut_mid_stream": 2}, dies={"die_mid_stream": 2}, half={"cut_body": True}
        ),
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a = mesh["node-a"]
        await mesh.wait_joined()
        await mesh.wait_listed("cut", at="node-a", by="node-b")
        for model in ("cut", "dies"):
            async with a.talking(model) as talk:
                assert [await talk.word(), await talk.word()] == ["t0 ", "t1 "]
                with pytest.raises(httpx.RemoteProtocolError):
                    await talk.word()
        with pytest.raises(httpx.RemoteProtocolError):
            await a.ask("half")
        # The link is as good as before.
        assert (await a.ask("cut", fake={"cut_mid_stream": -1})).status == 200


async def test_who_is_busy_or_broken_passes_it_on(tmp_path: Path) -> None:
    """queue_full, draining, a start that fails: another node is asked instead."""
    gate = str(tmp_path / "gate")
    broken = {"exit_at_start": {"code": 1, "lines": ["no such thing"]}}
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(
            tmp_path / "b",
            entry={"max_queue_size": 1},
            full={"slots": 1, "head_gate": gate},
            drained={},
            broken=broken,
            refuses={"refuse": True},
        ),
        "node-c": NO_MODELS,
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("full", at="node-a", by="node-b")
        alone = await a.ask("broken")
        assert (alone.status, alone.error["type"]) == (503, "spawn_failures_exhausted")
        assert "node-b" in alone.error["message"]
        assert alone.headers["retry-after"] == "30"
        assert (await a.ask("drained")).node == "node-b"
        assert (await a.ask("full", fake={"head_gate": ""})).node == "node-b"

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(lambda: a.ask("full"))
            # One at work, one in the queue.
            await wait_running(b.node, 2)
            full = await a.ask("full")
            assert (full.status, full.error["type"], full.headers["retry-after"]) == (503, "queue_full", "5")

            # Somebody else who has them all.
            c.change(cookbook=fakes(tmp_path / "c", full={}, drained={}, broken={}, refuses={}))
            await c.restart()
            await mesh.wait_listed("broken", at="node-a", by="node-c")
            assert (await a.ask("full")).node == "node-c"
            Path(gate).touch()
        assert (await a.ask("broken")).node == "node-c"
        # What may be the request's own fault isn't tried on every node, nor more often than without a mesh.
        counts = []
        for entry in (b, a):
            refused = await entry.ask("refuses")
            assert (refused.status, refused.error["type"]) == (502, "upstream_error")
            counts.append((await stats(b, "refuses"))["requests"])
        assert counts[1] <= 2 * counts[0]
        assert (await b.node.client.post("/admin/drain", json={})).status_code == 200
        assert [(await a.ask("drained")).node for _ in range(3)] == ["node-c"] * 3
        assert (await b.node.client.post("/admin/undrain", json={})).status_code == 200


async def test_bursts_spread_and_who_waits_too_long_goes_elsewhere(tmp_path: Path) -> None:
    names = ["node-a", "node-b", "node-c"]
    gate = tmp_path / "gate"
    # Answers of slow take long enough that waiting for one costs more than the way to another node.
    slow = {"slots": 1, "token_delay": 0.02, "head_gate": str(gate)}
    quick = {"slots": 1, "head_gate": str(gate)}
    cookbooks = {name: fakes(tmp_path / f"models-{name}", slow=slow, quick=quick) for name in names}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, *_ = mesh
        await mesh.wait_joined()
        gate.touch()
        for member in mesh:
            for model in ("slow", "quick"):
                body = {"model": model, "node": member.id}
                assert (await member.node.client.post("/admin/prewarm", json=body)).status_code == 200
        # With nothing else to do, each serves its own.
        for member in mesh:
            for _ in range(3):
                assert (await member.ask("slow")).node == member.id
            for _ in range(20):
                assert (await member.ask("quick")).node == member.id
        # Answers of the quick one took a millisecond: waiting for one seems cheap, until it doesn't end.
        for model in ("slow", "quick"):
            gate.unlink()
            served: list[str] = []

            async def ask(model: str = model, served: list[str] = served) -> None:
                served.append((await a.ask(model)).node)

            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(ask)
                for member in mesh:
                    await wait_stats(member, model, lambda s: s["running"] == 1)
                gate.touch()
            assert sorted(served) == names
