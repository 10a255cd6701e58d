"""Nodes on machines of their own, as far as the network is concerned: cut off, split, behind a router."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.end_to_end.mesh.parts import NO_MODELS, fakes, with_mdns
from tests.support.chats import Answer
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import NETWORK_PORT, Member, running_mesh
from tests.support.netns import Network, network
from tests.support.node import PATIENCE_SECONDS, overlay

THREE = ["node-a", "node-b", "node-c"]


@pytest.fixture
def net() -> Iterator[Network]:
    """Three machines on a switch."""
    with network(*THREE) as made:
        yield made


async def test_who_is_cut_off_is_missed_serves_its_own_and_returns(tmp_path: Path, net: Network) -> None:
    cookbooks = {name: fakes(tmp_path / f"models-{name}", **{f"of-{name}": {}}) for name in THREE}
    async with running_mesh(tmp_path, cookbooks, net=net, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("of-node-c", at="node-a", by="node-c")
        assert (await a.ask("of-node-c")).node == "node-c"
        net.cut("node-c")
        await mesh.wait_joined("node-a", "node-b")
        await mesh.wait_joined("node-c")
        assert set(await a.models()) == {"of-node-a", "of-node-b"}
        assert set(await c.models()) == {"of-node-c"}
        assert (await c.ask("of-node-c")).node == "node-c"
        assert (await a.ask("of-node-b")).node == "node-b"
        assert (await b.ask("of-node-c")).status == 404
        net.heal()
        await mesh.wait_joined()
        await mesh.wait_listed("of-node-c", at="node-b", by="node-c")
        assert (await b.ask("of-node-c")).node == "node-c"


async def test_two_halves_agree_again_and_the_dead_stay_dead(tmp_path: Path, net: Network) -> None:
    """While the mesh is split, one node ends and another starts anew: nobody believes the old news."""
    cookbooks = dict.fromkeys(THREE, NO_MODELS)
    async with running_mesh(tmp_path, cookbooks, net=net, binary_path=FAKE_LLAMA_SERVER) as mesh:
        _, b, c = mesh
        await mesh.wait_joined()
        net.split(["node-a", "node-b"], ["node-c"])
        await mesh.wait_joined("node-a", "node-b")
        await mesh.wait_joined("node-c")
        await b.kill()
        c.change(cookbook=fakes(tmp_path, m={}))
        await c.restart()
        await mesh.wait_joined("node-a")
        net.heal()
        await mesh.wait_joined("node-a", "node-c")
        await mesh.wait_listed("m", at="node-a", by="node-c")
        await b.start()
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-b", by="node-c")


async def parked(member: Member) -> None:
    """Until node-c keeps connections ready there; before, it may be taken for unreachable."""
    with trio.fail_after(PATIENCE_SECONDS):
        while True:
            node = (await member.node.client.get("/cluster/nodes")).json()["nodes"].get("node-c", {})
            if node.get("ready") and node["link"]["connections"]:
                return
            await trio.sleep(0.05)


async def test_behind_a_router_a_node_serves_all_the_same(tmp_path: Path, net: Network) -> None:
    """Nobody can dial node-c; what others send it comes by connections that it parked, also many at once."""
    net["node-c"].close_door(NETWORK_PORT)
    gate = tmp_path / "gate"
    cookbooks = {
        "node-a": NO_MODELS,
        "node-b": NO_MODELS,
        "node-c": fakes(tmp_path, m={"slots": 6, "gate": str(gate), "gate_after": 1}),
    }
    async with running_mesh(tmp_path, cookbooks, net=net, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, _ = mesh
        await mesh.wait_joined()
        for member in (a, b):
            await mesh.wait_listed("m", at=member.id, by="node-c")
            await parked(member)
        answers: list[Answer] = []

        async def ask(stream: bool) -> None:
            answers.append(await a.ask("m", stream=stream))

        async with a.talking("m") as talk, b.talking("m") as other, trio.open_nursery() as nursery:
            assert await talk.word() == await other.word() == "t0 "
            for number in range(4):
                nursery.start_soon(ask, number % 2 == 1)
            gate.touch()
            assert await talk.rest() == await other.rest() == "t1 t2 t3 t4 "
        assert [(answer.status, answer.node) for answer in answers] == [(200, "node-c")] * 4
        warmed = await a.node.client.post("/admin/prewarm", json={"model": "m", "node": "node-c"})
        assert warmed.status_code == 200, warmed.text
        # Away for good, it is missed like any other; its connections are new ones then.
        await mesh["node-c"].restart()
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-c")
        assert (await a.ask("m", stream=True)).node == "node-c"


async def test_two_who_cannot_hear_each_other_meet_through_a_third(tmp_path: Path, net: Network) -> None:
    net.apart("node-a", "node-c")
    cookbooks = {"node-a": NO_MODELS, "node-b": NO_MODELS, "node-c": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, cookbooks, net=net, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a, b, c = mesh
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-c")
        for stream in (False, True):
            answer = await a.ask("m", stream=stream, headers={"x-request-id": f"far-{stream}"})
            assert (answer.status, answer.node, answer.text) == (200, "node-c", "t0 t1 t2 t3 t4 ")
            for member in (a, b, c):
                await member.node.wait_event("request", request_id=f"far-{stream}")
        # As soon as they hear each other, the third is left out.
        net.heal()
        await mesh.wait_joined()


async def test_machines_find_each_other_by_multicast(tmp_path: Path, net: Network) -> None:
    """Those that listen on IPv4, and those that listen on IPv6."""
    for listen, name in (("0.0.0.0", "four"), ("[::]", "six")):
        cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path / name, m={})}
        config = overlay(with_mdns("all"), {"listen_addr": f"{listen}:{NETWORK_PORT}"})
        async with running_mesh(
            tmp_path / name, cookbooks, config, net=net, peers={}, binary_path=FAKE_LLAMA_SERVER
        ) as mesh:
            await mesh.wait_joined()
            await mesh.wait_listed("m", at="node-a", by="node-b")
            assert (await mesh["node-a"].ask("m")).node == "node-b"
            addresses = (await mesh["node-a"].nodes())["node-b"]["addresses"]
            own = net["node-b"].ip if name == "four" else f"[{net['node-b'].ip6}]"
            assert addresses == [f"{own}:{NETWORK_PORT}"]


@pytest.fixture
def lossy(net: Network) -> Network:
    """The same machines behind bad links."""
    for name in THREE:
        net.slow(name, delay_ms=20, loss_percent=3)
    return net


async def test_slow_and_lossy_links_carry_it_all(tmp_path: Path, lossy: Network) -> None:
    cookbooks = {"node-a": NO_MODELS, "node-b": NO_MODELS, "node-c": fakes(tmp_path, m={"slots": 4})}
    async with running_mesh(tmp_path, cookbooks, net=lossy, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a = mesh["node-a"]
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-c")
        for stream in (False, True) * 4:
            answer = await a.ask("m", stream=stream)
            assert (answer.status, answer.text) == (200, "t0 t1 t2 t3 t4 ")
