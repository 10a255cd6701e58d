"""What the service manager is told, over a real socket."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from llamesh.service import BadHandover, Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        yield sock


def heard(manager: socket.socket) -> list[dict[str, str]]:
    """The messages so far."""
    found = []
    while True:
        try:
            text = manager.recv(65536).decode()
        except BlockingIOError:
            return found
        found.append(dict(line.split("=", 1) for line in text.split("\n")))


def notifier(manager: socket.socket, **more: str) -> Notifier:
    environ = {"NOTIFY_SOCKET": str(manager.getsockname()), **more}
    made = Notifier.from_environment(environ)
    assert environ == {}  # no child speaks for us
    return made


async def test_without_a_manager_nothing_happens() -> None:
    alone = Notifier.from_environment({})
    alone.ready("well")
    alone.reloading()
    alone.stopping("", 1)
    await alone.run(lambda: "well")  # returns


async def test_a_life(manager: socket.socket) -> None:
    node = notifier(manager)
    node.ready("2 models")
    node.reloading()
    node.ready("3 models")
    node.stopping("finishing", 45)
    node.ready("too late")
    node.reloading()
    first, reload, again, end = heard(manager)
    assert first == {"READY": "1", "STATUS": "2 models"}
    assert (reload["RELOADING"], reload["STATUS"]) == ("1", "reloading")
    assert re.fullmatch("[0-9]+", reload["MONOTONIC_USEC"])
    assert again == {"READY": "1", "STATUS": "3 models"}
    assert end == {"STOPPING": "1", "STATUS": "finishing", "EXTEND_TIMEOUT_USEC": "45000000"}


async def test_an_abstract_socket(tmp_path: Path) -> None:
    name = f"llamesh-test-{tmp_path.name}-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        sock.setblocking(False)
        Notifier.from_environment({"NOTIFY_SOCKET": f"@{name}"}).ready("well")
        assert heard(sock) == [{"READY": "1", "STATUS": "well"}]


async def test_a_status_is_one_line_of_bounded_length(manager: socket.socket) -> None:
    notifier(manager).ready("a\nWATCHDOG=trigger\r\x00" + "ü" * 1000)
    [message] = heard(manager)
    assert set(message) == {"READY", "STATUS"}
    assert message["STATUS"].startswith("a WATCHDOG=trigger  ü")
    assert len(message["STATUS"].encode()) <= 400


async def test_the_watchdog_is_fed_twice_in_its_time(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    node = notifier(manager, WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getpid()))
    node.ready("well")
    heard(manager)
    with trio.move_on_after(9.1):
        await node.run(lambda: "well")
    assert heard(manager) == [{"WATCHDOG": "1"}] * 7


async def test_a_loop_that_hangs_isnt_fed(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    """Other tasks that are runnable all the time don't let it starve; a blocked loop does."""
    node = notifier(manager, WATCHDOG_USEC="3000000")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.run, lambda: "")
        await trio.sleep(2)
        assert {"WATCHDOG": "1"} in heard(manager)
        autojump_clock.jump(60)  # an hour of hanging passes like this: no task runs
        assert heard(manager) == []
        nursery.cancel_scope.cancel()


async def test_a_watchdog_for_another_process_isnt_ours(manager: socket.socket) -> None:
    node = notifier(manager, WATCHDOG_USEC="3000000", WATCHDOG_PID="1")
    assert node.watchdog_seconds is None


@pytest.mark.parametrize("value", ["0", str(2**64 - 1)])
async def test_a_watchdog_that_is_off(manager: socket.socket, value: str) -> None:
    assert notifier(manager, WATCHDOG_USEC=value).watchdog_seconds is None


async def test_the_status_is_told_when_it_changed(
    manager: socket.socket, autojump_clock: trio.testing.MockClock
) -> None:
    node = notifier(manager)
    status = "1 model"
    node.ready(status)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(node.run, lambda: status)
        await trio.sleep(20)
        assert heard(manager) == [{"READY": "1", "STATUS": "1 model"}]
        status = "2 models"
        await trio.sleep(20)
        assert heard(manager) == [{"STATUS": "2 models"}]
        nursery.cancel_scope.cancel()


async def test_what_cant_be_sent_is_sent_later_in_order(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "late"
    node = Notifier(str(path))
    async with trio.open_nursery() as nursery:
        node.ready("well")
        node.reloading()
        node.ready("well")
        nursery.start_soon(node.run, lambda: "well")
        await trio.sleep(30)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as late:
            late.bind(str(path))
            late.setblocking(False)
            await trio.sleep(30)
            kinds = [next(iter(message)) for message in heard(late)]
        assert kinds[:3] == ["READY", "RELOADING", "READY"]
        nursery.cancel_scope.cancel()
    # Said once, not at each try.
    assert capsys.readouterr().err.count("the service manager can't be told") == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NOTIFY_SOCKET", "vsock:2:1234"),
        ("NOTIFY_SOCKET", "relative/path"),
        ("NOTIFY_SOCKET", "/"),
        ("NOTIFY_SOCKET", "@"),
        ("NOTIFY_SOCKET", "/" + "a" * 200),
        ("WATCHDOG_USEC", "soon"),
        ("WATCHDOG_USEC", "-3"),
        ("WATCHDOG_USEC", str(2**64)),
        ("WATCHDOG_PID", "me"),
    ],
)
def test_what_isnt_understood_is_refused(name: str, value: str) -> None:
    environ = {"NOTIFY_SOCKET": "/run/systemd/notify", name: value}
    with pytest.raises(BadHandover, match=name):
        Notifier.from_environment(environ)
