"""What runs a mesh for the tests: addresses, keys, lives, and the questions it asks the nodes."""

from __future__ import annotations

import json
import signal
import socket
import stat
from pathlib import Path

import httpx
import psutil
import pytest

from tests.end_to_end.cookbooks import cookbook, pid_of, profile, wait_running
from tests.support import mesh as support
from tests.support.chats import Answer
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.mesh import Member, Place, reserved_port, running_mesh
from tests.support.netns import network
from tests.support.node import wait_until

ALONE = {"cluster": {"enabled": False}}


def test_a_reserved_port_is_for_who_asks_for_it() -> None:
    with reserved_port() as port:
        for _ in range(2):
            server = socket.create_server(("127.0.0.1", port))
            with server, socket.create_connection(("127.0.0.1", port)), server.accept()[0]:
                pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def test_an_answer_knows_its_error() -> None:
    error = {"message": "m", "type": "queue_full", "param": None, "code": "queue_full"}
    body = json.dumps({"error": error}).encode()
    answer = Answer(503, httpx.Headers({"X-Llamesh-Node": "b"}), body)
    assert answer.node == "b"
    assert answer.error == error


async def test_each_node_has_its_own_files_and_address_and_the_token_of_all(tmp_path: Path) -> None:
    each = {"node-b": {"cluster": {"gossip_interval_seconds": 7}}}
    async with running_mesh(
        tmp_path, {"node-a": support.NO_MODELS, "node-b": support.NO_MODELS}, ALONE, each=each
    ) as mesh:
        a, b = mesh
        assert [a.id, b.id] == ["node-a", "node-b"]
        assert a.node.url == f"http://{a.place.address}" != b.node.url
        configs = [json.loads((member.directory / "config.yaml").read_text()) for member in mesh]
        assert configs[0]["cluster"]["peers"] == [b.place.address]
        assert configs[1]["cluster"]["peers"] == [a.place.address]
        assert [config["cluster"]["gossip_interval_seconds"] for config in configs] == [0.2, 7]
        assert mesh.token is not None
        for member in mesh:
            path = member.keys / "cluster_token"
            assert path.read_text().strip() == mesh.token
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        (a.keys / "node.key").write_text("c2VjcmV0IGtleQ==\n")
        assert {b"secret key", b"c2VjcmV0IGtleQ==", mesh.token.encode()} < set(mesh.secrets())
        assert len(mesh.secrets()) == 4
        with pytest.raises(AssertionError, match="runs already"):
            await a.start()
    assert not a.running


async def test_a_node_dies_and_comes_back_at_its_address(tmp_path: Path) -> None:
    recipes = cookbook(m=profile(fake_profile_file(tmp_path, "m")))
    async with running_mesh(tmp_path, {"node-a": recipes}, ALONE, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a = mesh["node-a"]
        assert (await a.ask("m", max_tokens=2)).text == "t0 t1 "
        child = psutil.Process(pid_of(a.node, "m:default"))
        await a.kill()
        assert mesh.running == []
        assert a.node.returncode == -signal.SIGKILL
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        await a.start()
        assert a.node.url == f"http://{a.place.address}"
        a.change({"max_hops": 3}, env={"X": "y"})
        await a.restart()
        assert json.loads((a.directory / "config.yaml").read_text())["max_hops"] == 3
        assert psutil.Process(a.node.pid).environ()["X"] == "y"
        assert [life.returncode for life in a.lives] == [-signal.SIGKILL, 0, None]
        assert a.said().count('"event": "listening"') == 3
        assert (await a.wait_said("listening", a.place.address, level="info"))["node"] == "node-a"
        a.freeze()
        process = psutil.Process(a.node.pid)
        await wait_until(lambda: process.status() == psutil.STATUS_STOPPED, "it isn't frozen")
        a.thaw()
        assert await a.get("/healthz")
        a.freeze()


async def test_answers_whole_streamed_cut_and_refused(tmp_path: Path) -> None:
    recipes = cookbook(
        m=profile(fake_profile_file(tmp_path, "m")),
        cut=profile(fake_profile_file(tmp_path, "cut", cut_mid_stream=1)),
    )
    async with running_mesh(tmp_path, {"node-a": recipes}, ALONE, binary_path=FAKE_LLAMA_SERVER) as mesh:
        a = mesh["node-a"]
        whole = await a.ask("m", words="what?", headers={"X-Request-Id": "r1"})
        assert (whole.status, whole.text, whole.node) == (200, "t0 t1 t2 t3 t4 ", "node-a")
        assert whole.headers["x-request-id"] == "r1"
        streamed = await a.ask("m", stream=True)
        assert streamed.text == whole.text
        assert streamed.events[-1] == "[DONE]"
        refused = await a.ask("nobody")
        assert (refused.status, refused.error["type"], refused.text) == (404, "model_not_found", "")
        with pytest.raises(httpx.RemoteProtocolError):
            await a.ask("cut", stream=True)
        async with a.talking("m") as talk:
            assert talk.node == "node-a"
            assert await talk.word() == "t0 "
            assert await talk.rest() == "t1 t2 t3 t4 "
        async with a.talking("m", fake={"gate": str(tmp_path / "never"), "gate_after": 1}) as talk:
            assert await talk.word() == "t0 "
        await wait_running(a.node, 0)
        with pytest.raises(AssertionError, match="model_not_found"):
            async with a.talking("nobody"):
                pass
        async with a.talking("cut") as talk:
            assert await talk.word() == "t0 "
            with pytest.raises(httpx.RemoteProtocolError):
                await talk.word()
        assert set(await a.models()) == {"m", "cut"}
        await mesh.wait_joined()
        await mesh.wait_gone("node-b")
        assert (await mesh.wait_listed("m", at="node-a", by="node-a"))["id"] == "m"
        await mesh.wait_listed("nobody", at="node-a", by=None)


async def test_what_never_comes_true_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_mesh(tmp_path, {"node-a": support.NO_MODELS}, ALONE) as mesh:
        monkeypatch.setattr(support, "PATIENCE_SECONDS", 0.05)
        with pytest.raises(AssertionError, match=r"node-a is rid of .*'node-a': True"):
            await mesh.wait_gone("node-a", by=["node-a"])


async def test_a_node_that_does_not_start_says_why(tmp_path: Path) -> None:
    with reserved_port() as port:
        config = {"listen_addr": f"127.0.0.1:{port}", "max_instances_per_node": 0}
        member = Member("node-a", tmp_path, Place("", ""), {"cookbook": support.NO_MODELS, "config": config})
        try:
            with pytest.raises(AssertionError, match="max_instances_per_node"):
                await member.start()
        finally:
            await member.node.close()


async def test_nodes_behind_taps_know_only_those(tmp_path: Path) -> None:
    cookbooks = {"node-a": support.NO_MODELS, "node-b": support.NO_MODELS}
    async with running_mesh(tmp_path, cookbooks, ALONE, tapped=True, start=["node-a"]) as mesh:
        a, b = mesh
        assert mesh.running == [a]
        config = json.loads((a.directory / "config.yaml").read_text())
        assert config["public_url"] == f"http://{mesh.taps['node-a'].address}"
        assert config["cluster"]["peers"] == [mesh.taps["node-b"].address]
        async with httpx.AsyncClient(base_url=config["public_url"], trust_env=False) as client:
            assert (await client.get("/healthz")).status_code == 200
        assert b"GET /healthz" in mesh.taps["node-a"].heard()
        assert not b.running


async def test_nodes_in_a_network_of_their_own(tmp_path: Path) -> None:
    with network("node-a", "node-b") as net:
        cookbooks = {"node-a": support.NO_MODELS, "node-b": support.NO_MODELS}
        async with running_mesh(tmp_path, cookbooks, ALONE, net=net) as mesh:
            for member in mesh:
                assert set(await member.nodes()) == {member.id}
                # As from its own machine.
                assert (await member.node.client.post("/admin/unload", json={})).status_code == 200
            assert mesh["node-b"].place.address == f"{net['node-b'].ip}:8080"
            net["node-a"].connect(8080, net["node-b"].ip).close()
            mesh["node-b"].freeze()
            await mesh["node-b"].kill()
            await mesh["node-b"].start()
            assert set(await mesh["node-b"].nodes()) == {"node-b"}
            assert await mesh["node-b"].stop() == 0
