"""mDNS for real, on loopback and between network namespaces; and with a zeroconf that misbehaves."""

from __future__ import annotations

import contextlib
import errno
import json
import secrets
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from llamesh.config.sections import Discovery as Settings
from llamesh.config.values import Address
from llamesh.mesh import discovery as module
from llamesh.mesh.discovery import Discovery, Sighting
from llamesh.mesh.mdns import Notice
from llamesh.mesh.sighting import Record
from tests.support.netns import network

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 30.0


@pytest.fixture
def service() -> str:
    """A service of this test's own: others may run on the same loopback."""
    return f"_t{secrets.token_hex(5)}._tcp.local"


class Node:
    """A discovery and what it has seen."""

    def __init__(self, service: str, node_id: str, **more: Any) -> None:
        self.addresses: tuple[str, ...] = ("127.0.0.1",)
        self.events: list[tuple[str, str]] = []
        self.present: dict[str, Sighting] = {}
        self._changed = trio.Event()
        settings = Settings(service_name=service, interfaces=("127.0.0.1",), mdns=more.pop("mdns", True))
        values: dict[str, Any] = {"port": 4000, "txt": {"wire": "1"}, "look_every": 0.05, **more}
        self.discovery = Discovery(
            settings,
            node_id=node_id,
            addresses=lambda: self.addresses,
            on_found=self._found,
            on_lost=self._lost,
            **values,
        )

    def _found(self, sighting: Sighting) -> None:
        self.present[sighting.node_id] = sighting
        self._note("found", sighting.node_id)

    def _lost(self, node_id: str) -> None:
        del self.present[node_id]
        self._note("lost", node_id)

    def _note(self, *event: str) -> None:
        self.events.append((event[0], event[1]))
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE_SECONDS):
            while not condition():
                await self._changed.wait()

    def hosts(self, node_id: str) -> list[str]:
        return (
            [address.host for address in self.present[node_id].addresses] if node_id in self.present else []
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: self.discovery.run(task_status=task_status))
            yield
            nursery.cancel_scope.cancel()


async def test_two_nodes_find_each_other_and_not_themselves(service: str) -> None:
    one, two = (
        Node(service, "one", port=4001, txt={"wire": "1", "key": "abc"}),
        Node(service, "two.lan", port=4002),
    )
    async with one.running():
        async with two.running():
            await one.until(lambda: "two.lan" in one.present)
            await two.until(lambda: "one" in two.present)
            assert two.present["one"] == Sighting(
                "one", (Address("127.0.0.1", 4001),), {"wire": "1", "key": "abc"}
            )
            assert one.hosts("two.lan") == ["127.0.0.1"]
            # A change is told, without a goodbye in between, and nothing old is left in it.
            two.addresses = ("127.0.0.2", "fd00::2")
            await one.until(lambda: one.hosts("two.lan") == ["127.0.0.2", "fd00::2"])
            # Nowhere to be reached: it is there no more, and sees the others still.
            two.addresses = ()
            await one.until(lambda: "two.lan" not in one.present)
            two.addresses = ("127.0.0.3",)
            await one.until(lambda: one.hosts("two.lan") == ["127.0.0.3"])
        await one.until(lambda: "two.lan" not in one.present)
    assert [event for event in one.events if event[1] != "two.lan"] == []
    assert [event for event in two.events if event[1] != "one"] == []
    assert one.events.count(("lost", "two.lan")) == 2


async def test_two_nodes_that_are_called_the_same_are_two(service: str) -> None:
    """Clones of one machine: neither takes the other for itself, whatever the handshake will say."""
    one, two, witness = Node(service, "box"), Node(service, "box"), Node(service, "witness")
    async with witness.running(), one.running():
        await witness.until(lambda: "box" in witness.present)
        async with two.running():
            await one.until(lambda: "box" in one.present)
            await two.until(lambda: "box" in two.present)
        await one.until(lambda: "box" not in one.present)
        assert "box" in witness.present  # the first one is still there


async def test_other_interfaces_are_joined_anew(service: str) -> None:
    now: list[tuple[str | int, ...]] = [("127.0.0.1",)]
    one, two = Node(service, "one", interfaces=lambda: now[0]), Node(service, "two")
    async with one.running(), two.running():
        await one.until(lambda: "two" in one.present)
        await two.until(lambda: "one" in two.present)
        now[0] = ("127.0.0.9",)  # another address of loopback; the same group
        await two.until(lambda: two.events[-2:] == [("lost", "one"), ("found", "one")])
        assert one.events == [("found", "two")]


def spawn(prefix: Sequence[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", "tests.mesh.mdns_node", *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


class Process:
    """A node in a process of its own, and its lines as they come."""

    def __init__(self, prefix: Sequence[str], *arguments: str) -> None:
        self._process = spawn(prefix, *arguments)
        self._lines: list[list[Any]] = []
        self._condition = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._condition:
                self._lines.append(json.loads(line))
                self._condition.notify_all()

    def wait_for(self, *event: object) -> None:
        with self._condition:
            told = self._condition.wait_for(lambda: list(event) in self._lines, PATIENCE_SECONDS)
            assert told, f"no {event}, only {self._lines}"

    def finish(self) -> None:
        """Ask it to end; it must do so by itself."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE_SECONDS) == 0
        self.wait_for("ended")

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait(PATIENCE_SECONDS)
        self._reader.join(PATIENCE_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def test_two_processes_on_loopback(service: str) -> None:
    here = (service, "127.0.0.1", "0.0.0.0")
    with Process((), "one", "4001", *here) as one, Process((), "two", "4002", *here) as two:
        one.wait_for("found", "two", ["127.0.0.1:4002"])
        two.wait_for("found", "one", ["127.0.0.1:4001"])
        two.finish()
        one.wait_for("lost", "two")
        one.finish()


def test_machines_on_a_network(service: str) -> None:
    """With the default `all`, over IPv4 and IPv6; a cable that is pulled and put back."""
    with network("a", "b", "c") as net:
        a, b, c = net["a"], net["b"], net["c"]
        with (
            Process(a.prefix, "a", "4001", service, "all", "0.0.0.0") as one,
            Process(b.prefix, "b", "4002", service, "all", "::") as two,
        ):
            one.wait_for("found", "b", [f"[{b.ip6}]:4002"])
            two.wait_for("found", "a", [f"{a.ip}:4001"])
            net.cut("b")
            with Process(c.prefix, "c", "4003", service, "eth0", c.ip) as three:
                one.wait_for("found", "c", [f"{c.ip}:4003"])
                net.heal()
                two.wait_for("found", "c", [f"{c.ip}:4003"])
                three.wait_for("found", "b", [f"[{b.ip6}]:4002"])
                three.finish()
            one.wait_for("lost", "c")
            two.wait_for("lost", "c")
            one.finish()
            two.finish()


class Fake:
    """A presence that does what it is told, from threads like the real one."""

    def __init__(self) -> None:
        self.opened = self.closed = 0
        self.failing: Exception | None = None
        self.hang = threading.Event()
        self.hanging = ""
        self.announced: list[Sequence[str]] = []
        self.records: dict[str, Record] = {}
        self.late: dict[str, Record] = {}
        self.notice: Notice = lambda name, gone: None

    def _pass(self, what: str) -> None:
        if self.failing is not None:
            raise self.failing
        if self.hanging == what:
            self.hang.wait(PATIENCE_SECONDS)

    def open(self, interfaces: Sequence[str | int], notice: Notice) -> None:
        self.opened += 1
        self.notice = notice
        self._pass("open")

    def announce(self, addresses: Sequence[str]) -> None:
        self._pass("announce")
        self.announced.append(addresses)

    def look(self, name: str, *, ask: bool) -> Record | None:
        return self.records.get(name) or (self.late.get(name) if ask else None)

    def close(self) -> None:
        self._pass("close")
        self.closed += 1


Warnings = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def warnings(capsys: pytest.CaptureFixture[str]) -> Warnings:
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


async def until(condition: Callable[[], bool]) -> None:
    """For what happens in threads."""
    with trio.fail_after(PATIENCE_SECONDS):
        while not condition():
            await trio.testing.wait_all_tasks_blocked(0.005)


@pytest.mark.parametrize(
    ("failing", "said"),
    [
        (OSError(errno.ENODEV, "No such device"), "No such device"),
        (OSError(errno.EADDRINUSE, "Address already in use"), "5353"),
        (RuntimeError("No adapter found"), "No adapter found"),
        (AssertionError(), "AssertionError"),
    ],
)
async def test_what_breaks_is_one_warning_and_tried_again(
    failing: Exception, said: str, warnings: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    fake = Fake()
    fake.failing = failing
    node = Node("_x._tcp.local", "one", presence=lambda: fake)
    async with node.running():
        await until(lambda: fake.opened >= 4)
        (warning,) = warnings()
        assert said in warning["error"]
        assert "cluster.discovery.interfaces" in warning["todo"]
        fake.failing = None
        await until(lambda: fake.announced == [("127.0.0.1",)])
        # Since it has worked, the next trouble is news.
        fake.failing = OSError(errno.ENETDOWN, "Network is down")
        node.addresses = ("127.0.0.2",)
        count = fake.opened
        await until(lambda: fake.opened > count + 2)
        assert len(warnings()) == 1
        fake.failing = None
        await until(lambda: fake.announced[1:] == [("127.0.0.2",)])
        closed = fake.closed
    assert fake.closed == closed + 1


async def test_a_cable_that_is_back_ends_the_waiting(warnings: Warnings) -> None:
    fake = Fake()
    now: list[tuple[str | int, ...]] = [()]
    node = Node("_x._tcp.local", "one", presence=lambda: fake, interfaces=lambda: now[0])
    async with node.running():
        await trio.testing.wait_all_tasks_blocked()
        now[0] = ("127.0.0.1",)
        await until(lambda: fake.announced != [])
    assert len(warnings()) == 1


async def test_no_interface_is_a_warning(warnings: Warnings) -> None:
    node = Node("_x._tcp.local", "one", presence=Fake, interfaces=lambda: ())
    async with node.running():
        await trio.testing.wait_all_tasks_blocked()
    (warning,) = warnings()
    assert "no network interface" in warning["error"]
    assert "127.0.0.1" in warning["error"]


async def test_switched_off_it_does_nothing() -> None:
    fake = Fake()
    node = Node("_x._tcp.local", "one", presence=lambda: fake, mdns=False)
    with trio.fail_after(PATIENCE_SECONDS):
        await node.discovery.run()
    assert fake.opened == 0


@pytest.mark.parametrize("hanging", ["open", "announce", "close"])
async def test_ending_is_bounded_whatever_hangs(hanging: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.05)
    fake = Fake()
    fake.hanging = hanging
    node = Node("_x._tcp.local", "one", presence=lambda: fake)
    try:
        with trio.fail_after(PATIENCE_SECONDS):
            async with node.running():
                await until(lambda: fake.opened == 1)
                await trio.testing.wait_all_tasks_blocked()
    finally:
        fake.hang.set()


async def test_what_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, warnings: Warnings) -> None:
    monkeypatch.setattr(module, "_CALL_SECONDS", 0.05)
    fake = Fake()
    fake.hanging = "announce"
    node = Node("_x._tcp.local", "one", presence=lambda: fake)
    try:
        async with node.running():
            await until(lambda: fake.closed == 1)
        (warning,) = warnings()
        assert "no answer" in warning["error"]
    finally:
        fake.hang.set()


def seen(node_id: str, host: str = "127.0.0.1") -> Record:
    return Record("x.local.", 80, (host,), {b"id": node_id.encode()})


async def test_strangers_fill_nothing_and_break_nothing() -> None:
    fake = Fake()
    node = Node("_x._tcp.local", "one", presence=lambda: fake)
    async with node.running():
        await until(lambda: fake.announced != [])
        for number in range(module.MOST_SIGHTINGS + 100):
            fake.records[f"n{number}"] = seen(f"id{number}")
        fake.records |= {"evil": seen("../x"), "empty": Record("x.", 80, (), {})}
        for name in ("evil", "empty", *list(fake.records)[: module.MOST_SIGHTINGS - 2]):
            fake.notice(name, False)
        await until(lambda: len(node.present) == module.MOST_SIGHTINGS - 2)
        for name in fake.records:  # more than fits: the rest is dropped
            fake.notice(name, False)
        await until(lambda: len(node.present) == module.MOST_SIGHTINGS)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert len(node.present) == module.MOST_SIGHTINGS
        for name in ("n0", "unknown"):
            fake.notice(name, True)
        await until(lambda: "id0" not in node.present)
        # The same node under two names is gone with the second one only.
        fake.records["again"] = seen("id1")
        fake.notice("again", False)
        await until(lambda: node.events.count(("found", "id1")) == 2)
        fake.notice("n1", True)
        fake.notice("n2", True)
        await until(lambda: "id2" not in node.present)
        assert "id1" in node.present
        # A name that changes whose it is.
        fake.records["again"] = seen("other")
        fake.notice("again", False)
        await until(lambda: "other" in node.present)
        assert "id1" not in node.present
    fake.notice("after the end", False)


async def test_who_stays_away_after_a_change_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AGAIN_SECONDS", 0.2)
    fake = Fake()
    fake.records = {"stays": seen("stays"), "leaves": seen("leaves")}
    now: list[tuple[str | int, ...]] = [("127.0.0.1",)]
    node = Node("_x._tcp.local", "one", presence=lambda: fake, interfaces=lambda: now[0])
    async with node.running():
        await until(lambda: len(fake.announced) == 1)
        for name in fake.records:
            fake.notice(name, False)
        await node.until(lambda: len(node.present) == 2)
        now[0] = ("127.0.0.2",)
        await until(lambda: len(fake.announced) == 2)
        fake.notice("stays", False)
        await node.until(lambda: len(node.present) == 1)
    assert node.events[2:] == [("lost", "leaves")]
    assert fake.closed == 2


async def test_an_announcement_in_pieces_is_asked_for() -> None:
    fake = Fake()
    fake.late["slow"] = seen("slow")
    node = Node("_x._tcp.local", "one", presence=lambda: fake)
    async with node.running():
        await until(lambda: fake.announced != [])
        for name in ("slow", "nobody"):
            fake.notice(name, False)
        await node.until(lambda: "slow" in node.present)


async def test_loopback_is_neither_announced_nor_believed_elsewhere() -> None:
    fake = Fake()
    node = Node("_x._tcp.local", "one", presence=lambda: fake, interfaces=lambda: ("192.0.2.1", 7))
    node.addresses = ("127.0.0.1", "192.0.2.1", "::1")
    fake.records = {"bad": seen("bad"), "good": seen("good", "192.0.2.2")}
    async with node.running():
        await until(lambda: fake.announced == [("192.0.2.1",)])
        for name in fake.records:
            fake.notice(name, False)
        await node.until(lambda: "good" in node.present)
    assert node.events == [("found", "good")]


async def test_a_defect_of_the_caller_is_not_taken_for_broken_multicast() -> None:
    fake = Fake()
    fake.records["x"] = seen("x")

    def broken(_: Sighting) -> None:
        raise ZeroDivisionError

    node = Node("_x._tcp.local", "one", presence=lambda: fake)
    node.discovery._on_found = broken
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with node.running():
            await until(lambda: fake.announced != [])
            fake.notice("x", False)
            await trio.sleep_forever()


def test_the_package_is_imported_only_when_it_is_used() -> None:
    program = "import sys, llamesh.mesh.discovery; print('zeroconf' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "False", done.stderr
