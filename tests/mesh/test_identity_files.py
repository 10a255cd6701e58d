"""Files of the key store: nobody else can look, the first of several wins, nothing half-written."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llamesh.mesh import key_files
from llamesh.mesh.key_files import (
    IdentityError,
    check_directory,
    create_private,
    locked,
    make_directory,
    read_private,
    replace_private,
)
from tests.support.node import clean_environment

NOBODY = 65_534


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "store"
    make_directory(path)
    return path


def test_what_is_created_is_for_us_alone(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "store"
    before = os.umask(0)
    try:
        make_directory(directory)
        created = create_private(directory / "secret", b"one")
        with locked(directory / "secret"):
            replace_private(directory / "secret", b"two")
    finally:
        os.umask(before)
    assert created == b"one"
    assert read_private(directory / "secret") == b"two"
    assert mode_of(directory) == 0o700
    assert {path.name: mode_of(path) for path in directory.iterdir()} == {
        "secret": 0o600,
        "secret.lock": 0o600,
    }


def test_a_umask_that_takes_too_much_takes_nothing_here(store: Path) -> None:
    before = os.umask(0o277)
    try:
        create_private(store / "secret", b"one")
    finally:
        os.umask(before)
    assert mode_of(store / "secret") == 0o600


def test_the_first_one_wins(store: Path) -> None:
    assert create_private(store / "secret", b"one") == b"one"
    assert create_private(store / "secret", b"two") == b"one"
    assert [path.name for path in store.iterdir()] == ["secret"]


def test_without_hard_links_the_first_one_wins_as_well(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert create_private(store / "secret", b"one") == b"one"
    assert create_private(store / "secret", b"two") == b"one"
    assert sorted(path.name for path in store.iterdir()) == ["secret", "secret.lock"]


def test_a_failed_write_leaves_what_was_there(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_private(store / "secret", b"one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for change in (replace_private, create_private):
        with pytest.raises(IdentityError, match=r"No space left on device \(free some disk space\)"):
            change(store / "secret", b"two")
    assert read_private(store / "secret") == b"one"
    assert [path.name for path in store.iterdir()] == ["secret"]


def test_a_symlink_stays_one(store: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    create_private(tmp_path / "elsewhere" / "real", b"one")
    (store / "secret").symlink_to(tmp_path / "elsewhere" / "real")
    replace_private(store / "secret", b"two")
    assert (store / "secret").is_symlink()
    assert read_private(tmp_path / "elsewhere" / "real") == b"two"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o777])
def test_a_file_that_others_can_use_is_refused(store: Path, mode: int) -> None:
    path = store / "a secret"
    create_private(path, b"content-of-it")
    path.chmod(mode)
    with pytest.raises(IdentityError) as caught:
        read_private(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert f"{mode:04o}" in caught.value.problem
    assert caught.value.remedy == f"chmod 600 '{path}'"
    assert "content-of-it" not in str(caught.value)
    # The remedy is one.
    subprocess.run(["/bin/sh", "-c", caught.value.remedy], check=True, timeout=30)
    assert read_private(path) == b"content-of-it"


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o755, 0o770, 0o777])
def test_a_directory_that_others_can_enter_is_refused(store: Path, tmp_path: Path, mode: int) -> None:
    store.chmod(mode)
    link = tmp_path / "link"
    link.symlink_to(store)
    for path in (store, link):
        with pytest.raises(IdentityError, match=f"chmod 700 {path}") as caught:
            make_directory(path)
        assert f"{mode:04o}" in str(caught.value)
    subprocess.run(["/bin/sh", "-c", caught.value.remedy], check=True, timeout=30)
    check_directory(store)


def test_stricter_modes_are_fine(store: Path) -> None:
    create_private(store / "secret", b"one")
    (store / "secret").chmod(0o400)
    store.chmod(0o500)
    try:
        check_directory(store)
        assert read_private(store / "secret") == b"one"
    finally:
        store.chmod(0o700)


def test_a_place_where_others_can_put_another_file(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    create_private(shared / "secret", b"one")
    shared.chmod(0o777)
    with pytest.raises(IdentityError, match=f"chmod go-w {shared}"):
        read_private(shared / "secret")
    shared.chmod(0o1777)  # as /tmp: only the owner of a file can take it away
    assert read_private(shared / "secret") == b"one"


def test_somebody_elses_files_are_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_private(store / "secret", b"one")
    stranger = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: stranger)
    for look in (lambda: read_private(store / "secret"), lambda: check_directory(store)):
        with pytest.raises(IdentityError, match=f"belongs to user .* not to {stranger}.*chown {stranger} "):
            look()


def _empty_directory(path: Path) -> None:
    path.mkdir(mode=0o700)


def _pipe(path: Path) -> None:
    os.mkfifo(path, 0o600)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _too_large(path: Path) -> None:
    create_private(path, b"x" * 5000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_empty_directory, "isn't a regular file"),
        (_pipe, "isn't a regular file"),
        (_dangling, "symlink to nothing"),
        (_loop, "can't read it"),
        (_too_large, "larger than 4096 bytes"),
    ],
)
def test_what_is_no_file_is_refused_at_once(store: Path, make: Callable[[Path], None], words: str) -> None:
    make(store / "secret")
    with pytest.raises(IdentityError, match=words):
        read_private(store / "secret")


def test_a_directory_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path, words in (
        (tmp_path / "file", "isn't a directory"),
        (tmp_path / "dangling", "symlink to nothing"),
        (tmp_path / "file" / "below", "can't create it: Not a directory"),
    ):
        with pytest.raises(IdentityError, match=words):
            make_directory(path)
    with pytest.raises(IdentityError, match="doesn't exist"):
        check_directory(tmp_path / "nothing")


def test_a_file_that_cant_be_read(tmp_path: Path) -> None:
    """As another user when we are root, to whom everything opens."""
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    (store / "secret").write_bytes(b"one")
    (store / "secret").chmod(0)
    program = (
        "import os\nfrom pathlib import Path\nfrom llamesh.mesh.key_files import *\n"
        f"if os.geteuid() == 0:\n    os.setuid({NOBODY})\n"
        "try:\n    print(read_private(Path('secret')))\nexcept IdentityError as error:\n    print(error)\n"
    )
    if os.geteuid() == 0:
        os.chown(store, NOBODY, NOBODY)
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=store,
        env=clean_environment({}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert re.match(r"secret: can't read it: Permission denied \(let user \d+ read it: ", done.stdout), done


def test_only_one_holds_the_lock(store: Path) -> None:
    """Another process that counts under the lock loses no count of ours."""
    path = store / "counter"
    create_private(path, b"0")
    program = (
        "import sys\nfrom pathlib import Path\nfrom llamesh.mesh.key_files import *\n"
        "path = Path(sys.argv[1])\n"
        "for _ in range(50):\n"
        "    with locked(path):\n"
        "        replace_private(path, str(int(read_private(path)) + 1).encode())\n"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(path)], env=clean_environment({}))
        for _ in range(3)
    ]
    assert [other.wait(timeout=60) for other in others] == [0, 0, 0]
    assert read_private(path) == b"150"


def test_a_lock_that_is_never_freed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_files, "LOCK_SECONDS", 0.05)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(store / "secret"):
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert held.wait(30)
        with (
            pytest.raises(IdentityError, match=r"secret\.lock: another process has held it"),
            locked(store / "secret"),
        ):
            raise AssertionError("two hold it")
    finally:
        done.set()
        holder.join()
    with locked(store / "secret"):
        pass
