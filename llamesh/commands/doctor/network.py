"""The doctor's look at the network: multicast, firewalls, peers.

Joining a multicast group has the system tell the network's switches so, as a node does at its start;
nothing else is sent. Nothing is joined where discovery isn't used.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import trio

from llamesh.commands.doctor.files import other_owner
from llamesh.commands.doctor.finding import Finding, Patient, bad, ok, warn
from llamesh.commands.shared.dialling import connect, explain, say_hello
from llamesh.config.peers import StaticPeer
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
    """Each static peer: its name, its port, and the handshake. A running node is asked whom it knows; then
    the handshake is its own affair.
    """
    settings = patient.settings
    if settings is None or not settings.cluster.enabled:
        return []
    found = list(_from_state(patient.state)) if patient.state else []
    if patient.runs and not patient.state:
        found.append(warn("the running node doesn't tell its state without a key", "set LLAMESH_API_KEY"))
    peers = settings.cluster.peers
    if not peers:
        return found or [ok("cluster.peers names none: peers are found by discovery, or find this node")]
    own: tuple[Identity, KnownPeers] | None = None
    if not patient.runs:
        try:
            own = await trio.to_thread.run_sync(_own, settings, patient.environ)
        except IdentityError as error:
            return [*found, bad(f"{error.path}: {error.problem}", error.remedy)]
    answers: dict[StaticPeer, Finding] = {}

    async def look(peer: StaticPeer) -> None:
        answers[peer] = await _peer(peer, own, runs=patient.runs)

    async with trio.open_nursery() as nursery:
        for peer in peers[:_MOST_PEERS]:
            nursery.start_soon(look, peer)
    more = len(peers) - _MOST_PEERS
    left = [ok(f"{more} more peers weren't looked at")] if more > 0 else []
    return [*found, *(answers[peer] for peer in peers[:_MOST_PEERS]), *left]


def _own(settings: Settings, environ: Mapping[str, str]) -> tuple[Identity, KnownPeers] | None:
    """This node's keys; None where there are none yet, since they aren't made for a look, and where they are
    another user's, which the section on files tells.
    """
    store = KeyStore(settings, environ)
    if other_owner(store.directory) is not None:
        return None
    if store.existing_token() is None or not (store.key_from_environment or store.key_path.exists()):
        return None
    return load_identity(settings, environ), known_peers(settings)


async def _peer(peer: StaticPeer, own: tuple[Identity, KnownPeers] | None, *, runs: bool) -> Finding:
    """One peer. `own`: the keys to greet it with, None to see only whether its port is open."""
    address = peer.address
    # It may be asleep, and rightly so.
    say = bad if peer.wake_mac is None else warn
    with trio.move_on_after(PEER_SECONDS):
        if own is None:
            return await _port(address, say, runs=runs)
        identity, known = own
        outcome = await say_hello(address, identity, lambda claim: known.check(claim, identity))
        return (say if outcome.claim is None else ok)(f"{address}: {outcome.words}")
    return say(
        f"{address}: no answer within {PEER_SECONDS:g} s",
        f"is that machine on, and does a firewall there let port {address.port} through?",
    )


async def _port(address: Address, say: Callable[[str], Finding], *, runs: bool) -> Finding:
    try:
        sock = await connect(address)
    except OSError as error:
        return say(f"{address}: {explain(error, address)}")
    sock.close()
    who = "the running node knows who it is" if runs else "no key of this node is at hand to ask who"
    return ok(f"{address}: its port is open; {who}")


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
