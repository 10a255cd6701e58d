"""A network of its own for a test: hosts as network namespaces, joined by a switch that can be torn apart.

    with network("a", "b", "c") as net:               # skips the test where that isn't possible
        ...                                           # run [*net["a"].prefix, "llamesh", ...]
        with Tap(connect=lambda: net["a"].connect(8080)) as door: ...   # from the test into host a
        net.cut("a"); net.split("ab", "c"); net.apart("a", "c"); net.heal()

Every host has a loopback and an `eth0` with an IPv4 and two IPv6 addresses; the switch is a bridge in a
namespace of its own. Nothing is ever done to the namespace that the test itself is in, so real interfaces
are neither touched nor reached. It needs root, Linux and `ip` of iproute2.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

PATIENCE_SECONDS = 20.0

_PREFIX = "llamesh-test"
_SPACES = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_ETH_P_ALL = 3
_FRAME_BYTES = 1 << 17
_RECEIVE_BUFFER_BYTES = 32 << 20


class Host:
    """One machine of a network. `prefix` goes before a command that is to run there."""

    def __init__(self, namespace: str, number: int) -> None:
        self.namespace = namespace
        self.ip = f"10.77.0.{number}"
        self.ip6 = f"fd77::{number}"
        # Not `nsenter`: this one mounts a /sys that shows the host's own interfaces.
        self.prefix = ("ip", "netns", "exec", namespace)

    def run(self, *command: str) -> str:
        """Run a short command there; what it printed. Fails when it fails."""
        return _run(*self.prefix, *command)

    def make_socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket that belongs there, whoever uses it."""
        return inside(self.namespace, lambda: socket.socket(family, kind))

    def connect(self, port: int, ip: str = "127.0.0.1") -> socket.socket:
        """A TCP connection from there, by default to there. Raises OSError."""
        sock = self.make_socket(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        try:
            sock.settimeout(PATIENCE_SECONDS)
            sock.connect((ip, port))
        except OSError:
            sock.close()
            raise
        return sock

    def close_door(self, port: int) -> None:
        """Let nobody connect to this TCP port from outside, as behind a router: silence, not a refusal.

        The host itself still dials out. `Network.heal` opens it.
        """
        for version in ("-4", "-6"):
            # Packets to the own address are delivered by the rule 0: ours must come before it.
            _ip(version, "-n", self.namespace, "rule", "add", "pref", "2", "lookup", "local")
            condition = ("iif", "eth0", "ipproto", "tcp", "dport", str(port))
            _ip(version, "-n", self.namespace, "rule", "add", "pref", "1", *condition, "blackhole")
            _ip(version, "-n", self.namespace, "rule", "del", "pref", "0")

    def open_door(self) -> None:
        """Undo `close_door`."""
        for version in ("-4", "-6"):
            if "blackhole" in _ip(version, "-n", self.namespace, "rule"):
                _ip(version, "-n", self.namespace, "rule", "add", "pref", "0", "lookup", "local")
                for priority in ("1", "2"):
                    _ip(version, "-n", self.namespace, "rule", "del", "pref", priority)


class Network:
    """Hosts on one switch. Each change is done when the method returns; `heal` undoes them all."""

    def __init__(self, name: str, hosts: Collection[str]) -> None:
        self.hosts = {host: Host(f"{name}-{host}", number) for number, host in enumerate(hosts, 1)}
        self._switch = f"{name}-switch"
        self._bridges = 1

    def __getitem__(self, host: str) -> Host:
        return self.hosts[host]

    def cut(self, *hosts: str) -> None:
        """Pull the plug of these: their `eth0` has no carrier."""
        self._ports(hosts, "down")

    def split(self, *groups: Collection[str]) -> None:
        """Let each group (host names) hear only itself, without any sign of it at its interfaces."""
        for number, group in enumerate(groups):
            if number >= self._bridges:
                self._add_bridge(number)
            self._ports(group, "master", f"bridge{number}")

    def apart(self, *hosts: str) -> None:
        """Let none of these hear another of these; all others and they still hear each other."""
        self._ports(hosts, "type", "bridge_slave", "isolated", "on")

    def slow(self, host: str, *, delay_ms: float = 0, loss_percent: float = 0) -> None:
        """Delay what a host sends and lose a share of it. Skips the test where the kernel has no netem."""
        if (reason := netem_missing()) is not None:
            pytest.skip(reason)
        _run(
            *("tc", "-n", self[host].namespace, "qdisc", "replace", "dev", "eth0", "root", "netem"),
            *("delay", f"{delay_ms}ms", "loss", f"{loss_percent}%"),
        )

    def heal(self) -> None:
        """All hear all again, at full speed."""
        for name, host in self.hosts.items():
            host.open_door()
            self._ports([name], "type", "bridge_slave", "isolated", "off")
            self._ports([name], "master", "bridge0")
            self._ports([name], "up")
            # Who asked in vain for an address would ask again only after a second.
            _ip("-n", host.namespace, "neighbour", "flush", "dev", "eth0")
            if "netem" in _run("tc", "-n", host.namespace, "qdisc", "show", "dev", "eth0"):
                _run("tc", "-n", host.namespace, "qdisc", "del", "dev", "eth0", "root")

    @contextlib.contextmanager
    def capture(self, host: str) -> Iterator[Capture]:
        """Record what crosses the switch's port of a host, both ways, during the block."""
        sock = inside(
            self._switch,
            lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)),
        )
        with sock:
            # Beyond what an unprivileged program may ask for: a burst must not get lost.
            sock.setsockopt(socket.SOL_SOCKET, 33, _RECEIVE_BUFFER_BYTES)  # SO_RCVBUFFORCE
            sock.bind((f"to-{host}", _ETH_P_ALL))
            capture = Capture(sock)
            try:
                yield capture
            finally:
                capture.close()

    def build(self) -> None:
        """Make the namespaces and what is in them."""
        _ip("netns", "add", self._switch)
        self._add_bridge(0)
        for name, host in self.hosts.items():
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            ends = ("type", "veth", "peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", self._switch, "link", "add", f"to-{name}", *ends)
            self._ports([name], "master", "bridge0", "up")
            # Addresses by hand, without the second or two of asking whether somebody else has them.
            _ip("-n", host.namespace, "link", "set", "eth0", "addrgenmode", "none", "up")
            number = host.ip.rpartition(".")[2]
            for address in (f"{host.ip}/24", f"{host.ip6}/64", f"fe80::{number}/64"):
                extra = ("nodad",) if ":" in address else ()
                _ip("-n", host.namespace, "address", "add", address, "dev", "eth0", *extra)

    def tear_down(self) -> None:
        """Delete everything that is there of it; the links go with their namespaces."""
        for namespace in (self._switch, *(host.namespace for host in self.hosts.values())):
            if (_SPACES / namespace).exists():
                _ip("netns", "del", namespace)

    def _add_bridge(self, number: int) -> None:
        # Snooping would need a querier to keep multicast going; without it the bridge floods.
        _ip("-n", self._switch, "link", "add", f"bridge{number}", "type", "bridge", "mcast_snooping", "0")
        _ip("-n", self._switch, "link", "set", f"bridge{number}", "up")
        self._bridges = max(self._bridges, number + 1)

    def _ports(self, hosts: Collection[str], *words: str) -> None:
        for host in hosts:
            _ip("-n", self._switch, "link", "set", f"to-{host}", *words)


class Capture:
    """The frames that a packet socket sees, while it is open."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._frames: list[bytes] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()
        # So that the thread looks now and then whether it is wanted.
        sock.settimeout(0.05)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def frames(self) -> list[bytes]:
        """The whole frames so far."""
        with self._lock:
            return list(self._frames)

    def tcp(self) -> bytes:
        """What the TCP connections carried so far: each direction of each in one piece, in order of arrival.

        (A segment that was sent twice is there twice.)
        """
        flows: dict[bytes, bytearray] = {}
        for frame in self.frames():
            if (found := _tcp_of(frame)) is not None:
                flow, payload = found
                flows.setdefault(flow, bytearray()).extend(payload)
        return b"\0".join(map(bytes, flows.values()))

    def lost(self) -> int:
        """How many frames the kernel had to drop because we were slow. Reading it resets it."""
        # PACKET_STATISTICS of SOL_PACKET: seen, dropped.
        _, dropped = struct.unpack("II", self._sock.getsockopt(263, 6, 8))
        return int(dropped)

    def close(self) -> None:
        """Stop reading; the frames stay."""
        self._ended.set()
        self._thread.join(PATIENCE_SECONDS)

    def _read(self) -> None:
        while not self._ended.is_set():
            with contextlib.suppress(TimeoutError):
                frame = self._sock.recv(_FRAME_BYTES)
                with self._lock:
                    self._frames.append(frame)


@contextlib.contextmanager
def network(*hosts: str) -> Iterator[Network]:
    """A network of these hosts (short names, without blanks). Skips the test where there can't be one."""
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    _sweep()
    made = Network(f"{_PREFIX}-{os.getpid()}-{secrets.token_hex(2)}", hosts)
    try:
        made.build()
        yield made
    finally:
        made.tear_down()


@functools.cache
def why_not() -> str | None:
    """Why there can be no network namespaces here, None if there can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if shutil.which("ip") is None:
        return "there is no `ip` (of iproute2)"
    probe = Network(f"{_PREFIX}-{os.getpid()}-probe", ["x"])
    try:
        probe.build()
    except AssertionError as problem:
        return f"no network namespaces with veth and a bridge here: {problem}"
    finally:
        probe.tear_down()
    return None


@functools.cache
def netem_missing() -> str | None:
    """Why packets can't be delayed and lost here, None if they can."""
    if shutil.which("tc") is None:
        return "there is no `tc` (of iproute2)"
    probe = Network(f"{_PREFIX}-{os.getpid()}-netem", ["x"])
    try:
        probe.build()
        _run("tc", "-n", probe["x"].namespace, "qdisc", "add", "dev", "eth0", "root", "netem", "delay", "1ms")
    except AssertionError as problem:
        return f"this kernel has no netem: {problem}"
    finally:
        probe.tear_down()
    return None


def inside(namespace: str, action: Callable[[], T]) -> T:
    """Run `action` in a thread that is in this network namespace; its result, or its exception.

    Sockets that it makes stay in the namespace when they come out.
    """
    results, errors = list[T](), list[BaseException]()

    def work() -> None:
        try:
            with (_SPACES / namespace).open() as handle:
                _enter(handle.fileno())
            results.append(action())
        except BaseException as error:
            errors.append(error)

    # Never a thread of a pool: it doesn't come back from there.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if errors:
        raise errors[0]
    assert results, f"no end of {action} in {namespace}"
    return results[0]


def _enter(handle: int) -> None:
    # os.setns is there from Python 3.12 on.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(handle, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "can't enter the network namespace")


def _sweep() -> None:
    """Delete the namespaces of test runs that were killed."""
    for path in _SPACES.glob(f"{_PREFIX}-*") if _SPACES.is_dir() else ():
        owner = re.match(rf"{_PREFIX}-(\d+)-", path.name)
        if owner is not None and not Path(f"/proc/{owner[1]}").exists():
            # Two runs may sweep at once.
            with contextlib.suppress(AssertionError):
                _ip("netns", "del", path.name)


def _tcp_of(frame: bytes) -> tuple[bytes, bytes] | None:
    """Addresses and ports, and the payload, of an Ethernet frame with TCP in IP; None for any other."""
    kind, packet = frame[12:14], frame[14:]
    if kind == b"\x08\x00" and packet[9] == socket.IPPROTO_TCP:
        start, end = (packet[0] & 15) * 4, int.from_bytes(packet[2:4], "big")
        addresses = packet[12:20]
    elif kind == b"\x86\xdd" and packet[6] == socket.IPPROTO_TCP:
        start, end = 40, 40 + int.from_bytes(packet[4:6], "big")
        addresses = packet[8:40]
    else:
        return None
    segment = packet[start:end]
    return addresses + segment[:4], segment[(segment[12] >> 4) * 4 :]


def _ip(*words: str) -> str:
    return _run("ip", *words)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip() or done.returncode}"
    return done.stdout
