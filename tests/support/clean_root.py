"""A minimal Debian of its own for a test: to install into, and to start with systemd as its first process.

    with CleanRoot(lowest, tmp_path) as root:
        root.copy(package, "/root/llamesh.deb")
        root.run("dpkg", "-i", "/root/llamesh.deb")
        with root.booted():
            root.inside("systemctl", "start", "llamesh")

The files lie in a layer in memory over the Debian that scripts/make_clean_root made, in a mount namespace
of their own: nothing is written to this machine, and nothing is left. A booted one shares its network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil

_PRIVATE = ("unshare", "--mount", "--propagation", "private")
_NSPAWN = (
    *("systemd-nspawn", "--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe"),
    "--kill-signal=SIGRTMIN+3",
)

BOOT_SECONDS = 60.0
COMMAND_SECONDS = 120.0

_MOUNT = """
mount -t tmpfs -o size=2g,mode=755 llamesh-test "$2"
mkdir "$2/upper" "$2/work" "$2/root"
mount -t overlay overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
echo ready
exec cat
"""


class CleanRoot:
    """See the module. Needs root."""

    def __init__(self, lowest: Path, directory: Path) -> None:
        """`lowest`: the Debian that lies below, which stays as it is."""
        self._lowest = lowest
        self._where = directory / "clean-root"
        self._machine: psutil.Process | None = None

    def __enter__(self) -> Self:
        self._where.mkdir()
        self._holder = subprocess.Popen(
            [*_PRIVATE, "sh", "-euc", _MOUNT, "sh", str(self._lowest), str(self._where)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n", "the layer can't be mounted"
        return self

    def __exit__(self, *_: object) -> None:
        # With its last process the namespace goes, and all that is mounted in it.
        self._holder.communicate()

    @property
    def files(self) -> Path:
        """The root folder, as it is seen from here."""
        return Path(f"/proc/{self._holder.pid}/root{self._where}/root")

    def write(self, name: str, text: str) -> None:
        """Write a file, into a folder that is made where it is missing; mode and owner stay."""
        path = self.files / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file of this machine."""
        shutil.copy(source, self.files / name.lstrip("/"))

    def owner(self, name: str) -> tuple[str, str, int]:
        """User, group and mode of a file, as that Debian names them."""
        said = self.run("stat", "-c", "%U %G %a", name).split()
        return said[0], said[1], int(said[2], 8)

    def run(self, *words: str, fails: bool = False) -> str:
        """Run a command in the installed, not booted system: what it printed. It must succeed, or `fails`."""
        return _run([*self._enter, "chroot", str(self._where / "root"), *words], fails)

    @property
    def _enter(self) -> list[str]:
        return ["nsenter", "--target", str(self._holder.pid), "--mount"]

    @contextlib.contextmanager
    def booted(self) -> Iterator[None]:
        """systemd runs in it as process 1, until the end of the block."""
        log = self._where.with_suffix(".boot")
        with log.open("w") as console:
            nspawn = subprocess.Popen(
                [*self._enter, *_NSPAWN, f"--directory={self._where}/root"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_for_systemd(nspawn, log)
            yield
        finally:
            self._end(nspawn)
            # pytest shows this for a failed test only.
            print(log.read_text(errors="replace")[-4000:])

    def inside(self, *words: str, fails: bool = False) -> str:
        """Run a command in the booted system: what it printed."""
        assert self._machine is not None, "it isn't booted"
        enter = ["nsenter", "--target", str(self._machine.pid)]
        return _run([*enter, "--mount", "--uts", "--ipc", "--pid", "--cgroup", "--", *words], fails)

    def _wait_for_systemd(self, nspawn: subprocess.Popen[bytes], log: Path) -> None:
        end = time.monotonic() + BOOT_SECONDS
        while time.monotonic() < end and nspawn.poll() is None:
            first = psutil.Process(nspawn.pid).children()
            if first:
                self._machine = first[0]
                # "degraded": something failed that a container hasn't, such as mounting debugfs.
                if self.inside("systemctl", "is-system-running", fails=True).strip() in (
                    "running",
                    "degraded",
                ):
                    return
            time.sleep(0.1)
        raise AssertionError(f"systemd didn't start: {log.read_text(errors='replace')[-3000:]}")

    def _end(self, nspawn: subprocess.Popen[bytes]) -> None:
        self._machine = None
        with contextlib.suppress(ProcessLookupError):
            nspawn.send_signal(signal.SIGTERM)  # it shuts the system down
        try:
            nspawn.wait(30)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(nspawn.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            nspawn.kill()
            nspawn.wait()


def _run(words: list[str], fails: bool) -> str:
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
    }
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert fails or done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}"
    return done.stdout


def why_not(*programs: str) -> str:
    """Why there can't be a clean root here, "" when there can."""
    if os.geteuid():
        return "only root can mount a layer and start a system"
    missing = [name for name in programs if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""
