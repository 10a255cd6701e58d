"""The networks that tests make for themselves: who hears whom, and that nothing of them is left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import netns
from tests.support.netns import Host, Network, network
from tests.support.tap import Tap

PORT = 8080
_SPACES = Path("/run/netns")
# What is lost takes this long to be missed.
_SILENCE_SECONDS = 0.3


@pytest.fixture
def net() -> Iterator[Network]:
    """Three hosts."""
    with network("a", "b", "c") as made:
        yield made


def hears(
    listener: Host, speaker: Host, *, six: bool = False, patience: float = netns.PATIENCE_SECONDS
) -> bool:
    """Whether a datagram from one host reaches another."""
    family, ip = (socket.AF_INET6, listener.ip6) if six else (socket.AF_INET, listener.ip)
    with (
        listener.make_socket(family, socket.SOCK_DGRAM) as ear,
        speaker.make_socket(family, socket.SOCK_DGRAM) as mouth,
    ):
        ear.bind((ip, PORT))
        deadline = time.monotonic() + patience
        ear.settimeout(0.02)
        while time.monotonic() < deadline:
            # Once more and again: the first may get lost while addresses are asked for.
            with contextlib.suppress(OSError):
                mouth.sendto(b"hello", (ip, PORT))
            with contextlib.suppress(TimeoutError):
                return ear.recv(5) == b"hello"
    return False


def deaf(listener: Host, speaker: Host, *, six: bool = False) -> bool:
    """Whether none does."""
    return not hears(listener, speaker, six=six, patience=_SILENCE_SECONDS)


def reached(listener: Host, dialler: Host) -> bool:
    """Whether a host can connect to another's port."""
    with listener.make_socket() as ear, dialler.make_socket() as mouth:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        ear.bind(("0.0.0.0", PORT))
        ear.listen()
        mouth.settimeout(_SILENCE_SECONDS)
        try:
            mouth.connect((listener.ip, PORT))
        except TimeoutError:
            return False
        return True


def links() -> set[str]:
    """The interfaces of the test's own namespace."""
    return {name for _, name in socket.if_nameindex()}


def test_all_hear_all_and_the_outside_is_not_touched() -> None:
    before = links()
    with network("a", "b", "c") as net:
        a, b, c = net.hosts.values()
        assert hears(a, b)
        assert hears(c, a, six=True)
        assert links() == before
        assert netns.inside(a.namespace, links) == {"lo", "eth0"}
        assert a.run("ip", "route", "get", b.ip).split()[2] == "eth0"
        with pytest.raises(AssertionError, match="unreachable"):
            a.run("ip", "route", "get", "192.0.2.1")
        namespaces = [host.namespace for host in net.hosts.values()]
        assert all((_SPACES / name).exists() for name in namespaces)
    assert not any((_SPACES / name).exists() for name in namespaces)
    assert links() == before


def test_a_failing_test_leaves_nothing() -> None:
    def fail() -> None:
        with network("a") as net:
            names.append(net["a"].namespace)
            raise ZeroDivisionError

    names: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fail()
    assert not (_SPACES / names[0]).exists()


def test_what_a_killed_run_left_is_swept_away(net: Network) -> None:
    source = (
        "from tests.support.netns import *\nwith network('a') as n: print(n['a'].namespace, flush=1); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        left = other.stdout.readline().strip()
        with network("x"):
            # It lives, so it is no leftover.
            assert (_SPACES / left).exists()
        other.send_signal(signal.SIGKILL)
    with network("x"):
        assert not (_SPACES / left).exists()
        assert (_SPACES / net["a"].namespace).exists()


def test_a_cut_host_has_no_carrier_until_it_heals(net: Network) -> None:
    a, b, c = net.hosts.values()
    net.cut("a")
    assert "NO-CARRIER" in a.run("ip", "link", "show", "eth0")
    assert deaf(a, b)
    assert hears(c, b)
    net.heal()
    assert hears(a, b)


def test_a_split_network_is_silent_between_its_parts(net: Network) -> None:
    a, b, c = net.hosts.values()
    net.split("ab", "c")
    assert hears(a, b)
    assert deaf(a, c)
    assert deaf(c, b, six=True)
    assert "NO-CARRIER" not in c.run("ip", "link", "show", "eth0")
    net.heal()
    assert hears(a, c)
    net.split("a", "b", "c")
    assert deaf(a, b)
    assert deaf(b, c)


def test_two_apart_both_hear_the_third(net: Network) -> None:
    a, b, c = net.hosts.values()
    net.apart("a", "c")
    assert deaf(a, c)
    assert deaf(c, a, six=True)
    assert hears(b, a)
    assert hears(c, b)
    net.heal()
    assert hears(c, a)


def test_behind_a_closed_door_one_dials_out_and_is_not_dialled(net: Network) -> None:
    a, b, _ = net.hosts.values()
    b.close_door(PORT)
    assert reached(a, b)
    assert not reached(b, a)
    assert reached(b, b)
    net.heal()
    assert reached(b, a)


def test_a_closed_door_ends_no_connection_that_goes_out(net: Network) -> None:
    a, b, _ = net.hosts.values()
    with a.make_socket() as listener:
        listener.bind(("0.0.0.0", PORT))
        listener.listen()
        with b.connect(PORT, a.ip) as out:
            b.close_door(PORT)
            sock, _address = listener.accept()
            with sock:
                out.sendall(b"hello")
                sock.sendall(sock.recv(5))
                assert out.recv(5) == b"hello"


def test_the_test_talks_to_a_host_by_a_tap(net: Network) -> None:
    a = net["a"]
    with a.make_socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with Tap(connect=lambda: a.connect(port)) as door:
            with socket.create_connection(("127.0.0.1", door.port), netns.PATIENCE_SECONDS) as sock:
                sock.sendall(b"hello")
                served, _ = listener.accept()
                with served:
                    served.sendall(served.recv(5).upper())
                    assert sock.recv(5) == b"HELLO"
            with pytest.raises(ConnectionRefusedError):
                a.connect(1)


def test_commands_run_there(net: Network) -> None:
    a = net["a"]
    namespace = "import os; print(os.stat('/proc/self/ns/net').st_ino, os.listdir('/sys/class/net'))"
    here = os.stat("/proc/self/ns/net").st_ino
    there, _, interfaces = a.run(sys.executable, "-c", namespace).partition(" ")
    assert int(there) == (_SPACES / a.namespace).stat().st_ino != here
    assert sorted(interfaces.strip()) == sorted("['lo', 'eth0']")


def test_a_capture_hears_both_directions(net: Network) -> None:
    a, b, c = net.hosts.values()
    with c.make_socket() as listener, net.capture("a") as near, net.capture("b") as far:
        listener.bind(("0.0.0.0", PORT))
        listener.listen()
        with a.connect(PORT, c.ip) as sock:
            served, _ = listener.accept()
            with served:
                served.settimeout(netns.PATIENCE_SECONDS)
                for word in (b"one", b"two", b"x" * 100_000):
                    sock.sendall(word)
                    got = b""
                    while len(got) < len(word):
                        got += served.recv(len(word))
                    assert got == word
                    served.sendall(b"heard")
                    assert sock.recv(5) == b"heard"
                deadline = time.monotonic() + netns.PATIENCE_SECONDS
                while near.tcp().count(b"heard") < 3:
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
        assert b"onetwo" + b"x" * 100_000 in near.tcp()
        assert b"heardheardheard" in near.tcp()
        assert b"one" not in far.tcp()
        assert near.lost() == 0
    assert b.ip.encode() not in near.tcp()
    assert any(frame[12:14] == b"\x08\x06" for frame in near.frames()), "no ARP"


def test_a_slow_link_loses_packets(net: Network) -> None:
    a, b, _ = net.hosts.values()
    net.slow("b", delay_ms=1, loss_percent=100)
    assert deaf(a, b)
    net.heal()
    assert hears(a, b)


def test_without_root_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    netns.why_not.cache_clear()
    try:
        with pytest.raises(pytest.skip.Exception, match="root"), network("a"):
            pass
    finally:
        netns.why_not.cache_clear()
