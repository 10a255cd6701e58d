"""Which addresses are announced: by tables, by a made-up /sys, on this machine, in a network namespace."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import psutil
import pytest

from llamesh.mesh.interfaces import (
    MOST_ADDRESSES,
    Interface,
    Kind,
    announceable,
    broadcast_addresses,
    kind_of,
    multicast_interfaces,
    reachable_addresses,
    read_interfaces,
)
from tests.support.netns import network

LO = Interface("lo", ("127.0.0.1", "::1"), "loopback", index=1)
ETH = Interface(
    "eth0", ("192.0.2.7", "fd00::7", "2001:db8::7", "fe80::7%eth0"), index=2, broadcasts=("192.0.2.255",)
)
DOCKER = Interface("docker0", ("172.17.0.1", "fe80::1%docker0"), "guest", index=3)
VETH = Interface("v0", ("10.9.0.2", "fe80::9%v0"), "pair", index=4)
VPN = Interface("wg0", ("100.64.0.3",), index=5, multicast=False)
OFF = Interface("eth1", ("192.0.2.99",), up=False, index=6, broadcasts=("192.0.2.255",))
CABLE = Interface("eth2", ("169.254.7.7", "fe80::77%eth2"), index=7)
TABLE = (LO, ETH, DOCKER, VETH, VPN, OFF)


@pytest.mark.parametrize(
    ("table", "interfaces", "listen", "expected"),
    [
        # An address is the whole answer, whatever else there is.
        (TABLE, ["all"], "192.0.2.7", ("192.0.2.7",)),
        (TABLE, ["docker0"], "192.0.2.7", ("192.0.2.7",)),
        (TABLE, ["all"], "127.0.0.1", ("127.0.0.1",)),
        (TABLE, ["all"], "::1", ("::1",)),
        ((), ["all"], "fe80::7%eth0", ("fe80::7%eth0",)),
        (TABLE, ["all"], "localhost", ("127.0.0.1", "::1")),
        (TABLE, ["all"], "box.lan", ()),
        # A wildcard listens on its own version only.
        (TABLE, ["all"], "0.0.0.0", ("192.0.2.7", "100.64.0.3")),
        (TABLE, ["all"], "::", ("fd00::7", "2001:db8::7")),
        # Named: what it is doesn't matter, whether it is up does.
        (TABLE, ["docker0"], "0.0.0.0", ("172.17.0.1",)),
        (TABLE, ["docker0", "all"], "0.0.0.0", ("172.17.0.1", "192.0.2.7", "100.64.0.3")),
        (TABLE, ["v0"], "0.0.0.0", ("10.9.0.2",)),
        (TABLE, ["127.0.0.1"], "0.0.0.0", ("127.0.0.1",)),
        (TABLE, ["lo"], "::", ("::1",)),
        (TABLE, ["2001:db8::7"], "::", ("2001:db8::7",)),
        (TABLE, ["FE80::7"], "::", ("fe80::7%eth0",)),
        (TABLE, ["fe80::7%eth1"], "::", ()),
        (TABLE, ["eth1", "192.0.2.99", "nothing"], "0.0.0.0", ()),
        # Link-local where there is nothing else.
        ((LO, CABLE), ["all"], "0.0.0.0", ("169.254.7.7",)),
        ((LO, CABLE), ["all"], "::", ("fe80::77%eth2",)),
        ((LO, CABLE, ETH), ["all"], "0.0.0.0", ("192.0.2.7",)),
        # Inside a container, the pair is the way out; beside a real interface it isn't.
        ((LO, VETH, DOCKER), ["all"], "0.0.0.0", ("10.9.0.2",)),
        ((LO, DOCKER, OFF), ["all"], "0.0.0.0", ()),
    ],
)
def test_what_is_announced(
    table: tuple[Interface, ...], interfaces: list[str], listen: str, expected: tuple[str, ...]
) -> None:
    assert reachable_addresses(table, interfaces, listen) == expected


def test_no_more_than_a_few_are_announced() -> None:
    many = Interface("eth0", tuple(f"192.0.2.{number}" for number in range(1, 200)))
    assert len(reachable_addresses([many, many], ["all"], "0.0.0.0")) == MOST_ADDRESSES


def test_multicast_goes_through_what_is_chosen() -> None:
    assert multicast_interfaces(TABLE, ["all"]) == ("192.0.2.7", 2)
    assert multicast_interfaces(TABLE, ["127.0.0.1"]) == ("127.0.0.1",)
    assert multicast_interfaces(TABLE, ["lo"]) == ("127.0.0.1",)
    assert multicast_interfaces(TABLE, ["wg0", "eth1"]) == ()
    assert multicast_interfaces([Interface("x", ("fd00::1",), index=0)], ["all"]) == ()


def test_broadcasts_of_what_is_chosen() -> None:
    assert broadcast_addresses(TABLE, ["all"]) == ("192.0.2.255",)
    assert broadcast_addresses(TABLE, ["lo", "eth1"]) == ()


def sysfs(root: Path, name: str, *entries: str, **files: str) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        (folder / entry).mkdir(parents=True)
    for file, text in {"type": "1", "ifindex": "3", "iflink": "3", "uevent": "INTERFACE=x", **files}.items():
        (folder / file).write_text(text + "\n")


@pytest.mark.parametrize(
    ("name", "entries", "files", "kind"),
    [
        ("eth0", ["device"], {}, "outward"),
        ("eth0", ["device"], {"iflink": "9"}, "outward"),  # an SR-IOV function inside a virtual machine
        ("eth0", [], {"iflink": "9"}, "pair"),
        ("eth0", ["master"], {"iflink": "9"}, "guest"),
        ("eth0.5", ["lower_eth0"], {"iflink": "9", "uevent": "DEVTYPE=vlan"}, "outward"),
        ("mac0", ["lower_eth0"], {"iflink": "9"}, "outward"),
        ("wg0", [], {"type": "65534", "uevent": "DEVTYPE=wireguard"}, "outward"),
        ("tun0", [], {"type": "65534"}, "outward"),
        ("he-ipv6", [], {"type": "776", "iflink": "9"}, "outward"),
        ("br0", ["bridge", "brif"], {}, "guest"),
        ("br0", ["bridge", "brif/port0"], {}, "guest"),
        ("vmbr0", ["bridge", "brif/nic"], {}, "outward"),
        ("vmbr0", ["bridge", "brif/port0", "brif/bond0"], {}, "outward"),
        ("docker0", ["bridge", "brif/nic"], {}, "guest"),
        ("br-0123456789ab", ["bridge", "brif"], {}, "guest"),
        ("lo", [], {"type": "772"}, "loopback"),
    ],
)
def test_what_linux_says_of_an_interface(
    tmp_path: Path, name: str, entries: list[str], files: dict[str, str], kind: Kind
) -> None:
    sysfs(tmp_path, "nic", "device")
    sysfs(tmp_path, "bond0", "lower_nic")
    sysfs(tmp_path, "port0", iflink="9")
    sysfs(tmp_path, name, *entries, **files)
    assert kind_of(name, tmp_path) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("en0", "outward"),
        ("utun3", "outward"),
        ("bridge0", "outward"),  # Thunderbolt between two Macs
        ("bridge100", "guest"),
        ("vmnet8", "guest"),
        ("veth12ab", "guest"),
        ("lo0", "loopback"),
        ("../../etc", "outward"),
        ("..", "outward"),
    ],
)
def test_elsewhere_the_name_says_it(tmp_path: Path, name: str, kind: Kind) -> None:
    assert kind_of(name, tmp_path / "none") == kind


def test_apples_own_links_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kind_of("awdl0", tmp_path) == kind_of("llw0", tmp_path) == "guest"


def test_this_machine_is_read() -> None:
    table = read_interfaces()
    (loopback,) = [interface for interface in table if "127.0.0.1" in interface.addresses]
    assert (loopback.kind, loopback.up, loopback.multicast) == ("loopback", True, True)
    assert loopback.index == socket.if_nametoindex(loopback.name)
    assert announceable(["127.0.0.1"], "0.0.0.0") == ("127.0.0.1",)
    assert "127.0.0.1" not in announceable(["all"], "0.0.0.0")


def test_a_system_that_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError("no")

    monkeypatch.setattr(psutil, "net_if_addrs", refuse)
    assert announceable(["all"], "0.0.0.0") == ()


READ = """
import json, sys
from llamesh.mesh.interfaces import announceable, broadcast_addresses, read_interfaces
print(json.dumps([announceable(sys.argv[1:], "0.0.0.0"), announceable(sys.argv[1:], "::"),
                  broadcast_addresses(read_interfaces(), sys.argv[1:])]))
"""


def test_a_bridge_and_its_ports_are_not_announced_unless_named() -> None:
    with network("a", "b") as net:
        host = net["a"]
        for command in (
            "link add br0 type bridge",
            "link set br0 up",
            "address add 10.88.0.1/24 brd + dev br0",
            f"link add port0 type veth peer name inner netns {net['b'].namespace}",
            "link set port0 master br0 up",
            "address add 10.89.0.1/24 dev port0",
            "address add fd88::1/64 dev br0 nodad",
        ):
            host.run("ip", *command.split())
        net["b"].run("ip", "link", "set", "inner", "up")

        def seen(*interfaces: str) -> list[list[str]]:
            found: list[list[str]] = json.loads(host.run(sys.executable, "-c", READ, *interfaces))
            return found

        ours, others = seen("all"), seen("br0", "10.89.0.1")
        assert ours[:2] == [[host.ip], [host.ip6]]
        assert others == [["10.88.0.1", "10.89.0.1"], ["fd88::1"], ["10.88.0.255", "10.89.0.255"]]
        host.run("ip", "address", "del", f"{host.ip6}/64", "dev", "eth0")
        assert seen("all")[1] == [f"fe80::{host.ip6[-1]}%eth0"]
