"""Owners that really die by SIGKILL, and what the next start finds of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from llamesh.local.orphans import Ledger, Swept
from llamesh.local.process import has_ended

PATIENCE = 20.0
LONG = "import time; time.sleep(1000)"
# An owner without pdeathsig: it starts a child in a group of its own, notes it, says so, and waits.
OWNER = """
    import subprocess, sys, time
    from pathlib import Path
    from llamesh.local.orphans import Ledger
    ledger = Ledger(Path(sys.argv[1]))
    child = subprocess.Popen(sys.argv[2:], process_group=0, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert ledger.record(child.pid) is None
    print(child.pid, flush=True)
    if 'sh' in sys.argv[2]:
        print(child.stdout.readline().decode(), end='', flush=True)
    time.sleep(1000)
"""


class Owner:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.child = self.number()

    def number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def die(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def owner_of(directory: Path, *command: str) -> Iterator[Owner]:
    argv = [sys.executable, "-c", textwrap.dedent(OWNER), str(directory), *command]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        owner = Owner(process)
        try:
            yield owner
        finally:
            process.kill()
            with suppress(ProcessLookupError):
                os.killpg(owner.child, signal.SIGKILL)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "children"


@pytest.fixture
def bystander() -> Iterator[subprocess.Popen[bytes]]:
    """A process of somebody else that leads its own group."""
    with subprocess.Popen([sys.executable, "-c", LONG], process_group=0) as process:
        yield process
        process.kill()


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and not has_ended(psutil.Process(pid))


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} goes on"
        time.sleep(0.002)


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def page(pid: object, started: object, *, owner: object = 999_999_999, session: object = None) -> str:
    """A ledger file as a dead owner left it, unless told otherwise."""
    document = {
        "owner": {"pid": owner, "started": 1.0, "session": os.getsid(0) if session is None else session},
        "children": [{"pid": pid, "started": started}],
    }
    return json.dumps(document)


def leave(directory: Path, text: str, name: str = "node-999999999-1.00.json") -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / name
    path.write_text(text)
    return path


def test_nothing_to_sweep(directory: Path) -> None:
    assert Ledger(directory).sweep() == Swept()
    assert not directory.exists()


def test_the_child_of_a_dead_owner_is_killed(directory: Path) -> None:
    with owner_of(directory, sys.executable, "-c", LONG) as owner:
        owner.die()
        assert is_running(owner.child)
        assert Ledger(directory).sweep() == Swept(killed=(owner.child,))
        assert not is_running(owner.child)
        assert files(directory) == []


def test_the_child_of_a_living_owner_is_left_alone(directory: Path) -> None:
    with owner_of(directory, sys.executable, "-c", LONG) as owner:
        before = [(path, path.read_text()) for path in files(directory)]
        assert Ledger(directory).sweep() == Swept()
        assert is_running(owner.child)
        assert [(path, path.read_text()) for path in files(directory)] == before


@pytest.mark.parametrize("sign", ["lock", "start time"])
def test_one_sign_of_life_is_enough(directory: Path, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock (a file system that has none) or with a clock that was set meanwhile."""
    with owner_of(directory, sys.executable, "-c", LONG) as owner:
        if sign == "start time":
            monkeypatch.setattr("llamesh.local.orphans._lock", lambda fd: True)
        else:
            monkeypatch.setattr("llamesh.local.orphans._is_alive", lambda entry: False)
        assert Ledger(directory).sweep() == Swept()
        assert is_running(owner.child)


def test_a_grandchild_that_outlived_its_wrapper_is_killed(directory: Path) -> None:
    """As after a wrapper script was killed with its owner: the group has no leader any more."""
    with owner_of(directory, "sh", "-c", "sleep 1000 & echo $!; wait") as owner:
        grandchild = owner.number()
        owner.die()
        os.kill(owner.child, signal.SIGKILL)
        wait_for_end(owner.child)
        assert is_running(grandchild)
        assert Ledger(directory).sweep() == Swept(killed=(owner.child,))
        assert not is_running(grandchild)


def test_a_child_that_is_gone_already(directory: Path) -> None:
    with owner_of(directory, sys.executable, "-c", LONG) as owner:
        owner.die()
        os.killpg(owner.child, signal.SIGKILL)
        wait_for_end(owner.child)
        assert Ledger(directory).sweep() == Swept()
        assert files(directory) == []


def test_a_reused_process_id_is_never_signalled(directory: Path, bystander: subprocess.Popen[bytes]) -> None:
    started = psutil.Process(bystander.pid).create_time()
    for other in (started - 60, started + 60):
        path = leave(directory, page(bystander.pid, other))
        assert Ledger(directory).sweep() == Swept()
        assert not path.exists()
    assert bystander.poll() is None


def test_a_stranger_inside_another_group_is_never_signalled(directory: Path) -> None:
    """The number lives, but doesn't lead the group that bears it."""
    with subprocess.Popen([sys.executable, "-c", LONG]) as stranger:
        leave(directory, page(stranger.pid, psutil.Process(stranger.pid).create_time()))
        assert Ledger(directory).sweep() == Swept()
        assert stranger.poll() is None
        stranger.kill()


def test_a_leaderless_group_of_another_session_is_never_signalled(directory: Path) -> None:
    command = "sleep 1000 & echo $!"
    with subprocess.Popen(
        ["sh", "-c", command], process_group=0, stdout=subprocess.PIPE, text=True
    ) as leader:
        assert leader.stdout is not None
        member = int(leader.stdout.readline())
        leader.wait()
        leave(directory, page(leader.pid, psutil.Process(member).create_time(), session=1))
        assert Ledger(directory).sweep() == Swept()
        assert is_running(member)
        # The same with the right session: the test above was decided by the session alone.
        leave(directory, page(leader.pid, psutil.Process(member).create_time()))
        assert Ledger(directory).sweep() == Swept(killed=(leader.pid,))
        assert not is_running(member)


def test_what_was_noted_before_the_last_boot_is_never_signalled(
    directory: Path, bystander: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = psutil.Process(bystander.pid).create_time()
    monkeypatch.setattr(psutil, "boot_time", lambda: started + 10)
    leave(directory, page(bystander.pid, started))
    assert Ledger(directory).sweep() == Swept()
    assert bystander.poll() is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "[]",
        "[" * 100_000,
        '{"owner": 1, "children": []}',
        '{"owner": {"pid": 5, "started": 1, "session": "x"}, "children": []}',
        page(0, 1.0),
        page(1, 1.0),
        page(-1, 1.0),
        page(2**70, 1.0),
        page(4711, 10**400),
        page(4711, 1.0, owner=2**70),
        page(True, 1.0),
        page("77", 1.0),
        page(4711, "soon"),
        page(4711, float("nan")),
        page(4711, float("inf")),
        page(4711, None),
        page(4711, 1.0, owner=None),
        "\x00\x01\udcff",
    ],
)
def test_a_broken_file_is_removed_with_a_warning(
    directory: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killpg(group: int, number: int) -> None:
        raise AssertionError(f"signal {number} to {group}")

    monkeypatch.setattr(os, "killpg", killpg)
    directory.mkdir()
    path = directory / "node-1-1.00.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    swept = Ledger(directory).sweep()
    assert swept.killed == ()
    assert [str(path) in warning for warning in swept.warnings] == [True]
    assert files(directory) == []


def test_a_file_that_can_not_be_opened_is_a_warning(directory: Path) -> None:
    (directory / "node-1-1.00.json").mkdir(parents=True)
    swept = Ledger(directory).sweep()
    assert swept.killed == ()
    assert len(swept.warnings) == 1


def test_the_file_is_there_while_there_are_children(
    directory: Path, bystander: subprocess.Popen[bytes]
) -> None:
    ledger = Ledger(directory)
    assert ledger.record(bystander.pid) is None
    [path] = files(directory)
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [child["pid"] for child in json.loads(path.read_text())["children"]] == [bystander.pid]
    assert ledger.record(os.getpid()) is None
    assert ledger.forget(os.getpid()) is None
    assert [child["pid"] for child in json.loads(path.read_text())["children"]] == [bystander.pid]
    assert ledger.forget(bystander.pid) is None
    assert ledger.forget(bystander.pid) is None
    assert files(directory) == []


def test_our_own_file_survives_our_own_sweep(directory: Path, bystander: subprocess.Popen[bytes]) -> None:
    ledger = Ledger(directory)
    ledger.record(bystander.pid)
    assert ledger.sweep() == Swept()
    assert bystander.poll() is None
    assert len(files(directory)) == 1
    ledger.close()
    assert files(directory) == []


def test_a_child_that_died_at_once_is_not_noted(directory: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    assert Ledger(directory).record(process.pid) is None
    assert not directory.exists()


def test_a_disk_that_refuses_is_a_message(tmp_path: Path, bystander: subprocess.Popen[bytes]) -> None:
    file = tmp_path / "file"
    file.write_text("not a directory")
    ledger = Ledger(file / "children")
    message = ledger.record(bystander.pid)
    assert message is not None
    assert str(file) in message
    assert ledger.forget(bystander.pid) is None


def test_half_written_files_of_the_dead_are_removed(directory: Path) -> None:
    directory.mkdir()
    dead = directory / "node-999999999-1.00.half"
    alive = directory / f"node-{os.getpid()}-1.00.half"
    dead.write_text("{")
    alive.write_text("{")
    assert Ledger(directory).sweep() == Swept()
    assert files(directory) == [alive]
