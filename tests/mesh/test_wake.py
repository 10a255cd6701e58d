"""The magic packet, and that it goes out: on loopback, and as a broadcast in a network namespace."""

from __future__ import annotations

import socket
import sys

import pytest

from llamesh.mesh.wake import magic_packet, send_wake, wake
from tests.support.netns import network

MAC = "aa:bb:cc:dd:ee:0f"
PACKET = b"\xff" * 6 + bytes.fromhex("aabbccddee0f") * 16


@pytest.mark.parametrize("mac", [MAC, MAC.upper(), MAC.replace(":", "-"), MAC.replace(":", "")])
def test_the_packet(mac: str) -> None:
    assert magic_packet(mac) == PACKET
    assert len(PACKET) == 102


@pytest.mark.parametrize("mac", ["", "aa:bb", "xx:bb:cc:dd:ee:ff", MAC + ":00"])
def test_what_is_no_mac_address(mac: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        magic_packet(mac)


async def test_it_is_sent() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sleeper:
        sleeper.bind(("127.0.0.1", 0))
        sleeper.settimeout(10)
        await send_wake(MAC, "127.0.0.1", sleeper.getsockname()[1])
        assert sleeper.recv(1000) == PACKET


async def test_nowhere_to_send_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refuse(mac: str, broadcast: str, port: int) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("llamesh.mesh.wake.send_wake", refuse)
    with pytest.raises(OSError, match="unreachable"):
        await wake(MAC, ["lo"])


WAKE = f"""
import sys, trio
from llamesh.mesh.wake import wake
print(*trio.run(wake, {MAC!r}, ["all"]))
"""


def test_it_reaches_every_host_of_the_network() -> None:
    with network("a", "b") as net, net["b"].make_socket(kind=socket.SOCK_DGRAM) as sleeper:
        sleeper.bind(("", 9))
        sleeper.settimeout(10)
        assert net["a"].run(sys.executable, "-c", WAKE).split() == ["10.77.0.255"]
        assert sleeper.recv(1000) == PACKET
