"""What a finished build says of itself, and the lock of those who run it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

import msgspec

from llamesh.core.builds import TARGET

RECORD = "build.json"

_MAX_RECORD = 1 << 20


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """A finished build, as its `build.json` has it.

    `commit`: of the repository, or of the content of an archive or folder; `recipe`: name of how it was made;
    `source`: where from; `always`: arguments that it must be run with; `built_at`: seconds since the epoch;
    `rejected`: why it isn't to be used, "" when it may be.
    """

    key: str
    commit: str
    recipe: str = ""
    version: str = "unknown"
    source: str = ""
    arguments: tuple[str, ...] = ()
    always: tuple[str, ...] = ()
    built_at: float = 0.0
    seconds: float = 0.0
    rejected: str = ""


class Hold:
    """Keeps a build from being deleted, until `close` or the end of this process."""

    def __init__(self, file: int) -> None:
        self._file: int | None = file

    def close(self) -> None:
        """Let it go; may be called twice."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_build(folder: Path) -> Build | None:
    """The build in a folder, None where there is none that is whole."""
    try:
        with (folder / RECORD).open("rb") as file:
            build = msgspec.json.decode(file.read(_MAX_RECORD), type=Build)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
    # The folder is what it is called: a record that was copied elsewhere says nothing about its neighbours.
    return build if build.key == folder.name and is_program(folder / "bin" / TARGET) else None


def build_behind(binary_path: Path) -> tuple[Build, Path] | None:
    """The build that `binary_path` leads to, and the program itself; None when it is something else."""
    try:
        program = binary_path.resolve(strict=True)
    except (OSError, RuntimeError):
        return None
    build = read_build(program.parent.parent)
    return None if build is None else (build, program)


def hold(program: str) -> Hold | None:
    """Keep the build with this program from being deleted. None where it has no record, or is gone."""
    try:
        file = os.open(Path(program).parent.parent / RECORD, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return Hold(file)


def is_program(path: Path) -> bool:
    """Whether it is a file that can be executed."""
    return path.is_file() and os.access(path, os.X_OK)
