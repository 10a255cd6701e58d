"""Who reaches whom: parked connections, a third node between, addresses that lead elsewhere or back here."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
import trio

import llamesh
from llamesh.config.values import Address
from llamesh.core.offers import NODE_KEY, NodeEntry, encode
from llamesh.mesh.hello import Hello, Welcome
from tests.mesh.lives import Life, cut_between, lives

Greeting = TypeVar("Greeting", Hello, Welcome)


async def test_who_cannot_be_dialled_serves_all_the_same(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        world.address("b")
        world.taps["b"].down()
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        peer = a.mesh.peers.of("b")
        await world.until(lambda: b.mesh.parking.count("a") >= 2 and peer.links.idle >= 1, "b parks")
        assert peer.links.can_dial is False
        for _ in range(5):
            assert await a.ask("b") == (200, b"hello")
            assert await b.ask("a") == (200, b"hello")
        assert (a.served, b.served) == (5, 5)
        assert a.sees("b")
        assert b.sees("a")
        # As soon as it can be dialled, nothing is parked any more.
        world.taps["b"].up()
        peer.links.try_again()
        peer.links.close_all()
        await world.until(lambda: b.mesh.parking.count("a") == 0, "b parks nothing")
        assert await a.ask("b") == (200, b"hello")


async def test_many_requests_at_once_go_over_parked_connections(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        world.address("b")
        world.taps["b"].down()
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        await world.until(lambda: b.mesh.parking.count("a") >= 2, "b parks")
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(a.ask, "b")
        assert b.served == 8


async def test_a_third_node_leads_where_the_direct_way_is_cut(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        c = await world.start("c", ["a"])
        await world.joined(a, b, c)

        def way(one: Life, other: Life) -> str:
            seat = one.mesh.peers.seat(other.id, f"{other.id}:default")
            if seat is None:
                return ""
            seat.leave(None, complete=False, failed=False)
            return seat.via.node

        await world.until(lambda: way(a, b) == "b" and way(b, a) == "a", "they reach each other")
        with cut_between(a, b):
            await world.until(lambda: way(a, b) == "c" == way(b, a), "c leads there")
            await world.until(
                lambda: "b" in c.mesh.peers.of("a").entry.cut and "a" in c.mesh.peers.of("b").entry.cut,
                "both say so",
            )
            assert "c" not in a.mesh.peers.of("b").entry.cut
            await world.rounds(a, 20)
            await world.joined(a, b, c)
        a.mesh.peers.of("b").links.try_again()
        b.mesh.peers.of("a").links.try_again()
        await world.until(lambda: way(a, b) == "b" and way(b, a) == "a", "they reach each other again")
        await world.until(
            lambda: not c.mesh.peers.of("a").entry.cut and not c.mesh.peers.of("b").entry.cut, "both say so"
        )


async def test_its_own_address_is_dialled_once(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a", ["a", "b"])
        b = await world.start("b", ["b"])
        await world.joined(a, b)
        await world.rounds(a, 20)
        assert a.mesh.dialler.outcomes["itself"] == 1
        assert a.mesh.seeker.problems() == []
        assert world.said("a node wasn't let in") == []


async def test_addresses_where_something_else_is(tmp_path: Path) -> None:
    """A web server, one that says nothing, another node, and nobody: no harm, and the rest goes on."""
    async with lives(tmp_path) as world:
        heard: list[bytes] = []

        async def web(stream: trio.SocketStream) -> None:
            heard.append(await stream.receive_some())
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

        async def silent(stream: trio.SocketStream) -> None:
            await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            ports = []
            for serve in (web, silent):
                listeners = await nursery.start(trio.serve_tcp, serve, 0)
                ports.append(listeners[0].socket.getsockname()[1])
            a = await world.start("a")
            elsewhere = {"address": world.address("alias"), "node_id": "somebody"}
            world.taps["alias"].target = a.own_address
            peers = [*(f"127.0.0.1:{port}" for port in ports), "127.0.0.1:9", elsewhere, "a"]
            b = await world.start("b", peers)
            await world.joined(a, b)
            await world.until(lambda: len(b.mesh.seeker.problems()) >= 4, "each is told")
            problems = "\n".join(b.mesh.seeker.problems())
            assert (
                f"127.0.0.1:{ports[0]}: what answers there doesn't speak as a llamesh node does" in problems
            )
            assert f"{world.address('alias')} is node a now, not somebody" in problems
            assert "127.0.0.1:9" in problems
            assert heard[0].startswith(b"\0llamesh")
            nursery.cancel_scope.cancel()


async def test_another_wire_version_is_said_on_both_sides(tmp_path: Path) -> None:
    async with lives(tmp_path) as world:
        a = await world.start("a")
        b = await world.start("b", ["a"])
        await world.joined(a, b)
        stream = await trio.open_tcp_stream("127.0.0.1", a.tap.port)
        async with stream:
            await stream.send_all(b"\0llamesh\x07")
            assert await stream.receive_some()
        await world.until(lambda: bool(world.said("a handshake failed")), "a says so")
        assert "speaks version 7 of the mesh's wire" in world.said("a handshake failed")[0]["problem"]
        assert a.mesh.greeting.outcomes["version"] == 1
        assert a.sees("b")


@pytest.mark.parametrize(
    ("action", "version", "meets"),
    [
        ("warn", "99.0.0", True),
        ("reject_major", "99.0.0", False),
        ("reject_major", f"{llamesh.__version__.partition('.')[0]}.99.9", True),
        ("reject_any", f"{llamesh.__version__.partition('.')[0]}.99.9", False),
    ],
)
@pytest.mark.parametrize("strict", ["dialler", "acceptor"])
async def test_versions(tmp_path: Path, action: str, version: str, meets: bool, strict: str) -> None:
    async with lives(tmp_path) as world:

        def of_another_version(life: Life) -> None:
            """It says another version, and takes whatever it hears."""
            made = life.mesh.greeting
            hello, welcomed = made.hello, made._welcome
            made.hello = lambda purpose: _with(hello(purpose), version)  # type: ignore[method-assign]
            made._welcome = lambda h, a: _with(welcomed(h, a), version)  # type: ignore[method-assign]
            life.mesh.dialler._hello = made.hello

        acts = {"version_mismatch_action": action}
        if strict == "acceptor":
            a = await world.start("a", **acts)
            b = await world.start("b", ["a"], prepare=of_another_version)
        else:
            a = await world.start("a", prepare=of_another_version)
            b = await world.start("b", ["a"], **acts)
        if meets:
            await world.joined(a, b)
            await world.until(lambda: bool(world.said("another version", version=version)), "it is mentioned")
            return
        await world.until(lambda: bool(b.mesh.seeker.problems()), "it says why not")
        assert f"cluster.version_mismatch_action is {action}" in b.mesh.seeker.problems()[0]
        assert not a.sees()
        assert not b.sees()


def _with(said: Greeting, version: str) -> Greeting:
    return replace(said, version=version)


async def test_loopback_addresses_of_another_machine_are_not_dialled(tmp_path: Path) -> None:
    """A peer that came by the network says that a third is on 127.0.0.1: there, not here."""
    async with lives(tmp_path) as world:
        with socket.create_server(("127.0.0.1", 0)) as service:
            service.setblocking(False)
            a = await world.start("a")
            trap = f"127.0.0.1:{service.getsockname()[1]}"
            a.mesh._is_near = False
            third = NodeEntry(addresses=(trap, "localhost:1", "0.0.0.0:1", "10.255.255.1:0"))
            state = {NODE_KEY: encode(third)}
            assert a.mesh._believed(third.addresses, near=a.mesh._is_near) == ()
            a.mesh.peers.update("far", state)
            assert a.mesh.peers.of("far").addresses == ()
            assert a.mesh._believed([trap], near=True) == (Address.parse(trap),)
            assert a.mesh._believed([a.address], near=True) == ()  # that is a itself


async def test_a_machine_to_be_woken_is_listed_from_the_start(tmp_path: Path) -> None:
    mac = "02:00:00:00:00:01"
    async with lives(tmp_path) as world:
        known = {"address": "127.0.0.1:9", "wake_mac": mac, "node_id": "sleeper"}
        a = await world.start("a", [known])
        assert a.mesh.peers.get("sleeper") is not None
        assert a.mesh.peers.of("sleeper").wake_mac == mac


async def test_a_machine_to_be_woken_keeps_its_models_and_its_id_is_learnt(tmp_path: Path) -> None:
    mac = "02:00:00:00:00:01"
    async with lives(tmp_path) as world:
        b = await world.start("b")
        a = await world.start("a", [{"address": world.address("b"), "wake_mac": mac}])
        await world.joined(a, b)
        await world.until(lambda: a.mesh.peers.of("b").wake_mac == mac, "a knows which card is b's")
        await b.leave()
        await world.until(lambda: not a.sees(), "b is gone")
        assert a.mesh.peers.has("b:default")
        [outlook] = a.mesh.peers.outlooks("b:default", ())
        assert outlook.wake_ms > 0
        again = await world.start("b")
        await world.joined(a, again)
        [outlook] = a.mesh.peers.outlooks("b:default", ())
        assert outlook.wake_ms == 0
