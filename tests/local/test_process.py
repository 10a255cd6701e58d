"""Real children, watched on every path that this system offers: the full one and the plain one."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import trio

from llamesh.local.output import LINE_CHARACTERS, TAIL_LINES, LineCutter, LogTail
from llamesh.local.process import Child, Platform

PLATFORMS = {"detected": Platform.detect(), "plain": Platform()}
PATIENCE = 20.0


@pytest.fixture(params=PLATFORMS)
def platform(request: pytest.FixtureRequest) -> Platform:
    name: str = request.param
    return PLATFORMS[name]


def spawn(script: str, platform: Platform, *, on_line: Callable[[str], None] | None = None) -> Child:
    """A Python child, which says what it says at once."""
    command = [sys.executable, "-u", "-c", textwrap.dedent(script)]
    return Child.spawn(command, env=os.environ, on_line=on_line, platform=platform)


def shell(script: str, platform: Platform) -> Child:
    return Child.spawn(["sh", "-c", script], env=os.environ, platform=platform)


async def until(condition: Callable[[], bool], what: str) -> None:
    with trio.move_on_after(PATIENCE):
        while not condition():
            await trio.sleep(0.005)
        return
    raise AssertionError(f"never happened: {what}")


def said(child: Child, text: str) -> Callable[[], bool]:
    return lambda: any(text in line for line in child.tail.lines())


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pid_from(child: Child) -> int:
    return int(next(line for line in child.tail.lines() if line.isdecimal()))


async def test_exit_code_and_last_words(platform: Platform) -> None:
    child = spawn("import sys; print('loading'); print('no memory', file=sys.stderr); sys.exit(3)", platform)
    assert repr(child) == f"<Child pid={child.pid} returncode=None>"
    assert await child.run() == 3
    assert child.returncode == 3
    assert await child.wait() == 3
    assert child.tail.lines() == ["loading", "no memory"]
    assert child.tail.last_words(1) == "no memory"
    assert not psutil.pid_exists(child.pid)


async def test_death_by_signal_is_negative(platform: Platform) -> None:
    child = spawn("import os; os.kill(os.getpid(), 9)", platform)
    assert await child.run() == -signal.SIGKILL


async def test_every_waiter_is_told(platform: Platform) -> None:
    child = shell("exit 7", platform)
    codes: list[int] = []

    async def wait() -> None:
        codes.append(await child.wait())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
        nursery.start_soon(child.run)
    assert codes == [7, 7]


async def test_own_group_and_nothing_on_stdin(platform: Platform) -> None:
    child = spawn("import os, sys; print(os.getpgrp() == os.getpid(), repr(sys.stdin.read()))", platform)
    assert await child.run() == 0
    assert child.tail.lines() == ["True ''"]


async def test_environment_and_directory_are_what_was_given(platform: Platform, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import os; print(os.environ.get('GIVEN'), 'HOME' in os.environ, os.getcwd())",
    ]
    child = Child.spawn(command, env={"GIVEN": "yes"}, cwd=tmp_path, platform=platform)
    assert await child.run() == 0
    assert child.tail.lines() == [f"yes False {tmp_path.resolve()}"]


def test_a_program_that_is_not_there(platform: Platform, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-server"):
        Child.spawn([str(tmp_path / "no-such-server")], env=os.environ, platform=platform)
    with pytest.raises(FileNotFoundError, match="no-such-server"):
        Child.spawn(["no-such-server"], env=os.environ, platform=platform)


def test_a_file_that_is_no_program(platform: Platform, tmp_path: Path) -> None:
    file = tmp_path / "server"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o644)
    with pytest.raises(PermissionError, match="server"):
        Child.spawn([str(file)], env=os.environ, platform=platform)
    with pytest.raises(PermissionError, match="Not an executable file"):
        Child.spawn([str(tmp_path)], env=os.environ, platform=platform)


async def test_a_relative_program_is_found_in_its_directory(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "server").write_text("#!/bin/sh\necho here\n")
    (tmp_path / "server").chmod(0o755)
    child = Child.spawn(["./server"], env=os.environ, cwd=tmp_path, platform=platform)
    assert await child.run() == 0
    assert child.tail.lines() == ["here"]


async def test_children_are_refused_off_the_main_thread(platform: Platform) -> None:
    with pytest.raises(RuntimeError, match="main thread"):
        await trio.to_thread.run_sync(lambda: shell("exit 0", platform))


async def test_run_is_for_one_task(platform: Platform) -> None:
    child = shell("exit 0", platform)
    await child.run()
    with pytest.raises(RuntimeError, match="before"):
        await child.run()


async def test_cancelled_run_kills_the_group_and_reaps(platform: Platform) -> None:
    child = shell("sleep 1000 & echo $!; wait", platform)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(lambda: bool(child.tail.lines()), "the grandchild's number")
        nursery.cancel_scope.cancel()
    assert child.returncode == -signal.SIGKILL
    assert await child.wait() == -signal.SIGKILL
    assert not is_running(pid_from(child))


async def test_run_cancelled_before_it_began(platform: Platform) -> None:
    child = shell("sleep 1000", platform)
    with trio.CancelScope() as scope:
        scope.cancel()
        await child.run()
    assert scope.cancelled_caught
    assert child.returncode == -signal.SIGKILL


async def test_a_wrappers_grandchild_does_not_stay(platform: Platform) -> None:
    child = shell("sleep 1000 & echo $!; exit 5", platform)
    assert await child.run() == 5
    assert not is_running(pid_from(child))


async def test_a_grandchild_that_holds_the_pipe_does_not_hold_us(platform: Platform) -> None:
    child = spawn(
        """
        import subprocess, sys
        other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        print(other.pid)
        """,
        platform,
    )
    with trio.fail_after(PATIENCE):
        assert await child.run() == 0
    stray = pid_from(child)
    assert is_running(stray)
    os.kill(stray, signal.SIGKILL)


async def test_stop_by_the_first_term(platform: Platform) -> None:
    child = shell("sleep 1000 & wait", platform)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await child.stop(grace=PATIENCE)
        assert child.returncode == -signal.SIGTERM


async def test_stop_by_the_second_term(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamesh.local.process.SECOND_TERM_SECONDS", 0.5)
    child = spawn(
        """
        import signal, sys
        seen = []
        def on_term(*_):
            seen.append(1)
            print('term', len(seen))
            if len(seen) == 2:
                sys.exit(0)
        signal.signal(signal.SIGTERM, on_term)
        print('ready')
        while True:
            signal.pause()
        """,
        platform,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(said(child, "ready"), "ready")
        await child.stop(grace=PATIENCE)
    assert child.returncode == 0
    assert child.tail.lines() == ["ready", "term 1", "term 2"]


async def test_stop_by_kill_for_one_that_ignores_term(platform: Platform) -> None:
    child = spawn(
        """
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print('ready')
        while True:
            signal.pause()
        """,
        platform,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        await until(said(child, "ready"), "ready")
        await child.stop(grace=0.1)
        assert child.returncode == -signal.SIGKILL


async def test_stop_is_not_cut_short_by_cancellation(platform: Platform) -> None:
    child = shell("sleep 1000", platform)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(child.run)
        with trio.CancelScope() as scope:
            scope.cancel()
            await child.stop(grace=PATIENCE)
        assert child.returncode == -signal.SIGTERM


async def test_signals_after_the_end_reach_nobody(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = shell("exit 0", platform)
    await child.run()
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "killpg", lambda group, number: sent.append((group, number)))
    child.terminate()
    child.kill()
    await child.stop(grace=1)
    assert sent == []


async def test_the_rest_of_the_group_is_killed_before_the_leader_is_reaped(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the leader is a zombie its number can't be anybody else's."""
    child = shell("exit 0", platform)
    states: list[str] = []
    real = os.killpg

    def killpg(group: int, number: int) -> None:
        if number:
            states.append(psutil.Process(group).status())
        real(group, number)

    monkeypatch.setattr(os, "killpg", killpg)
    await child.run()
    assert states == [psutil.STATUS_ZOMBIE]


async def test_signals_before_run(platform: Platform) -> None:
    child = shell("sleep 1000", platform)
    child.terminate()
    assert await child.run() == -signal.SIGTERM


async def test_a_listener_that_fails_does_not_stop_the_reader(platform: Platform) -> None:
    heard: list[str] = []

    def listen(line: str) -> None:
        heard.append(line)
        raise ValueError("can't read this")

    child = spawn("print('one'); print('two')", platform, on_line=listen)
    assert await child.run() == 0
    assert heard == ["one", "two"]
    assert child.tail.lines() == ["one", "[llamesh] a log reader failed: ValueError: can't read this", "two"]


async def test_a_flood_of_output_is_drained_and_bounded(platform: Platform) -> None:
    child = spawn(
        "import sys\nfor n in range(20000): print('line', n)\nsys.stdout.write('x' * 5_000_000)", platform
    )
    assert await child.run() == 0
    lines = child.tail.lines()
    assert len(lines) == TAIL_LINES
    assert lines[-2] == "line 19999"
    assert lines[-1] == "x" * LINE_CHARACTERS
    assert child.tail.total == 20001


async def test_no_descriptor_is_left_open(platform: Platform) -> None:
    await shell("exit 0", platform).run()
    gc.collect()
    before = psutil.Process().num_fds()
    for _ in range(5):
        await shell("exit 0", platform).run()
    gc.collect()
    assert psutil.Process().num_fds() <= before


async def test_the_child_dies_with_us(tmp_path: Path) -> None:
    """Only where the kernel does it: elsewhere the ledger of orphans cleans up."""
    if Platform.detect().setpriv is None:
        assert sys.platform != "linux" or not Path("/usr/bin/setpriv").exists()
        return
    script = """
        import os, sys, trio
        from llamesh.local.process import Child
        async def main():
            child = Child.spawn([sys.executable, '-c', 'import time; time.sleep(1000)'], env=os.environ)
            print(child.pid, flush=True)
            await child.run()
        trio.run(main)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(await trio.to_thread.run_sync(owner.stdout.readline))
        assert is_running(pid)
        owner.kill()
    await until(lambda: not is_running(pid), "the end of the orphan")


def test_detection_says_what_works() -> None:
    platform = Platform.detect()
    assert platform is Platform.detect()
    assert (platform.setpriv is None) or Path(platform.setpriv).exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_come_whole_however_they_are_cut(size: int) -> None:
    text = "eins\nzwei ✓\r\n\n40 %\r80 %\rfertig\nohne Ende"
    raw = text.encode()
    cutter = LineCutter()
    lines = [line for at in range(0, len(raw), size) for line in cutter.feed(raw[at : at + size])]
    lines += cutter.finish()
    assert lines == ["eins", "zwei ✓", "40 %", "80 %", "fertig", "ohne Ende"]


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        (b"\x1b[32mgreen\x1b[0m", "green"),
        (b"\x1b]0;title\x07text", "text"),
        (b"\x1b]0;never ended", ""),
        (b"a\x00b\x07c\x7f", "abc"),
        (b"tab\there", "tab here"),
        (b"not \xff utf-8", "not � utf-8"),
        ("left\u202eright\u2028next\x9b1m".encode(), "leftrightnext1m"),
        ("€".encode() * 5000, "€" * LINE_CHARACTERS),
        ("🦙".encode() * 5000, "🦙" * LINE_CHARACTERS),
    ],
)
def test_a_line_can_do_no_harm_on_a_terminal(raw: bytes, line: str) -> None:
    cutter = LineCutter()
    assert list(cutter.feed(raw + b"\n")) == ([line] if line else [])


def test_a_line_without_end_takes_no_memory() -> None:
    cutter = LineCutter()
    for _ in range(100):
        assert list(cutter.feed(b"y" * 65536)) == []
    assert list(cutter.feed(b"\nnext\n")) == ["y" * LINE_CHARACTERS, "next"]


def test_last_words() -> None:
    tail = LogTail()
    assert tail.last_words(3) == ""
    for n in range(TAIL_LINES + 10):
        tail.append(str(n))
    assert tail.last_words(2) == f"{TAIL_LINES + 8}\n{TAIL_LINES + 9}"
    assert tail.last_words(0) == ""
    assert tail.lines()[0] == "10"
