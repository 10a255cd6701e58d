"""Files that only their owner may read: created once, replaced whole, refused when others can look.

Several nodes may use one directory and start at the same moment. A file appears with all of its
content or not at all: it is written under another name, synced, and then linked to its own name,
which fails when somebody was faster. Everything here blocks; on a network file system that can take
a while.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shlex
import stat
import time
from collections.abc import Iterator
from pathlib import Path

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600

# Holders of a lock write one small file. Longer than this and something is stuck.
LOCK_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.01

# A key, a token. Nothing that is read whole into memory should be larger by mistake.
_LARGEST_BYTES = 4096

_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class IdentityError(Exception):
    """A file of the key store that can't be used: which one, what is wrong, what mends it.

    None of the three ever holds a secret.
    """

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem} ({remedy})")
        self.path = str(path)
        self.problem = problem
        self.remedy = remedy


def check_directory(path: Path) -> None:
    """Raise IdentityError unless `path` is a directory of ours that nobody else can enter."""
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise IdentityError(path, "is a symlink to nothing", f"rm {_quoted(path)}") from None
        raise IdentityError(path, "doesn't exist", f"mkdir -m 700 {_quoted(path)}") from None
    except OSError as error:
        raise _unusable(path, error, "look at") from None
    if not stat.S_ISDIR(status.st_mode):
        raise IdentityError(path, "isn't a directory", f"rm {_quoted(path)}, or name another one")
    _check_owner(path, status)
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise IdentityError(
            path,
            f"others can look into it (mode {stat.S_IMODE(status.st_mode):04o})",
            f"chmod {DIRECTORY_MODE:o} {_quoted(path)}",
        )


def make_directory(path: Path) -> None:
    """Create `path` for us alone where there is nothing, and check it as `check_directory` does."""
    try:
        path.mkdir(mode=DIRECTORY_MODE, parents=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise _unusable(path, error, "create") from None
    check_directory(path)


def read_private(path: Path, limit: int = _LARGEST_BYTES) -> bytes | None:
    """The content of a file that only we can read; None where there is no such file.

    `limit` is in bytes. What is checked is what was opened, so that nobody can swap it in between.
    """
    try:
        # Without O_NONBLOCK a pipe of this name would hold us for ever.
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        if path.is_symlink():
            raise IdentityError(path, "is a symlink to nothing", f"rm {_quoted(path)}") from None
        return None
    except OSError as error:
        raise _unusable(path, error, "read") from None
    try:
        _check_private(path, os.fstat(handle))
        _check_place(path)
        with os.fdopen(handle, "rb", closefd=False) as source:
            content = source.read(limit + 1)
    except OSError as error:
        raise _unusable(path, error, "read") from None
    finally:
        os.close(handle)
    if len(content) > limit:
        raise IdentityError(path, f"is larger than {limit} bytes", "is it the right file?")
    return content


def create_private(path: Path, content: bytes) -> bytes:
    """Create the file unless there is one; what it holds then: `content`, or what was there first."""
    temporary = _write_beside(path, content)
    try:
        if _link(temporary, path):
            _sync_directory(path.parent)
            return content
    except OSError as error:
        raise _unusable(path, error, "create") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
    found = read_private(path)
    if found is None:
        raise IdentityError(path, "vanished right after it was created", "is it on a shared disk?")
    return found


def replace_private(path: Path, content: bytes) -> None:
    """Put `content` in the file's place, as a whole; a symlink keeps leading to the new content."""
    target = Path(os.path.realpath(path))
    temporary = _write_beside(target, content)
    try:
        temporary.replace(target)
        _sync_directory(target.parent)
    except OSError as error:
        raise _unusable(path, error, "write") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from changing the file of this name meanwhile, if they lock it, too.

    Waits for LOCK_SECONDS at most, then IdentityError. The lock is a file beside it, `NAME.lock`,
    which stays; its holder's end frees it.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, FILE_MODE)
    except OSError as error:
        raise _unusable(lock, error, "create") from None
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    hint = "find it with `fuser` and end it"
                    raise IdentityError(lock, "another process has held it for too long", hint) from None
                time.sleep(_LOCK_POLL_SECONDS)
            except OSError as error:
                raise _unusable(lock, error, "lock") from None
        yield
    finally:
        os.close(handle)  # frees the lock


def _check_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise IdentityError(path, "isn't a regular file", f"rm -r {_quoted(path)}, or name another one")
    _check_owner(path, status)
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise IdentityError(
            path,
            f"others can read or change it (mode {stat.S_IMODE(status.st_mode):04o})",
            f"chmod {FILE_MODE:o} {_quoted(path)}",
        )


def _check_place(path: Path) -> None:
    """Whoever may write to the directory can take the file away, and a new one would be believed."""
    directory = path.parent
    mode = stat.S_IMODE(directory.stat().st_mode)
    if mode & 0o022 and not mode & stat.S_ISVTX:
        problem = f"others can put another file there (mode {mode:04o} of {directory})"
        raise IdentityError(path, problem, f"chmod go-w {_quoted(directory)}")


def _check_owner(path: Path, status: os.stat_result) -> None:
    me = os.geteuid()
    if status.st_uid != me:
        raise IdentityError(
            path,
            f"belongs to user {status.st_uid}, not to {me}, who runs this",
            f"chown {me} {_quoted(path)}",
        )


def _write_beside(path: Path, content: bytes) -> Path:
    """A synced file with this content in the same directory, under a name that nobody uses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        raise _unusable(path, error, "create") from None
    try:
        with os.fdopen(handle, "wb") as sink:
            os.fchmod(handle, FILE_MODE)  # whatever the umask took away
            sink.write(content)
            sink.flush()
            os.fsync(handle)
    except OSError as error:
        temporary.unlink()
        raise _unusable(path, error, "write") from None
    except BaseException:
        temporary.unlink()
        raise
    return temporary


def _link(temporary: Path, path: Path) -> bool:
    """Give the file its name; False when the name is taken. Raises OSError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # No hard links on this file system: the lock stands in for them.
        with locked(path):
            if os.path.lexists(path):
                return False
            temporary.rename(path)
    return True


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some file systems can't; the name is safe there as soon as it is anywhere.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def _unusable(path: Path, error: OSError, what: str) -> IdentityError:
    reason = error.strerror or type(error).__name__
    match error.errno:
        case errno.EACCES | errno.EPERM:
            remedy = f"let user {os.geteuid()} {what} it: see `ls -ld {_quoted(path)} {_quoted(path.parent)}`"
        case errno.ENOSPC | errno.EDQUOT:
            remedy = "free some disk space"
        case errno.EROFS:
            remedy = "set cluster.noise.config_dir to a directory that can be written"
        case errno.ENOENT | errno.ENOTDIR:
            remedy = f"mkdir -p {_quoted(path.parent)}"
        case _:
            remedy = f"see `ls -ld {_quoted(path)}`"
    return IdentityError(path, f"can't {what} it: {reason}", remedy)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
