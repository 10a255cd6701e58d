"""Nodes that die, freeze, leave and come back, and what the others and their clients see of it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from llamesh.mesh.cluster_token import new_token
from tests.end_to_end.mesh.parts import NO_MODELS, clients, fakes, make_key, wait_stats
from tests.support.chats import Answer
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, running_mesh
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS

THREE = ["node-a", "node-b", "node-c"]


async def test_a_killed_node_vanishes_and_comes_back(tmp_path: Path) -> None:
    cookbooks = {"node-a": NO_MODELS, "node-b": NO_MODELS, "node-c": fakes(tmp_path, m={"slots": 1})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-c")
        assert (await a.ask("m")).node == "node-c"
        await c.kill()
        await mesh.wait_gone("node-c")
        for member in (a, b):
            await mesh.wait_listed("m", at=member.id, by=None)
        gone = await a.ask("m")
        assert gone.status == 404
        assert gone.error["type"] == "model_not_found"
        await c.start()
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-c")
        assert (await a.ask("m")).node == "node-c"
        # Everybody noticed both, once.
        for member in (a, b):
            assert len(member.node.find_events("peer lost", peer="node-c")) == 1


async def test_a_request_whose_node_dies_is_served_elsewhere(tmp_path: Path) -> None:
    """Unless the client has heard something of the answer already: then it hears that it broke."""
    gate = tmp_path / "gate"
    quiet, talks = {"slots": 1, "head_gate": str(gate)}, {"slots": 1, "gate": str(gate), "gate_after": 1}
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(tmp_path / "b", quiet=quiet, talks=talks),
        "node-c": NO_MODELS,
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("talks", at="node-a", by="node-b")
        answers: list[Answer] = []

        async def ask(stream: bool) -> None:
            answers.append(await a.ask("quiet", stream=stream))

        async with a.talking("talks") as talk, trio.open_nursery() as nursery:
            assert await talk.word() == "t0 "
            nursery.start_soon(ask, False)
            nursery.start_soon(ask, True)
            await wait_stats(b, "quiet", lambda s: s["running"] == 1)
            c.change(cookbook=fakes(tmp_path / "c", quiet={}, talks={}))
            await c.restart()
            await mesh.wait_listed("quiet", at="node-a", by="node-c")
            await b.kill()
            with pytest.raises(httpx.RemoteProtocolError):
                await talk.word()
        assert [(answer.status, answer.node) for answer in answers] == [(200, "node-c")] * 2
        assert (await a.ask("talks")).node == "node-c"


async def test_a_frozen_node_is_missed_and_thaws(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    recipes = {"slots": 1, "head_gate": str(gate)}
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(tmp_path / "b", m=recipes, only={}),
        "node-c": NO_MODELS,
    }
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await a.ask("m"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_stats(b, "m", lambda s: s["running"] == 1)
            c.change(cookbook=fakes(tmp_path / "c", m={}))
            await c.restart()
            await mesh.wait_joined()
            await mesh.wait_listed("m", at="node-a", by="node-c")
            b.freeze()
        # What was under way there came back and went on to somebody else.
        assert [(answer.status, answer.node) for answer in answers] == [(200, "node-c")]
        await mesh.wait_gone("node-b", by=["node-a", "node-c"])
        await mesh.wait_listed("only", at="node-a", by=None)
        assert (await a.ask("m")).node == "node-c"
        gate.touch()
        b.thaw()
        await mesh.wait_joined()
        await mesh.wait_listed("only", at="node-a", by="node-b")
        assert (await a.ask("only")).node == "node-b"
        assert b.running


async def test_leaving_is_said_aloud(tmp_path: Path) -> None:
    """Who leaves in order isn't suspected first, and sends its own requests to others while it drains."""
    gate = tmp_path / "gate"
    slow = {"slots": 1, "gate": str(gate), "gate_after": 1}
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": fakes(tmp_path / "b", m=slow),
        "node-c": fakes(tmp_path / "c", m={}),
    }
    # Death takes longer than anybody here waits: what is noticed was said.
    config = {"cluster": {"gossip_interval_seconds": 0.5}}
    async with running_mesh(tmp_path, cookbooks, config, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, _ = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-b", by="node-b")
        async with b.talking("m") as talk:
            assert await talk.word() == "t0 "
            children = b.node.children()
            b.node.send_signal(signal.SIGTERM)
            await b.node.wait_event("draining", running=1)
            # New ones go elsewhere, from near and from far.
            assert (await b.ask("m")).node == "node-c"
            assert (await a.ask("m")).node == "node-c"
            gate.touch()
            assert await talk.rest() == "t1 t2 t3 t4 "
        assert await b.node.wait_end(children) == 0
        await mesh.wait_gone("node-b")
        for name in ("node-a", "node-c"):
            assert mesh[name].node.find_events("peer left", peer="node-b")
            assert not mesh[name].node.find_events("peer lost", peer="node-b")


async def waiting(member: Member) -> list[str | None]:
    """What the requests at a node wait for."""
    return [one["waiting_for"] for one in (await member.get("/api/v1/state"))["requests"]]


async def test_a_request_for_what_only_a_restarting_node_has_waits_for_it(tmp_path: Path) -> None:
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        await b.stop()
        await mesh.wait_gone("node-b")
        answers: list[Answer] = []

        async def ask() -> None:
            answers.append(await a.ask("m"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            with trio.fail_after(PATIENCE_SECONDS):
                while not any("which had it" in (why or "") for why in await waiting(a)):
                    await trio.sleep(POLL_SECONDS)
            await b.start()
        assert [(answer.status, answer.node) for answer in answers] == [(200, "node-b")]


def busy(directory: Path) -> dict[str, Any]:
    """Cookbooks of three nodes that all have m warm, and can be busy enough with it to share the work."""
    behaviour = {"slots": 2, "token_delay": 0.005}
    return {
        name: fakes(directory / f"models-{name}", entry={"min_instances": 1}, m=behaviour) for name in THREE
    }


async def test_rolling_restarts_and_crashes_under_load_fail_nobody(tmp_path: Path) -> None:
    """Each of three nodes ends and starts again while clients ask without a pause, half of them streaming.

    After kill -9 that goes for who hadn't heard anything, so nobody streams then.
    """
    async with running_mesh(tmp_path, busy(tmp_path), binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        for entry, others, streams in ((a, (b, c), True), (c, (a,), True), (b, (c,), False)):
            async with clients(entry, "m", 6, streams=streams) as load:
                await load.wait_served(20)
                for member in others:
                    await (member.stop() if streams else member.kill())
                    await load.wait_served(5)
                    await member.start()
                    await mesh.wait_joined()
                    await load.wait_served(20)
            assert load.failures == []
            # The work was spread, before and after.
            assert len(load.served) >= 2
        for member in mesh:
            assert [entry for entry in member.node.events if entry.get("level") == "error"] == []


async def test_another_key_is_another_node(tmp_path: Path) -> None:
    """Who comes back with a new key isn't believed until a person says so; who proves the old one is."""
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, cookbooks, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b = mesh
        await mesh.wait_joined()
        assert "node-b noise25519:" in (a.keys / "known_peers").read_text()
        await b.stop()
        old = (b.keys / "node.key").read_bytes()
        make_key(b)
        await b.start()
        for member in (a, b):
            await member.wait_said("node-b", str(a.keys / "known_peers"), level="warning")
        await mesh.wait_joined("node-a")

        # Rotated: the previous key lies beside it.
        await b.stop()
        previous = b.keys / "node.key.previous"
        previous.touch(mode=0o600)
        previous.write_bytes(old)
        await b.start()
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        assert (await a.ask("m")).node == "node-b"
        previous.unlink()
        await b.restart()
        await mesh.wait_joined()

        # Forgotten by a person, while the node runs.
        await b.stop()
        make_key(b)
        known = a.keys / "known_peers"
        lines = known.read_text().splitlines()
        known.write_text("".join(f"{line}\n" for line in lines if not line.startswith("node-b ")))
        await b.start()
        await mesh.wait_joined()


async def test_the_token_changes_while_the_mesh_runs(tmp_path: Path) -> None:
    """The previous one is accepted, so that nodes change over one by one."""
    async with running_mesh(tmp_path, dict.fromkeys(THREE, NO_MODELS)) as mesh:
        await mesh.wait_joined()
        assert mesh.token is not None
        fresh = new_token()
        for member in mesh:
            (member.keys / "cluster_token.previous").touch(mode=0o600)
            (member.keys / "cluster_token.previous").write_text(mesh.token + "\n")
            (member.keys / "cluster_token").write_text(fresh + "\n")
            await member.restart()
            await mesh.wait_joined()
