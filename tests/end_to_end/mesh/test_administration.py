"""One node's operator tells another node what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.end_to_end.mesh.parts import NO_MODELS, fakes
from tests.end_to_end.mesh.test_harm import open_link, rogue
from tests.end_to_end.test_state import asking, state_of, wait_state
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, running_mesh
from tests.support.netns import Network, network
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS

AT_B = {"node": "node-b"}


async def tell(member: Member, act: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Status and answer of an act."""
    reply = await member.node.client.post(f"/admin/{act}", json=body)
    return reply.status_code, reply.json()


async def ready(member: Member, node: str) -> dict[str, Any]:
    """What a node says of another's readiness."""
    return (await member.nodes())[node]


async def test_every_act_at_another_node(tmp_path: Path) -> None:
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path / "b", m={}, other={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")

        assert await tell(a, "prewarm", model="m", **AT_B) == (
            200,
            {"model": "m", "status": "loaded", **AT_B},
        )
        asked = await b.node.wait_event("administered by another node", act="prewarm")
        assert (asked["peer"], asked["model"], "by_way_of" in asked) == ("node-a", "m", False)
        [event] = [e for e in (await state_of(a.node))["events"] if e["event"].startswith("administered")]
        assert (event["node"], event["text"]) == (
            "node-b",
            "the operator of node node-a did this here: prewarm",
        )

        assert await tell(a, "drain", **AT_B) == (200, {"status": "draining", **AT_B})
        await b.node.wait_event("administered by another node", act="drain", peer="node-a")
        assert (await b.node.client.get("/readyz")).json()["reason"] == "is draining"
        assert (await a.node.client.get("/readyz")).status_code == 200
        assert await tell(a, "undrain", **AT_B) == (200, {"status": "ready", **AT_B})

        status, answer = await tell(a, "unload", model="m", **AT_B)
        assert (status, answer) == (200, {"unloading": ["m:default#1"], **AT_B})
        await b.node.wait_event("gone", instance="m:default#1")
        assert await tell(a, "unload", model="m", **AT_B) == (200, {"unloading": [], **AT_B})

        await tell(a, "prewarm", model="other", **AT_B)
        status, answer = await tell(a, "pause", seconds=3600, **AT_B)
        assert (status, answer["status"], answer["node"]) == (200, "paused", "node-b")
        await b.node.wait_event("gone", instance="other:default#2")
        assert await tell(a, "pause", seconds=0, **AT_B) == (200, {"status": "ready", "reason": "", **AT_B})

        (b.node.directory / "cookbook.yaml").write_text("models: []\n")
        status, answer = await tell(a, "reload", **AT_B)
        assert status == 200
        assert (answer["node"], answer["added"]) == ("node-b", [])
        builds = (await a.node.client.get("/admin/builds", params=AT_B)).json()
        assert builds == {**(await b.get("/admin/builds")), **AT_B}


async def test_errors_pass_with_status_type_and_words(tmp_path: Path) -> None:
    cookbooks = {"node-a": fakes(tmp_path / "a", own={}), "node-b": fakes(tmp_path / "b", m={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        bad, missing = (400, "invalid_request_error"), (404, "model_not_found")
        for act, body, expected, words in (
            ("unload", {"model": "nobody"}, missing, "node node-b knows no model 'nobody'"),
            ("unload", {"modell": "m"}, bad, "not `modell`"),
            ("prewarm", {}, bad, "`model` must name a model"),
            ("prewarm", {"model": "own"}, missing, "node node-b knows no model 'own'"),
            ("prewarm", {"model": "m", "wait": 1}, bad, "`wait` must be"),
            ("pause", {"seconds": -1}, bad, "`seconds` must be"),
            ("rebuild-llama", {}, bad, "llama_cpp.enabled"),
            ("drain", {"model": "m"}, bad, "drain takes no member besides `node`"),
        ):
            status, answer = await tell(a, act, **body, **AT_B)
            assert (status, answer["error"]["type"]) == expected, (act, body, answer)
            assert words in answer["error"]["message"], answer
            assert answer["node"] == "node-b"
        for node in ("node-x", "", 7, None, ["node-b"], "../etc"):
            status, answer = await tell(a, "drain", node=node)
            assert (status, answer["error"]["param"]) == (400, "node"), answer
        (b.node.directory / "cookbook.yaml").write_text("models:\n  - nome: m\n")
        status, answer = await tell(a, "reload", **AT_B)
        assert (status, answer["node"]) == (400, "node-b")
        assert "cookbook.yaml:2" in answer["problems"][0]

        await b.kill()
        await mesh.wait_gone("node-b")
        status, answer = await tell(a, "drain", **AT_B)
        assert (status, answer["error"]["type"]) == (502, "upstream_error"), answer
        assert "node-b doesn't answer" in answer["error"]["message"]


async def test_unload_says_where_a_model_is_loaded(tmp_path: Path) -> None:
    cookbooks = {
        "node-a": fakes(tmp_path / "a", both={}),
        "node-b": fakes(tmp_path / "b", both={}, m={}),
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        status, answer = await tell(a, "unload", model="m")
        assert (status, answer["error"]["message"]) == (404, "node node-a knows no model 'm'")
        for model in ("m", "both"):
            await tell(b, "prewarm", model=model)

        async def unloaded(model: str) -> tuple[int, dict[str, Any]]:
            with trio.fail_after(PATIENCE_SECONDS):
                while "loaded_on" not in (found := await tell(a, "unload", model=model))[1]:
                    await trio.sleep(POLL_SECONDS)
            return found

        status, answer = await unloaded("m")
        assert (status, answer["loaded_on"]) == (404, ["node-b"])
        assert "it is loaded on node-b: name one of them as `node`" in answer["error"]["message"]
        assert await unloaded("both") == (200, {"unloading": [], "loaded_on": ["node-b"]})
        assert len((await b.get("/running"))["running"]) == 2


async def test_an_owner_may_refuse(tmp_path: Path) -> None:
    """Requests and its own operator go on; of two that have a model, the other one loads it."""
    later = tmp_path / "later"
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(tmp_path / "b", m={"slots": 1}),
        "node-c": fakes(tmp_path / "c", m={}),
    }
    each = {"node-b": {"cluster": {"accept_administration": False}}}
    async with running_mesh(
        tmp_path, cookbooks, each=each, binary_path=FAKE_LLAMA_SERVER, start=("node-a", "node-b")
    ) as mesh:
        a, b = mesh["node-a"], mesh["node-b"]
        await mesh.wait_joined("node-a", "node-b")
        await mesh.wait_listed("m", at="node-a", by="node-b")
        for act, body in (("drain", AT_B), ("prewarm", {"model": "m", **AT_B}), ("prewarm", {"model": "m"})):
            status, answer = await tell(a, act, **body)
            assert (status, answer["error"]["type"]) == (403, "forbidden")
            assert "node-b takes no administration from other nodes" in answer["error"]["message"]
            await b.node.wait_event("another node's administration was refused", act=act, peer="node-a")
        assert (await a.node.client.get("/admin/builds", params=AT_B)).status_code == 200
        document = await wait_state(a.node, lambda d: len(d["nodes"]) == 2 and d["nodes"][1]["fresh"])
        assert [one["accepts_administration"] for one in document["nodes"]] == [True, False]

        # A request may be ended by the node that it came from, and by its own.
        async with asking(b.node, "theirs", stream=True, fake={"head_gate": str(later)}) as theirs:
            await wait_state(b.node, lambda d: [r["phase"] for r in d["requests"]] == ["prefill"])
            reply = await a.node.client.post("/admin/cancel", json={"request_id": "theirs"})
            assert (reply.status_code, reply.json()["error"]["type"]) == (403, "forbidden")
            reply = await b.node.client.post("/admin/cancel", json={"request_id": "theirs"})
            assert reply.status_code == 200
        assert theirs["status"] == 499
        await wait_state(b.node, lambda d: not d["requests"])
        async with asking(a.node, "ours", stream=True, fake={"head_gate": str(later)}):
            await wait_state(b.node, lambda d: [r["phase"] for r in d["requests"]] == ["prefill"])
            assert (await tell(a, "cancel", request_id="ours"))[0] == 200
        assert (await tell(b, "drain"))[0] == 200
        assert (await tell(b, "undrain"))[0] == 200
        await tell(b, "unload")
        await b.node.wait_event("gone")

        await mesh.start("node-c")
        await mesh.wait_listed("m", at="node-a", by="node-c")
        status, answer = await tell(a, "prewarm", model="m")
        assert (status, answer["node"]) == (200, "node-c")


@pytest.fixture
def net() -> Iterator[Network]:
    """Three machines on a switch."""
    with network("node-a", "node-b", "node-c") as made:
        yield made


async def test_by_way_of_a_third_node(tmp_path: Path, net: Network) -> None:
    """Who can't be reached gets it from one who can; where nobody can, that is said."""
    net.apart("node-a", "node-c")
    cookbooks = {"node-a": NO_MODELS, "node-b": NO_MODELS, "node-c": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, cookbooks, net=net, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-c")
        at_c = {"node": "node-c"}
        for body in ({"model": "m", **at_c}, {"model": "m"}):
            status, answer = await tell(a, "prewarm", **body)
            assert (status, answer) == (200, {"model": "m", "status": "loaded", **at_c}), answer
        said = await c.node.wait_event("administered by another node")
        assert (said["peer"], said["by_way_of"]) == ("node-a", "node-b")
        await b.node.wait_event("administration passed on", peer="node-a", node="node-c", act="prewarm")
        status, answer = await tell(a, "unload", model="nobody", **at_c)
        assert (status, answer["error"]["type"], answer["node"]) == (404, "model_not_found", "node-c")
        assert await tell(a, "unload", model="m", **at_c) == (200, {"unloading": ["m:default#1"], **at_c})


async def test_orders_are_read_strictly(tmp_path: Path) -> None:
    """Somebody with the token says what no node would say: it is refused, and nothing is done."""
    async with running_mesh(
        tmp_path, {"node-a": fakes(tmp_path, m={})}, binary_path=FAKE_LLAMA_SERVER
    ) as mesh:
        a = mesh["node-a"]
        link = await open_link(a.place.address, rogue(mesh, "node-x"))

        async def say(path: str, body: bytes) -> tuple[int, dict[str, Any]]:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            await link.send(head + body)
            answer = b""
            with trio.fail_after(PATIENCE_SECONDS):
                while not answer.endswith(b"}"):
                    answer += await link.receive()
            return int(answer.split(b" ", 2)[1]), json.loads(answer.partition(b"\r\n\r\n")[2])

        here = {"act": "drain", "node": "node-a"}
        for order in (
            b"",
            b"[]",
            b"null",
            b"{}",
            b"[" * 2000,
            {**here, "act": "shutdown"},
            {**here, "act": ["drain"]},
            {**here, "node": "node a"},
            {**here, "document": []},
            {**here, "document": {"seconds": 1}},
            {**here, "asker": "a\nb"},
            {**here, "key": "value"},
        ):
            body = order if isinstance(order, bytes) else json.dumps(order).encode()
            status, answer = await say("/mesh/admin", body)
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), (order, answer)
        # Nobody has it go round in circles, nor sent to who isn't there.
        for order in ({**here, "node": "node-z"}, {**here, "node": "node-z", "asker": "node-y"}):
            assert (await say("/mesh/admin", json.dumps(order).encode()))[0] == 502
        status, answer = await say(
            "/mesh/admin", json.dumps({**here, "document": {"x": "y" * (1 << 20)}}).encode()
        )
        assert (status, answer["error"]["type"]) == (413, "request_too_large")
        assert (await a.node.client.get("/readyz")).status_code == 200
        # What versions before this one say.
        assert (await say("/mesh/prewarm", b'{"model": "m"}'))[1] == {"model": "m", "status": "loaded"}
        assert (await say("/mesh/prewarm", b"[]"))[0] == 400
        assert (await say("/mesh/admin", json.dumps(here).encode()))[0] == 200
        assert (await a.node.wait_event("administered by another node", act="drain"))["peer"] == "node-x"
        assert (await a.node.client.get("/readyz")).status_code == 503
        link.close()
