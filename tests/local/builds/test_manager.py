"""When a node builds, on the virtual clock; what a build does is played by the test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from llamesh.errors import Conflict
from llamesh.local.builds import manager
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.maker import Made, Progress
from llamesh.local.builds.manager import BuildManager
from llamesh.local.builds.record import Build
from tests.support.fake_project import plan_for
from tests.support.scripted import world

SAME = Build(key="a-b", commit="a" * 40)


class Player:
    """In the place of `make`: `results` in order, the last one repeated; `times` when it was asked."""

    def __init__(self, *results: Made | BuildFailed, seconds: float = 1.0) -> None:
        self.results = list(results)
        self.seconds = seconds
        self.times: list[float] = []
        self.start = trio.current_time()

    async def __call__(
        self, settings: Any, store: Any, environ: Any, progress: Progress, **more: Any
    ) -> Made:
        self.times.append(round(trio.current_time() - self.start))
        progress.key = "a-b"
        progress.enter("compiling")
        await trio.sleep(self.seconds)
        progress.enter("")
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        if isinstance(result, BuildFailed):
            raise result
        return result


async def at_once(function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return function(*arguments)


@asynccontextmanager
async def managed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, player: Player, **settings: Any
) -> AsyncIterator[BuildManager]:
    monkeypatch.setattr(manager, "make", player)
    # Threads take real time, in which the virtual clock would run on.
    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)
    (tmp_path / "source").mkdir(exist_ok=True)
    async with world() as here:
        one = BuildManager(plan_for(tmp_path / "source", tmp_path, **settings), here.pool, "node-a")
        player.start = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.run)
            yield one
            one.stop()


UNCHANGED = Made(SAME, changed=False)
FAILED = BuildFailed("compiling", "as told", command="cmake", exit_code=1, last_lines=["x"])


async def test_failures_at_the_start_are_tried_again_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    player = Player(FAILED, FAILED, FAILED, UNCHANGED)
    async with managed(tmp_path, monkeypatch, player) as one:
        await trio.sleep(500)
        # Each takes a second; then there is nothing to do any more.
        assert player.times == [0, 11, 32, 73]
        assert one.outcomes == {"failed": 3, "unchanged": 1}


async def test_later_failures_wait_for_the_next_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    player = Player(UNCHANGED, FAILED, UNCHANGED)
    async with managed(tmp_path, monkeypatch, player, auto_update_interval_seconds=1000) as one:
        await trio.sleep(3500)
        assert player.times == [0, 1001, 2002, 3003]
        assert one.document()["last"]["outcome"] == "unchanged"


async def test_it_is_told_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    player = Player(FAILED)
    async with managed(tmp_path, monkeypatch, player) as one:
        await trio.sleep(0.5)
        going_on = one.document()
        assert (going_on["state"], going_on["stage"]) == ("building", "compiling")
        with pytest.raises(Conflict, match="node-a is building already: compiling"):
            one.request()
        await trio.sleep(2)
        told = one.document()
        assert told["state"] == "idle"
        assert told["last"] | {"at": 0, "seconds": 0} == {
            "outcome": "failed",
            "at": 0,
            "seconds": 0,
            "commit": None,
            "error": "compiling: as told",
            "stage": "compiling",
            "command": "cmake",
            "exit_code": 1,
            "last_lines": ["x"],
        }
        # Asked for, it doesn't wait for the pause to end.
        one.request()
        with pytest.raises(Conflict):
            one.request()
        await trio.sleep(0.1)
        assert player.times == [0, 2]


async def test_stopped_it_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    player = Player(UNCHANGED, seconds=1000)
    async with managed(tmp_path, monkeypatch, player) as one:
        await trio.sleep(1)
        one.stop()
        await trio.sleep(500)
        assert player.times == [0]
        assert one.outcomes == {}
