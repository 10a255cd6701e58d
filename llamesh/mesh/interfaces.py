"""Under which addresses other machines may reach this one, and which interfaces multicast goes through.

Reading and deciding are apart. `read_interfaces` asks the system once and says of each
interface what it is; the other functions are pure and work on such a table.

`cluster.discovery.interfaces` names interfaces or addresses. `all` stands for what leads to
other machines: real interfaces, tunnels of VPNs, and bridges that a real interface is part of.
Loopback, and bridges and interfaces of containers and virtual machines, are left out unless
they are named.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

#: What an interface is. `guest` belongs to containers or virtual machines. `pair` is one end of a virtual
#: cable: inside a container it is the way out, elsewhere it leads to a container.
Kind = Literal["outward", "loopback", "guest", "pair"]

#: More are not announced, and not believed when another node announces them.
MOST_ADDRESSES = 16

ALL = "all"

_SYSFS = Path("/sys/class/net")
_ETHERNET = "1"  # ARPHRD_ETHER
# As container engines, hypervisors and their network plugins name what they make.
_GUEST_NAMES = re.compile(
    r"(docker|veth|podman|cni|cbr|virbr|vnet|lxc|lxd|incus|cali|flannel|cilium|weave|kube|nodelocal|nerdctl"
    r"|br-[0-9a-f]{12}$|vmnet|vmenet|vboxnet|bridge\d{3,}$)"
)
# Apple's own links between devices; they carry link-local addresses that lead nowhere.
_APPLE_NAMES = re.compile(r"(awdl|llw|anpi|ap\d)")


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface. `addresses` are IP texts, IPv4 first, link-local IPv6 with its `%scope`;
    `broadcasts` the IPv4 broadcast addresses; `index` is the system's number for it, 0 when unknown."""

    name: str
    addresses: tuple[str, ...]
    kind: Kind = "outward"
    up: bool = True
    index: int = 0
    multicast: bool = True
    broadcasts: tuple[str, ...] = ()


def announceable(interfaces: Sequence[str], listen_host: str) -> tuple[str, ...]:
    """The addresses under which other nodes may reach a listener on `listen_host` at present.

    See `reachable_addresses` for the rules. Takes about a millisecond; the answer changes as cables and
    networks come and go.
    """
    return reachable_addresses(read_interfaces(), interfaces, listen_host)


def reachable_addresses(
    table: Iterable[Interface], interfaces: Sequence[str], listen_host: str
) -> tuple[str, ...]:
    """The IP texts to announce, at most MOST_ADDRESSES.

    A `listen_host` that is one address is the whole answer. For a wildcard (`0.0.0.0` listens on IPv4
    only, `::` on IPv6 only) it is what the chosen interfaces have. Link-local addresses, IPv6 with their
    `%scope`, count only where there is nothing else. `localhost` means both loopback addresses; of another
    name nothing is known here: pass what the socket is bound to.
    """
    bound = _parsed(listen_host)
    if bound is None:
        return ("127.0.0.1", "::1") if listen_host.lower().rstrip(".") == "localhost" else ()
    if not bound.is_unspecified:
        return (str(bound),)
    found = [
        address
        for _, text in _chosen(table, interfaces)
        if (address := _parsed(text)) is not None and address.version == bound.version and _usable(address)
    ]
    far = [address for address in found if not address.is_link_local]
    return tuple(dict.fromkeys(str(address) for address in far or found))[:MOST_ADDRESSES]


def multicast_interfaces(table: Iterable[Interface], interfaces: Sequence[str]) -> tuple[str | int, ...]:
    """The chosen interfaces as zeroconf wants them: IPv4 addresses, and the interfaces' numbers for IPv6.

    Those that can't multicast are left out, and IPv6 on loopback, where zeroconf can't.
    """
    words: list[str | int] = []
    for interface, text in _chosen(table, interfaces):
        address = _parsed(text) if interface.multicast else None
        if address is not None and address.version == 4:
            words.append(text)
        elif address is not None and interface.index and not address.is_loopback:
            words.append(interface.index)
    return tuple(dict.fromkeys(words))


def broadcast_addresses(table: Iterable[Interface], interfaces: Sequence[str]) -> tuple[str, ...]:
    """The IPv4 broadcast addresses of the chosen interfaces."""
    chosen = [interface for interface, _ in _chosen(table, interfaces)]
    return tuple(dict.fromkeys(text for interface in chosen for text in interface.broadcasts))


def _chosen(table: Iterable[Interface], interfaces: Sequence[str]) -> list[tuple[Interface, str]]:
    """Interfaces that are up and chosen, each with one address that is chosen on it."""
    present = [interface for interface in table if interface.up]
    taken: list[tuple[Interface, str]] = []
    for word in interfaces:
        if word == ALL:
            # Where pairs are all there is, we are inside a container, and they are its way out.
            outward = [one for one in present if one.kind == "outward" and one.addresses]
            outward = outward or [one for one in present if one.kind == "pair"]
            taken += [(one, text) for one in outward for text in one.addresses]
        elif (named := _parsed(word)) is not None:
            taken += [(one, text) for one in present for text in one.addresses if _same(text, named)]
        else:
            taken += [(one, text) for one in present if one.name == word for text in one.addresses]
    return list(dict.fromkeys(taken))


def _parsed(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _same(text: str, named: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    # `fe80::1` names the address on whichever interface has it.
    scoped = getattr(named, "scope_id", None) is not None
    return (text if scoped else text.partition("%")[0]) == str(named)


def _usable(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return not (address.is_unspecified or address.is_multicast)


def read_interfaces(sysfs: Path = _SYSFS) -> tuple[Interface, ...]:
    """The machine's interfaces at this moment. Empty where the system doesn't say."""
    try:
        addresses, states = psutil.net_if_addrs(), psutil.net_if_stats()
    except OSError:
        return ()
    table = []
    for name, entries in addresses.items():
        texts = [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        state = states.get(name)
        kind = kind_of(name, sysfs)
        if texts and all((address := _parsed(text)) and address.is_loopback for text in texts):
            kind = "loopback"  # the one sure sign outside Linux, where names differ
        table.append(
            Interface(
                name,
                tuple(sorted(texts, key=lambda text: ":" in text)),
                kind,
                up=state is not None and state.isup,
                index=_index(name),
                # Loopback doesn't say so on Linux, and does it.
                multicast=kind == "loopback" or state is None or "multicast" in (state.flags or "multicast"),
                broadcasts=tuple(
                    found
                    for entry in entries
                    if entry.family == socket.AF_INET
                    and (found := _broadcast(entry.address, entry.netmask, entry.broadcast))
                ),
            )
        )
    return tuple(table)


def _broadcast(address: str, netmask: str | None, broadcast: str | None) -> str | None:
    if not broadcast or broadcast != address:
        return broadcast
    # Linux gives the address itself where none was set.
    network = ipaddress.IPv4Network(f"{address}/{netmask or 32}", strict=False)
    return str(network.broadcast_address) if network.prefixlen < 31 else None


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:  # gone since it was listed
        return 0


def kind_of(name: str, sysfs: Path = _SYSFS) -> Kind:
    """What the interface is, by Linux's `/sys/class/net/NAME`, and by its name where that doesn't say.

    A bridge with a real interface among its ports is the way to the local network, as hypervisors set it
    up. A virtual Ethernet pair shows itself by a link (`iflink`) to another interface that is neither
    below it here (`lower_*`) nor named by a type of its own (`DEVTYPE` in `uevent`).
    """
    if _GUEST_NAMES.match(name) or (sys.platform == "darwin" and _APPLE_NAMES.match(name)):
        return "guest"
    if re.fullmatch(r"lo\d*", name):
        return "loopback"
    # A name can't hold a slash, but what `..` would lead to is no interface.
    folder = sysfs / name
    if "/" in name or name in (".", "..") or not folder.is_dir():
        return "outward"
    if (folder / "bridge").is_dir():
        ports = [port.name for port in _listed(folder / "brif")]
        return "outward" if any(_leads_out(port, sysfs) for port in ports) else "guest"
    if _is_pair(folder):
        return "guest" if (folder / "master").exists() else "pair"
    return "outward"


def _leads_out(port: str, sysfs: Path) -> bool:
    # Hardware has a `device`; a bond or a VLAN has what is below it.
    folder = sysfs / port
    if _GUEST_NAMES.match(port):
        return False
    return (folder / "device").exists() or any(
        (sysfs / entry.name.removeprefix("lower_") / "device").exists()
        for entry in _listed(folder)
        if entry.name.startswith("lower_")
    )


def _is_pair(folder: Path) -> bool:
    link, index = _line(folder / "iflink"), _line(folder / "ifindex")
    if not link or link == index or _line(folder / "type") != _ETHERNET or (folder / "device").exists():
        return False
    typed = "DEVTYPE=" in _line(folder / "uevent")
    return not typed and not any(entry.name.startswith("lower_") for entry in _listed(folder))


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):  # not on this kernel, or gone since
        return ""


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
