"""Does this machine serve peers just now: what each source says, and what follows from all of them."""

from __future__ import annotations

import math
import os
import pty
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import trio

from llamesh.local import owner as module
from llamesh.local.owner import (
    Mode,
    Owner,
    idle_sources,
    logind_idle,
    macos_idle,
    runs_on_battery,
    terminals_idle,
)
from tests.support.node import wait_until


def looked(*idle: float | None, battery: bool = False) -> Owner:
    """An owner with sources that say this, after its first look."""
    made = Owner(idle=[lambda s=s: s for s in idle], on_battery=lambda: battery)  # type: ignore[misc]
    made.sample()
    return made


def broken() -> bool:
    raise RuntimeError("no such device")


class TestWilling:
    @pytest.mark.parametrize(
        ("owner", "mode", "reason"),
        [
            (looked(0.0, battery=True), "always", ""),
            (looked(math.inf), "never", "it does nothing for others (cluster.serve_peers is never)"),
            (looked(math.inf), "idle", ""),
            (looked(300.0), "idle", ""),
            (looked(299.4), "idle", "it was in use 299 s ago (cluster.serve_peers is idle)"),
            # Whoever was there last counts; a source that doesn't know says nothing.
            (looked(math.inf, 20.0), "idle", "it was in use 20 s ago (cluster.serve_peers is idle)"),
            (looked(None, 400.0), "idle", ""),
            # Who asks not to be disturbed isn't disturbed by chance.
            (
                looked(None),
                "idle",
                "it can't tell whether somebody uses it (cluster.serve_peers is idle; where nobody does, "
                "set it to always)",
            ),
            (looked(0.0), "on_power", ""),
            (
                looked(math.inf, battery=True),
                "on_power",
                "it runs on its battery (cluster.serve_peers is on_power)",
            ),
            (looked(math.inf, battery=True), "idle", ""),
        ],
    )
    def test_modes(self, owner: Owner, mode: Mode, reason: str) -> None:
        assert owner.willing(mode) == reason

    def test_before_the_first_look(self) -> None:
        owner = Owner(idle=[lambda: math.inf], on_battery=lambda: False)
        assert owner.willing("always") == ""
        for mode in ("idle", "on_power"):
            assert owner.willing(mode) == (  # type: ignore[arg-type]
                f"it doesn't know yet whether its owner needs it (cluster.serve_peers is {mode})"
            )

    def test_a_source_that_fails_doesn_t_hide_the_others(self) -> None:
        owner = Owner(idle=[broken, lambda: 500.0], on_battery=broken)
        owner.sample()
        assert owner.willing("idle") == ""
        assert owner.willing("on_power") == ""  # unknown is on mains

    def test_how_long_is_idle(self) -> None:
        owner = Owner(idle=[lambda: 40.0], on_battery=lambda: False, idle_after=30.0)
        owner.sample()
        assert owner.willing("idle") == ""


class TestRun:
    async def test_it_looks_while_the_mode_asks_for_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_LOOK_EVERY", 0.001)
        idle, looks, asked = 500.0, 0, 0
        mode: Mode = "always"

        def source() -> float:
            nonlocal looks
            looks += 1
            return idle

        def current_mode() -> Mode:
            nonlocal asked
            asked += 1
            return mode

        owner = Owner(idle=[source], on_battery=lambda: False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(owner.run, current_mode)
            await wait_until(lambda: asked > 3, "it doesn't ask for the mode")
            assert looks == 0
            mode = "idle"
            await wait_until(lambda: owner.willing("idle") == "", "it doesn't see that nobody is there")
            idle = 3.0
            in_use = "it was in use 3 s ago (cluster.serve_peers is idle)"
            await wait_until(lambda: owner.willing("idle") == in_use, "it doesn't see its owner")
            idle = 500.0
            await wait_until(lambda: owner.willing("idle") == "", "it doesn't see that nobody is there")
            mode, asked = "never", 0
            await wait_until(lambda: asked > 1, "it doesn't ask for the mode")
            before, asked = looks, 0
            await wait_until(lambda: asked > 3, "it doesn't ask for the mode")
            assert looks == before
            nursery.cancel_scope.cancel()


class TestTerminals:
    def test_the_one_that_was_used_last(self, tmp_path: Path) -> None:
        devices = [tmp_path / name for name in ("a", "b")]
        for device, touched in zip(devices, (1000.0, 1500.0), strict=True):
            device.touch()
            os.utime(device, (touched, 1999.0))  # output moves mtime only
        assert terminals_idle(devices, lambda: 2000.0) == 500
        assert terminals_idle([*devices, tmp_path / "closed"], lambda: 2000.0) == 500

    def test_none(self, tmp_path: Path) -> None:
        assert terminals_idle([], lambda: 2000.0) is None
        assert terminals_idle([tmp_path / "closed"], lambda: 2000.0) is None

    def test_a_clock_that_was_set_back(self, tmp_path: Path) -> None:
        device = tmp_path / "a"
        device.touch()
        os.utime(device, (5000.0, 5000.0))
        assert terminals_idle([device], lambda: 4990.0) == 0
        assert terminals_idle([device], lambda: 2000.0) is None

    def test_a_real_terminal_is_found(self) -> None:
        keyboard, terminal = pty.openpty()
        try:
            if not os.ttyname(terminal).startswith("/dev/pts/"):
                assert terminals_idle([Path(os.ttyname(terminal))]) is not None
                return
            seconds = terminals_idle()
            assert seconds is not None
            assert seconds < 60
        finally:
            os.close(keyboard)
            os.close(terminal)

    def test_users_without_a_pseudo_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        users = [SimpleNamespace(terminal="tty1"), SimpleNamespace(terminal=None)]
        monkeypatch.setattr(psutil, "users", lambda: users)
        assert Path("/dev/tty1") in module._terminals()


def says(text: str | None) -> Callable[[list[str]], str | None]:
    return lambda command: text


class TestLogind:
    @pytest.mark.parametrize(
        ("text", "idle"),
        [
            (None, None),
            ("", None),
            ("garbage\n", None),
            ("IdleHint=no\nIdleSinceHint=1700000000000000\n", 0),
            ("IdleHint=yes\nIdleSinceHint=1700000000000000\n", 400),
            # The clock was set back: it has just become idle.
            ("IdleHint=yes\nIdleSinceHint=1800000000000000\n", 0),
            # Nobody is logged in.
            ("IdleHint=yes\nIdleSinceHint=0\n", math.inf),
            ("IdleHint=yes\n", math.inf),
            ("IdleHint=yes\nIdleSinceHint=soon\n", math.inf),
        ],
    )
    def test_what_it_says(self, text: str | None, idle: float | None) -> None:
        assert logind_idle(says(text), lambda: 1_700_000_400.0) == idle


class TestMac:
    @pytest.mark.parametrize(
        ("text", "idle"),
        [
            (None, None),
            ("", None),
            ('+-o IOHIDSystem  <class IOHIDSystem>\n  {\n    "HIDIdleTime" = 2500000000\n  }\n', 2.5),
        ],
    )
    def test_what_ioreg_says(self, text: str | None, idle: float | None) -> None:
        assert macos_idle(says(text)) == idle


class TestPrograms:
    def script(self, directory: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
        program = directory / "loginctl"
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:/usr/bin:/bin")

    def test_one_that_answers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script(tmp_path, monkeypatch, 'test "$1" = show-session && echo IdleHint=no')
        assert logind_idle() == 0

    def test_one_that_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script(tmp_path, monkeypatch, "echo IdleHint=no; exit 1")
        assert logind_idle() is None

    def test_one_that_can_t_be_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.script(tmp_path, monkeypatch, "")
        (tmp_path / "loginctl").write_text("#!/no/such/shell\n")
        assert logind_idle() is None

    def test_one_that_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "_PATIENCE", 0.05)
        self.script(tmp_path, monkeypatch, "exec sleep 30")
        assert logind_idle() is None

    def test_none_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        assert macos_idle() is None


@pytest.mark.parametrize(
    ("battery", "on_battery"),
    [
        (None, False),
        (SimpleNamespace(power_plugged=None), False),
        (SimpleNamespace(power_plugged=True), False),
        (SimpleNamespace(power_plugged=False), True),
    ],
)
def test_power(battery: Any, on_battery: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: battery, raising=False)
    assert runs_on_battery() is on_battery


@pytest.mark.parametrize(
    ("platform", "sources"),
    [("darwin", (macos_idle, terminals_idle)), ("linux", (logind_idle, terminals_idle))],
)
def test_each_platform_has_its_own(
    platform: str, sources: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert idle_sources() == sources


def test_a_real_look_never_raises() -> None:
    owner = Owner()
    owner.sample()
    for mode in ("idle", "on_power"):
        assert "yet" not in owner.willing(mode)  # type: ignore[arg-type]
