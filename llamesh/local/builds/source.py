"""Where llama.cpp's source comes from: a git repository, a folder, or an archive.

What is fetched is compiled and run, so a name that git or a transport could take for something else is
refused, and so is a way on which anybody could change it (plain http, git://). In a repository that
somebody else made, nothing of theirs is overwritten.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import trio

from llamesh.local.builds.archives import archive_kind, unpack
from llamesh.local.builds.failure import FETCH, BuildFailed
from llamesh.local.builds.git_source import GitSource
from llamesh.local.builds.tools import hide_credentials

_TRANSPORT = re.compile(r"[A-Za-z0-9+.-]+::")
_SCP_LIKE = re.compile(r"(?:[A-Za-z0-9._-]+@)?([A-Za-z0-9._-]+):(?!//)(\S+)")
# As `git check-ref-format` has it.
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^[-/.]|/[/.]|[/.]$|\.lock$|^@$")


class Source(Protocol):
    """Something to build from."""

    async def newest(self) -> str:
        """What is to be built now: 40 hexadecimal letters, of commit or content. Raises BuildFailed."""

    async def check_out(self, commit: str, on_line: Callable[[str], None]) -> Path:
        """The folder with `commit` in it. Raises BuildFailed."""


def source_of(repo_url: str, branch: str, repo_path: Path, work: Path, environ: Mapping[str, str]) -> Source:
    """The source that `repo_url` names: a url, or a path to a repository, a folder or an archive.

    `repo_path`: where a repository is cloned to; `work`: where an archive is unpacked. Raises BuildFailed
    for a name that is refused.
    """
    local = _local_path(repo_url)
    if local is not None and local.is_file():
        return ArchiveSource(local, work)
    if local is not None and local.is_dir() and not _is_repository(local):
        return FolderSource(local)
    check_repository(repo_url)
    check_reference(branch)
    return GitSource.at(str(local) if local is not None else repo_url, branch, repo_path, environ)


def check_repository(url: str) -> None:
    """Refuse, with BuildFailed, what git might take for something else than the place of a repository."""

    def refuse(why: str) -> BuildFailed:
        return BuildFailed(FETCH, f"llama_cpp.repo_url {hide_credentials(url)[:200]!r} is refused: {why}")

    if not url or url.startswith("-"):
        raise refuse("git would take it for an option")
    if not url.isprintable() or re.search(r"\s", url):
        raise refuse("it holds blanks or control characters")
    if _TRANSPORT.match(url):
        raise refuse("a transport of this kind may run any program; use https or ssh")
    if "://" in url:
        try:
            parts = urlsplit(url)
            host = parts.hostname or ""
        except ValueError:
            raise refuse("it is no url") from None
        if host.startswith("-"):
            raise refuse("its host would be taken for an option")
        if parts.scheme in ("https", "ssh", "file"):
            return
        if parts.scheme == "http" and _is_loopback(host):
            return
        raise refuse(f"{parts.scheme} isn't protected on its way; use https or ssh")
    if os.path.exists(os.path.expanduser(url)):
        return
    found = _SCP_LIKE.fullmatch(url)
    if found is None:
        raise refuse("there is no such path, and it is no url")
    if found[1].startswith("-") or found[2].startswith("-"):
        raise refuse("a part of it would be taken for an option")


def check_reference(name: str) -> None:
    """Refuse, with BuildFailed, what can't be the name of a branch, a tag or a commit."""
    if not name or len(name) > 250 or _NO_REF.search(name):
        raise BuildFailed(
            FETCH, f"llama_cpp.branch {name[:200]!r} is refused: no branch, tag or commit has such a name"
        )


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder with llama.cpp's source, built where it is. A changed file makes another build of it."""

    path: Path

    async def newest(self) -> str:
        """From the names, sizes and times of all files: their content isn't read."""
        return await trio.to_thread.run_sync(self._digest, abandon_on_cancel=True)

    async def check_out(self, commit: str, on_line: Callable[[str], None]) -> Path:
        """The folder itself."""
        return self.path

    def _digest(self) -> str:
        if not (self.path / "CMakeLists.txt").is_file():
            raise BuildFailed(FETCH, f"{self.path} holds no CMakeLists.txt: it isn't the source of llama.cpp")
        digest = hashlib.sha256()
        for folder, folders, names in os.walk(self.path):
            # Not what lies beside the source by default: builds and their products.
            folders[:] = sorted(f for f in folders if f not in (".git", "build", "bin", "__pycache__"))
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    found = os.lstat(path)
                except OSError as error:
                    raise BuildFailed(FETCH, f"{path} can't be read: {error}") from error
                relative = os.path.relpath(path, self.path)
                digest.update(
                    f"{relative}\0{found.st_size}\0{found.st_mtime_ns}\n".encode("utf-8", "replace")
                )
        return digest.hexdigest()[:40]


@dataclass(frozen=True, slots=True)
class ArchiveSource:
    """An archive (.tar.gz, .tar.xz, .zip and so on) with llama.cpp's source, unpacked below `work`."""

    path: Path
    work: Path

    async def newest(self) -> str:
        """From its content."""
        return await trio.to_thread.run_sync(self._digest, abandon_on_cancel=True)

    async def check_out(self, commit: str, on_line: Callable[[str], None]) -> Path:
        """Unpacks it, unless it is unpacked already; earlier archives' folders go."""
        return await trio.to_thread.run_sync(self._unpack, commit)

    def _digest(self) -> str:
        if archive_kind(self.path) is None:
            raise BuildFailed(
                FETCH, f"{self.path} is no archive that can be unpacked here (.tar, .tar.gz, .tar.xz, .zip)"
            )
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:40]
        except OSError as error:
            raise BuildFailed(FETCH, f"{self.path} can't be read: {error}") from error

    def _unpack(self, commit: str) -> Path:
        folder = self.work / f"source-{commit[:12]}"
        if not folder.is_dir():
            for old in self.work.glob("source-*"):
                shutil.rmtree(old, ignore_errors=True)
            part = self.work / "source.part"
            shutil.rmtree(part, ignore_errors=True)
            try:
                unpack(self.path, part)
            except (OSError, ValueError) as error:
                shutil.rmtree(part, ignore_errors=True)
                raise BuildFailed(FETCH, f"{self.path} can't be unpacked: {error}") from error
            part.rename(folder)
        inside = [
            p.parent for p in (folder / "CMakeLists.txt", *folder.glob("*/CMakeLists.txt")) if p.is_file()
        ]
        if not inside:
            raise BuildFailed(FETCH, f"{self.path} holds no CMakeLists.txt: it isn't the source of llama.cpp")
        return inside[0]


def _local_path(url: str) -> Path | None:
    """The path that `url` is, if it is one that exists; `file://` counts."""
    if url.startswith("-") or "\0" in url or _TRANSPORT.match(url):
        return None
    path = Path(url.removeprefix("file://")).expanduser()
    try:
        return path.absolute() if path.exists() else None
    except OSError:
        return None


def _is_repository(path: Path) -> bool:
    return (path / ".git").exists() or ((path / "HEAD").is_file() and (path / "objects").is_dir())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
