"""Ports, multicast on loopback, firewalls, and peers that answer in every way."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamesh.commands.doctor import network
from llamesh.commands.doctor.network import look_at_multicast, look_at_peers
from llamesh.commands.doctor.ports import look_at_ports
from llamesh.config.values import Address
from llamesh.mesh.identity import Identity, load_identity
from tests.commands.doctor.patients import patient, said
from tests.commands.test_dialling import listening, node, saying, silent


@contextlib.contextmanager
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def test_addresses_to_listen_on(tmp_path: Path) -> None:
    [free, children] = await look_at_ports(patient(tmp_path, {"listen_addr": f"127.0.0.1:{free_port()}"}))
    assert (free.level, children.level) == ("ok", "ok")
    assert "is free" in free.text
    assert "any free port" in said(await look_at_ports(patient(tmp_path, {"listen_addr": "127.0.0.1:0"})))
    [elsewhere, _] = await look_at_ports(patient(tmp_path, {"listen_addr": "192.0.2.1:8080"}))
    assert elsewhere.level == "bad"
    assert "isn't an address of this machine" in elsewhere.text


async def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with taken() as port:
        ill = patient(tmp_path, {"listen_addr": f"127.0.0.1:{port}"})
        [found, _] = await look_at_ports(ill)
        assert found.level == "bad"
        assert f"sport = :{port}" in found.remedy
        [found, _] = await look_at_ports(replace(ill, version="1.0"))
        assert (found.level, found.text.endswith("a llamesh node runs there, version 1.0")) == ("ok", True)
        cluster = {"enabled": True, "listen_addr": f"127.0.0.1:{port}"}
        [_, peers, _] = await look_at_ports(
            patient(tmp_path, {"listen_addr": "127.0.0.1:0", "cluster": cluster})
        )
        assert peers.level == "bad"
        assert "cluster.listen_addr" in peers.text


async def test_a_name_that_means_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    [found, _] = await look_at_ports(patient(tmp_path, {"listen_addr": "nowhere:8080"}))
    assert (found.level, "can't be resolved" in found.text) == ("bad", True)


async def test_ports_for_children(tmp_path: Path) -> None:
    with taken() as one, taken() as two:
        both = patient(tmp_path, {"listen_addr": "127.0.0.1:0", "llama_cpp_ports": {"ports": [one, two]}})
        [_, found] = await look_at_ports(both)
        assert (found.level, found.text) == ("bad", "0 of 2 llama_cpp_ports are free")
        assert (await look_at_ports(replace(both, version="1")))[1].level == "ok"
        some = {"ports": [one, free_port()]}
        [_, found] = await look_at_ports(
            patient(tmp_path, {"listen_addr": "127.0.0.1:0", "llama_cpp_ports": some})
        )
        assert (found.level, found.text) == ("warn", "1 of 2 llama_cpp_ports are free")


# Multicast: on loopback only.


def discovering(tmp_path: Path, **discovery: Any) -> Any:
    return patient(tmp_path, {"cluster": {"enabled": True, "discovery": discovery}})


async def test_multicast_on_loopback(tmp_path: Path) -> None:
    [found] = await look_at_multicast(discovering(tmp_path, interfaces="127.0.0.1"))
    assert (found.level, found.text) == ("ok", "multicast works on 127.0.0.1")


async def test_multicast_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [found] = await look_at_multicast(discovering(tmp_path, interfaces="no-such-interface"))
    assert (found.level, "no interface takes multicast (no-such-interface)" in found.text) == ("warn", True)

    def held(*_: Any) -> Any:
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(network, "_udp", held)
    [found] = await look_at_multicast(discovering(tmp_path, interfaces="127.0.0.1"))
    assert (found.level, "Address already in use" in found.text) == ("warn", True)


async def test_nothing_is_joined_where_nothing_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "read_interfaces", None)
    assert [one.level for one in await look_at_multicast(patient(tmp_path))] == ["ok"]
    assert "mdns is false" in said(await look_at_multicast(discovering(tmp_path, mdns=False)))


async def test_firewalls_are_named_with_what_to_let_through(tmp_path: Path) -> None:
    ill = discovering(tmp_path, mdns=False)
    (ill.root / "etc/ufw").mkdir(parents=True)
    (ill.root / "etc/ufw/ufw.conf").write_text("LOGLEVEL=low\nENABLED=yes\n")
    (ill.root / "run/firewalld").mkdir(parents=True)
    found = said(await look_at_multicast(ill))
    assert "ufw allow 8080/tcp" in found
    assert "--add-port=8080/tcp" in found


# Peers.


def with_peers(tmp_path: Path, *addresses: Address) -> Any:
    peers = [str(address) for address in addresses]
    return patient(tmp_path, {"node_id": "me", "cluster": {"enabled": True, "peers": peers}})


def keys_of(ill: Any) -> Identity:
    return load_identity(ill.settings, ill.environ)


async def test_peers_that_answer_and_those_that_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "PEER_SECONDS", 1.0)
    mine = keys_of(with_peers(tmp_path))
    friend = Identity("friend", os.urandom(32), mine.token)
    stranger = Identity("stranger", os.urandom(32), b"u" * 32)
    refused = Address("127.0.0.1", free_port())
    async with (
        listening(node(friend)) as good,
        listening(node(stranger)) as other,
        listening(saying(b"SSH-2.0-OpenSSH_9\r\n")) as ssh,
        listening(silent) as mute,
    ):
        found = await look_at_peers(with_peers(tmp_path, good, other, ssh, mute, refused))
    assert [one.level for one in found] == ["ok", "bad", "bad", "bad", "bad"]
    for one, words in zip(
        found,
        ("reached friend", "the token is refused", "another program's", "no answer", "connection refused"),
        strict=True,
    ):
        assert words in one.text
    pins = tmp_path / "keys" / "known_peers"
    assert not pins.exists()  # looked at, not believed for good


async def test_no_keys_are_made_for_a_look(tmp_path: Path) -> None:
    with taken() as port:
        gone = Address("127.0.0.1", free_port())
        found = await look_at_peers(with_peers(tmp_path, Address("127.0.0.1", port), gone))
    assert [one.level for one in found] == ["ok", "bad"]
    assert "no key of this node is at hand" in found[0].text
    assert "connection refused" in found[1].text
    assert not (tmp_path / "keys").exists()


async def test_keys_that_others_can_read_are_not_used(tmp_path: Path) -> None:
    ill = with_peers(tmp_path, Address("127.0.0.1", 1))
    keys_of(ill)
    (tmp_path / "keys" / "node.key").chmod(0o644)
    [found] = await look_at_peers(ill)
    assert found.level == "bad"
    assert "chmod 600" in found.remedy


async def test_peers_of_nobody(tmp_path: Path) -> None:
    assert await look_at_peers(patient(tmp_path)) == []
    [none] = await look_at_peers(with_peers(tmp_path))
    assert none.level == "ok"
    gone = Address("127.0.0.1", free_port())
    [locked, peer] = await look_at_peers(replace(with_peers(tmp_path, gone), version="1"))
    assert (locked.level, locked.remedy) == ("warn", "set LLAMESH_API_KEY")
    assert (peer.level, "connection refused" in peer.text) == ("bad", True)


async def test_a_peer_that_may_be_asleep(tmp_path: Path) -> None:
    entry = {"address": f"127.0.0.1:{free_port()}", "wake_mac": "aa:bb:cc:dd:ee:ff"}
    [found] = await look_at_peers(patient(tmp_path, {"cluster": {"enabled": True, "peers": [entry]}}))
    assert (found.level, "connection refused" in found.text) == ("warn", True)


async def test_a_running_node_whose_peer_listens(tmp_path: Path) -> None:
    with taken() as port:
        ill = with_peers(tmp_path, Address("127.0.0.1", port))
        state = {"nodes": [{"id": "me", "self": True}], "attention": []}
        found = await look_at_peers(replace(ill, version="1", state=state))
    assert [one.level for one in found] == ["ok", "ok"]
    assert "its port is open" in found[1].text


async def test_what_a_running_node_knows(tmp_path: Path) -> None:
    state = {
        "nodes": [
            {"id": "me", "self": True},
            {"id": "near", "status": "alive", "link": {"round_trip_ms": 1.25, "connections": 2}},
            {"id": "dark", "status": "suspect", "link": None},
            {"id": "late", "status": "alive", "link": {"breaker": "open", "problem": "timed out"}},
            {"id": "far", "status": "alive", "link": {"connections": 0, "problem": "no way"}},
            {"id": "nas", "status": "asleep"},
        ],
        "attention": [
            {"level": "error", "node": "near", "text": "out of memory", "fix": "a smaller context"},
            {"level": "warning", "node": "near", "text": "version skew", "fix": ""},
        ],
    }
    found = await look_at_peers(replace(with_peers(tmp_path), version="1", state=state))
    assert [one.level for one in found] == ["ok", "warn", "warn", "warn", "ok", "bad", "warn"]
    assert found[0].text == "near is alive, 1.2 ms away"
    assert found[5].remedy == "a smaller context"
    alone = replace(with_peers(tmp_path), state={"nodes": [{"id": "me", "self": True}], "attention": []})
    assert "no other node" in said(await look_at_peers(alone))
