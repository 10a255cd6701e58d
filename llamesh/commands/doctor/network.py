"""The doctor's look at the network: multicast, firewalls, peers.

Joining a multicast group has the system tell the network's switches so, as a node does at its start;
nothing else is sent. Nothing is joined where discovery isn't used.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import trio

from llamesh.commands.doctor.finding import Finding, Patient, bad, ok, warn
from llamesh.commands.reach import connect, explain, say_hello
from llamesh.config.settings import Settings
from llamesh.config.values import Address
from llamesh.mesh.identity import Identity, load_identity
from llamesh.mesh.interfaces import multicast_interfaces, read_interfaces
from llamesh.mesh.key_files import IdentityError
from llamesh.mesh.key_store import KeyStore
from llamesh.mesh.known_peers import KnownPeers, known_peers

# RFC 6762, 3.
_MDNS_PORT = 5353
_GROUP_4, _GROUP_6 = "224.0.0.251", "ff02::fb"

PEER_SECONDS = 2.5
_MOST_PEERS = 64


async def look_at_multicast(patient: Patient) -> list[Finding]:
    """Whether mDNS can work on each interface that is to be used."""
    settings = patient.settings
    if settings is None:
        return []
    if not settings.cluster.enabled:
        return [ok("cluster.enabled is false: no other nodes are looked for")]
    found: list[Finding] = []
    if settings.cluster.discovery.mdns:
        found = await trio.to_thread.run_sync(_multicast, settings, abandon_on_cancel=True)
    else:
        found.append(ok("cluster.discovery.mdns is false: peers are those of cluster.peers"))
    return [*found, *_firewalls(settings, patient.root)]


def _multicast(settings: Settings) -> list[Finding]:
    interfaces = settings.cluster.discovery.interfaces
    words = multicast_interfaces(read_interfaces(), interfaces)
    if not words:
        remedy = "name interfaces in cluster.discovery.interfaces, or peers in cluster.peers"
        return [warn(f"no interface takes multicast ({', '.join(interfaces)})", remedy)]
    return [_join(word) for word in words]


def _join(word: str | int) -> Finding:
    """One interface: an IPv4 address, or the number of one for IPv6."""
    name = word if isinstance(word, str) else f"IPv6 on {_name_of(word)}"
    try:
        if isinstance(word, str):
            with _udp(socket.AF_INET) as sock:
                group = socket.inet_aton(_GROUP_4) + socket.inet_aton(word)
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        else:
            with _udp(socket.AF_INET6) as sock:
                group = socket.inet_pton(socket.AF_INET6, _GROUP_6) + struct.pack("@I", word)
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group)
    except OSError as error:
        return warn(
            f"multicast doesn't work on {name}: {error.strerror or error}",
            "is another program holding UDP port 5353 for itself? cluster.peers needs no multicast",
        )
    return ok(f"multicast works on {name}")


def _udp(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("", _MDNS_PORT))
    except OSError:
        sock.close()
        raise
    return sock


def _name_of(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"interface {index}"


def _firewalls(settings: Settings, root: Path) -> Iterator[Finding]:
    """A hint where one is on: what it lets through can't be told without being root."""
    port = (settings.cluster.listen_addr or settings.listen_addr).port
    try:
        ufw = "ENABLED=yes" in (root / "etc/ufw/ufw.conf").read_text()
    except (OSError, UnicodeDecodeError):
        ufw = False
    if ufw:
        yield ok("ufw is on", f"unless it was done: ufw allow 5353/udp; ufw allow {port}/tcp")
    if (root / "run/firewalld").exists():
        words = f"firewall-cmd --permanent --add-service=mdns --add-port={port}/tcp; firewall-cmd --reload"
        yield ok("firewalld is on", f"unless it was done: {words}")


async def look_at_peers(patient: Patient) -> list[Finding]:
    """Each static peer: its name, its port, and the handshake; or what a running node knows of all."""
    settings = patient.settings
    if settings is None or not settings.cluster.enabled:
        return []
    if patient.state:
        return list(_from_state(patient.state))
    peers = [peer.address for peer in settings.cluster.peers]
    if not peers:
        return [ok("cluster.peers names none: peers are found by discovery, or find this node")]
    if patient.runs:
        return [warn("the running node doesn't tell its state without a key", "set LLAMESH_API_KEY")]
    try:
        known = await trio.to_thread.run_sync(_own, settings, patient.environ)
    except IdentityError as error:
        return [bad(f"{error.path}: {error.problem}", error.remedy)]
    found: dict[Address, Finding] = {}

    async def look(address: Address) -> None:
        found[address] = await _peer(address, known)

    async with trio.open_nursery() as nursery:
        for address in peers[:_MOST_PEERS]:
            nursery.start_soon(look, address)
    more = len(peers) - _MOST_PEERS
    left = [ok(f"{more} more peers weren't looked at")] if more > 0 else []
    return [*(found[address] for address in peers[:_MOST_PEERS]), *left]


def _own(settings: Settings, environ: Mapping[str, str]) -> tuple[Identity, KnownPeers] | None:
    """This node's keys, None where there are none yet: they aren't made for a look."""
    store = KeyStore(settings, environ)
    if store.existing_token() is None or not (store.key_from_environment or store.key_path.exists()):
        return None
    return load_identity(settings, environ), known_peers(settings)


async def _peer(address: Address, own: tuple[Identity, KnownPeers] | None) -> Finding:
    with trio.move_on_after(PEER_SECONDS):
        if own is None:
            return await _port(address)
        identity, known = own
        outcome = await say_hello(address, identity, lambda claim: known.check(claim, identity))
        if outcome.claim is not None:
            return ok(f"{address}: {outcome.words}")
        return bad(f"{address}: {outcome.words}")
    return bad(
        f"{address}: no answer within {PEER_SECONDS:g} s",
        f"is that machine on, and does a firewall there let port {address.port} through?",
    )


async def _port(address: Address) -> Finding:
    try:
        sock = await connect(address)
    except OSError as error:
        return bad(f"{address}: {explain(error, address)}")
    sock.close()
    return ok(f"{address}: something listens there; this node has no key and token yet to ask who")


def _from_state(state: Mapping[str, Any]) -> Iterator[Finding]:
    others = [node for node in state.get("nodes", ()) if not node.get("self")]
    if not others:
        yield ok("the running node knows no other node at present")
    for node in others:
        yield _node(node)
    for concern in state.get("attention", ()):
        say = bad if concern.get("level") == "error" else warn
        yield say(f"{concern.get('node')}: {concern.get('text')}", str(concern.get("fix") or ""))


def _node(node: Mapping[str, Any]) -> Finding:
    name, status, link = node.get("id"), node.get("status"), node.get("link") or {}
    if status == "asleep":
        return ok(f"{name} is asleep")
    if status != "alive":
        return warn(f"{name} isn't answering ({status})", "is that machine on, and reachable from here?")
    if link.get("breaker") == "open":
        return warn(f"{name} is left alone for a while after failures: {link.get('problem') or 'no reason'}")
    if link.get("problem") and not link.get("connections"):
        return warn(f"{name} is known, but can't be reached directly: {link['problem']}")
    trip = link.get("round_trip_ms")
    return ok(f"{name} is alive" + (f", {trip:.1f} ms away" if isinstance(trip, (int, float)) else ""))
