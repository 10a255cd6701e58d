"""How nodes find each other, and whom they don't let in."""

from __future__ import annotations

import itertools
import secrets
from pathlib import Path

from tests.end_to_end.mesh.parts import NO_MODELS, fakes, make_key, with_mdns
from tests.support.fake import FAKE_LLAMA_SERVER
from tests.support.mesh import Member, reserved_port, running_mesh, write_token

LOOPBACK = "127.0.0.1"


def warnings(member: Member) -> list[str]:
    """What a node complained about, but for those who weren't up yet when it was."""
    return [
        str(entry)
        for entry in member.node.events
        if entry.get("level") in ("warning", "error")
        and not str(entry["event"]).startswith("no peer reached")
    ]


async def test_five_nodes_that_know_one_each_become_one_mesh(tmp_path: Path) -> None:
    names = [f"node-{letter}" for letter in "abcde"]
    cookbooks = dict.fromkeys(names, NO_MODELS) | {"node-e": fakes(tmp_path, m={})}
    peers = {later: [earlier] for earlier, later in itertools.pairwise(names)}
    async with running_mesh(tmp_path, cookbooks, peers=peers, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        for name in names[:-1]:
            entry = await mesh.wait_listed("m", at=name, by="node-e")
            assert entry["metadata"]["source"] == "cluster"
            assert entry["metadata"]["advertised_by"] == "node-e"
        assert (await mesh["node-a"].ask("m")).node == "node-e"
        for member in mesh:
            assert warnings(member) == []
            pinned = (member.keys / "known_peers").read_text()
            assert [name for name in names if f"{name} noise25519:" in pinned] != []
            assert f"{member.id} " not in pinned
            said = await member.nodes()
            assert {name: status["version"] for name, status in said.items()} == dict.fromkeys(
                names, said[member.id]["version"]
            )


async def test_nodes_find_each_other_by_multicast(tmp_path: Path) -> None:
    names = ["node-a", "node-b", "node-c"]
    cookbooks = dict.fromkeys(names, NO_MODELS) | {"node-c": fakes(tmp_path, m={})}
    async with running_mesh(
        tmp_path, cookbooks, with_mdns(LOOPBACK), peers={}, binary_path=FAKE_LLAMA_SERVER
    ) as mesh:
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-c")
        assert (await mesh["node-a"].ask("m")).node == "node-c"
        assert await mesh["node-c"].stop() == 0
        await mesh.wait_gone("node-c")
        await mesh["node-c"].start()
        await mesh.wait_joined()
        assert [warnings(member) for member in mesh] == [[], [], []]


async def test_nodes_of_different_tokens_are_two_meshes_and_say_so(tmp_path: Path) -> None:
    """And who isn't in the cluster at all speaks to nobody."""
    names = ["node-a", "node-b", "node-c", "node-d"]
    each = {"node-d": {"cluster": {"enabled": False}}}
    async with running_mesh(
        tmp_path, dict.fromkeys(names, NO_MODELS), each=each, start=["node-a", "node-b", "node-d"]
    ) as mesh:
        a, b, c, d = mesh
        write_token(c.keys, secrets.token_urlsafe(32))
        await c.start()
        await mesh.wait_joined("node-a", "node-b")
        await mesh.wait_joined("node-c")
        # Both sides say what to do.
        for member in (a, c):
            await member.wait_said("llamesh token", level="warning")
        assert mesh.token is not None
        assert mesh.token not in a.said() + b.said() + c.said()
        assert "node-c " not in (a.keys / "known_peers").read_text()
        assert not (c.keys / "known_peers").exists()
        # With the right one it comes in, without anything done to the others.
        write_token(c.keys, mesh.token)
        await c.restart()
        assert set(await d.nodes()) == {"node-d"}
        assert not (d.keys / "known_peers").exists()
        await d.stop()
        await mesh.wait_joined()


async def test_bad_addresses_are_warnings_and_the_own_one_is_nothing(tmp_path: Path) -> None:
    """The own address is among the peers where the configuration is the same on all machines."""
    names = ["node-a", "node-b"]
    with reserved_port() as port:
        bad = ["no-such-host.invalid:8080", f"127.0.0.1:{port}"]
        peers = {"node-a": [*names, *bad], "node-b": names}
        async with running_mesh(tmp_path, dict.fromkeys(names, NO_MODELS), peers=peers) as mesh:
            a, b = mesh
            await mesh.wait_joined()
            for address in bad:
                await a.wait_said(address, level="warning")
            assert (await a.get("/readyz"))["status"]
            assert warnings(b) == []
            for member in mesh:
                own = [entry for entry in member.node.events if member.place.address in str(entry)]
                assert [entry for entry in own if entry["level"] == "warning"] == []
                assert f"{member.id} " not in (member.keys / "known_peers").read_text()


async def test_two_nodes_may_share_a_key_store(tmp_path: Path) -> None:
    """One key, two ids, two nodes; and the store is made by whoever comes first."""
    config = {"cluster": {"noise": {"config_dir": str(tmp_path / "keys")}}}
    cookbooks = {"node-a": NO_MODELS, "node-b": fakes(tmp_path, m={})}
    async with running_mesh(tmp_path, cookbooks, config, token=None, binary_path=FAKE_LLAMA_SERVER) as mesh:
        await mesh.wait_joined()
        await mesh.wait_listed("m", at="node-a", by="node-b")
        assert (await mesh["node-a"].ask("m")).node == "node-b"


async def test_only_allowed_keys_come_in(tmp_path: Path) -> None:
    names = ["node-a", "node-b", "node-c"]
    peers = {"node-a": ["node-b"], "node-b": ["node-a"], "node-c": ["node-a"]}
    async with running_mesh(tmp_path, dict.fromkeys(names, NO_MODELS), peers=peers, start=[]) as mesh:
        a, b, c = mesh
        a.change({"cluster": {"noise": {"allowed_keys": [make_key(b)]}}})
        await mesh.start(*names)
        await mesh.wait_joined("node-a", "node-b")
        for member in (a, c):
            await member.wait_said("node-c", "allowed_keys", level="warning")
        assert set(await a.nodes()) == {"node-a", "node-b"}
