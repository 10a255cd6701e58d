"""Names of cluster.peers: looked up again and again, on a virtual clock; nothing stops for a bad one."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from llamesh.config.peers import StaticPeer
from llamesh.config.values import Address
from llamesh.mesh import static_peers
from llamesh.mesh.static_peers import (
    FIRST_RETRY_SECONDS,
    LOOKUP_SECONDS,
    REFRESH_SECONDS,
    StaticPeers,
    Target,
)


def peer(text: str) -> StaticPeer:
    return StaticPeer(Address.parse(text))


class Names:
    """A resolver to play with: hosts and what is answered; `asked` has the time of each question."""

    def __init__(self, **answers: list[str] | OSError | None) -> None:
        self.answers = answers
        self.asked: list[tuple[str, float]] = []

    async def __call__(self, host: str, port: int, family: int, kind: int, /) -> Sequence[Any]:
        self.asked.append((host, trio.current_time()))
        answer = self.answers[host]
        if answer is None:
            await trio.sleep_forever()
        if isinstance(answer, OSError):
            raise answer
        assert answer is not None
        return [
            (socket.AF_INET6, kind, 6, "", (text, port, 0, 0))
            if ":" in text
            else (socket.AF_INET, kind, 6, "", (text, port))
            for text in answer
        ]

    def times(self, host: str) -> list[float]:
        started = self.asked[0][1]
        return [round(at - started, 3) for name, at in self.asked if name == host]


class Log:
    """What `on_change` got, in words."""

    def __init__(self) -> None:
        self.changes: list[list[str]] = []

    def __call__(self, targets: tuple[Target, ...]) -> None:
        self.changes.append([f"{target.entry}={target.address}" for target in targets])


@asynccontextmanager
async def running(peers: Sequence[StaticPeer], resolve: Any, log: Log) -> AsyncIterator[StaticPeers]:
    found = StaticPeers(peers, log, resolve)
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: found.run(task_status=task_status))
        yield found
        nursery.cancel_scope.cancel()


Warnings = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def warnings(capsys: pytest.CaptureFixture[str]) -> Warnings:
    return lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]


async def test_addresses_are_there_at_once_and_never_looked_up(
    autojump_clock: trio.testing.MockClock,
) -> None:
    names, log = Names(), Log()
    peers = [peer("192.0.2.1:80"), peer("[fe80::1%eth0]:81"), peer("192.0.2.1:80")]
    async with running(peers, names, log) as found:
        assert log.changes == [["192.0.2.1:80=192.0.2.1:80", "[fe80::1%eth0]:81=[fe80::1%eth0]:81"]]
        await trio.sleep(100)
        assert [target.entry for target in found.targets] == peers[:2]
    assert len(log.changes) == 1
    assert names.asked == []


async def test_a_name_with_several_addresses_is_several_peers(
    autojump_clock: trio.testing.MockClock,
) -> None:
    names = Names(box=["192.0.2.9", "fd00::1", "192.0.2.1", "192.0.2.1", "0.0.0.0"])
    log = Log()
    async with running([peer("box:80")], names, log):
        await trio.sleep(1)
        assert log.changes == [["box:80=192.0.2.1:80", "box:80=192.0.2.9:80", "box:80=[fd00::1]:80"]]
        names.answers["box"] = ["fd00::1", "192.0.2.9", "192.0.2.1"]  # shuffled: no change
        await trio.sleep(REFRESH_SECONDS)
        assert len(log.changes) == 1
        names.answers["box"] = ["192.0.2.2"]
        await trio.sleep(REFRESH_SECONDS)
        assert log.changes[1:] == [["box:80=192.0.2.2:80"]]
    assert names.times("box") == [0, REFRESH_SECONDS, 2 * REFRESH_SECONDS]


async def test_a_bad_name_is_one_warning_and_holds_up_no_other(
    autojump_clock: trio.testing.MockClock, warnings: Warnings
) -> None:
    names = Names(bad=socket.gaierror(-2, "Name or service not known"), good=["192.0.2.1"])
    log = Log()
    async with running([peer("bad:80"), peer("good:80")], names, log):
        await trio.sleep(100)
        assert log.changes == [["good:80=192.0.2.1:80"]]
        (warning,) = warnings()
        assert warning["level"] == "warning"
        assert "cluster.peers" in warning["event"]
        assert (warning["peer"], warning["error"]) == ("bad:80", "Name or service not known")
        # Sooner than usual, then ever more rarely, but no more rarely than usual.
        assert names.times("bad") == [0, 1, 3, 7, 15, 31, 61, 91]
        names.answers["bad"] = ["192.0.2.7"]
        await trio.sleep(REFRESH_SECONDS)
        assert log.changes[-1] == ["bad:80=192.0.2.7:80", "good:80=192.0.2.1:80"]
        # It works, so the next failure is news again, and keeps what was known.
        names.answers["bad"] = OSError("broken")
        await trio.sleep(2 * REFRESH_SECONDS)
        (again,) = warnings()
        assert again["instead"] == "the addresses that it had"
        assert len(log.changes) == 2


@pytest.mark.parametrize("answer", [[], ["0.0.0.0", "ff02::1"], None])
async def test_no_answer_and_an_empty_one_are_failures(
    answer: list[str] | None, autojump_clock: trio.testing.MockClock, warnings: Warnings
) -> None:
    names, log = Names(box=answer), Log()
    async with running([peer("box:80")], names, log) as found:
        await trio.sleep(LOOKUP_SECONDS + FIRST_RETRY_SECONDS + 0.5)
        assert len(names.asked) >= 2
        assert found.targets == ()
    assert len(warnings()) == 1
    assert log.changes == []


async def test_a_name_that_stands_for_half_the_internet(autojump_clock: trio.testing.MockClock) -> None:
    names, log = Names(box=[f"10.0.{n >> 8}.{n & 255}" for n in range(1000)]), Log()
    async with running([peer("box:80")], names, log) as found:
        await trio.sleep(1)
        assert len(found.targets) == static_peers.MOST_PER_NAME


async def test_a_link_local_answer_keeps_its_scope(autojump_clock: trio.testing.MockClock) -> None:
    async def resolve(host: str, port: int, family: int, kind: int, /) -> Sequence[Any]:
        return [(socket.AF_INET6, kind, 6, "", ("fe80::1", port, 0, 3))]

    async with running([peer("box:80")], resolve, Log()) as found:
        await trio.sleep(1)
        assert [str(target.address) for target in found.targets] == ["[fe80::1%3]:80"]


async def test_a_hanging_resolver_holds_up_nothing(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock, warnings: Warnings
) -> None:
    release = threading.Event()
    asked: list[str] = []

    def hang(host: str, port: int, family: int, kind: int, /) -> list[Any]:
        asked.append(host)
        release.wait(30)
        raise socket.gaierror(-3, "late")

    monkeypatch.setattr(static_peers.socket, "getaddrinfo", hang)
    peers = [peer(f"box{number}:80") for number in range(100)]
    try:
        async with running([*peers, peer("192.0.2.1:80")], None, Log()) as found:
            await trio.sleep(LOOKUP_SECONDS + 1)
            assert len(found.targets) == 1
            assert await trio.to_thread.run_sync(lambda: "threads are left") == "threads are left"
    finally:
        release.set()
    assert 0 < len(asked) <= static_peers._MOST_LOOKUPS
    assert {line["error"] for line in warnings()} == {f"no answer within {LOOKUP_SECONDS:g} s"}


async def test_a_real_lookup() -> None:
    log = Log()
    async with running([peer("localhost:80")], None, log) as found:
        with trio.fail_after(20):
            while not found.targets:
                await trio.testing.wait_all_tasks_blocked(0.01)
    assert {target.address.is_loopback for target in found.targets} == {True}
