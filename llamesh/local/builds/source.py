"""Where llama.cpp's source comes from: a git repository, a folder, or an archive.

What is fetched is compiled and run, so a name that git or a transport could take for something else is
refused, and so is a way on which anybody could change it (plain http, git://). In a repository that
somebody else made, nothing of theirs is overwritten.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import trio

from llamesh.local.builds.archives import archive_kind, unpack
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.tools import hide_credentials, need, run_tool

STAGE = "fetching the source"

# Of our own, so that the remotes in somebody's clone stay theirs. The setting marks clones that we made.
_REMOTE = "llamesh"
_OURS = "llamesh.managed"

# Asking for the newest commit is a small request; fetching may take long, but not in silence.
_ASK_SECONDS = 60.0
_SILENT_SECONDS = 300.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_TRANSPORT = re.compile(r"[A-Za-z0-9+.-]+::")
_SCP_LIKE = re.compile(r"(?:[A-Za-z0-9._-]+@)?([A-Za-z0-9._-]+):(?!//)(\S+)")
# As `git check-ref-format` has it.
_NO_REF = re.compile(r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|^[-/.]|/[/.]|[/.]$|\.lock$|^@$")

# Nobody is asked for a password; a transport that runs programs is refused by git, too.
_GIT_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ALLOW_PROTOCOL": "file:http:https:ssh",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
}
_GIT_OPTIONS = (
    "-c",
    "http.lowSpeedLimit=1000",
    "-c",
    "http.lowSpeedTime=60",
    "-c",
    "advice.detachedHead=false",
)


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
    return GitSource(str(local) if local is not None else repo_url, branch, repo_path, environ)


def check_repository(url: str) -> None:
    """Refuse, with BuildFailed, what git might take for something else than the place of a repository."""

    def refuse(why: str) -> BuildFailed:
        return BuildFailed(STAGE, f"llama_cpp.repo_url {hide_credentials(url)[:200]!r} is refused: {why}")

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
            STAGE, f"llama_cpp.branch {name[:200]!r} is refused: no branch, tag or commit has such a name"
        )


@dataclass(frozen=True, slots=True)
class GitSource:
    """A branch, tag or commit of a repository, checked out at `path`."""

    url: str
    reference: str
    path: Path
    environ: Mapping[str, str]

    async def newest(self) -> str:
        """Asks the repository, or nobody when `reference` is a whole commit."""
        if _COMMIT.fullmatch(self.reference):
            return self.reference
        names = [
            f"refs/heads/{self.reference}",
            f"refs/tags/{self.reference}^{{}}",
            f"refs/tags/{self.reference}",
        ]
        said = await self._git(["ls-remote", "--", self.url, *names], limit=_ASK_SECONDS)
        # Git matches the end of a name: what isn't exactly one of these is another branch.
        found: dict[str, str] = {}
        for line in said:
            commit, _, name = line.partition(" ")
            if _COMMIT.fullmatch(commit):
                found[name] = commit
        for name in names:
            if name in found:
                return found[name]
        if _SHORT_COMMIT.fullmatch(self.reference):
            return await self._find_commit()
        raise BuildFailed(STAGE, f"{hide_credentials(self.url)} has no branch and no tag {self.reference!r}")

    async def check_out(self, commit: str, on_line: Callable[[str], None]) -> Path:
        """Fetches what is missing. History comes without its files: the build number is counted from it."""
        await self._prepare()
        if not await self._has(commit):
            await self._fetch(commit, on_line)
        if not await self._is_ours():
            await self._refuse_to_overwrite()
        await self._git(["checkout", "--force", "--detach", commit], inside=True, on_line=on_line)
        return self.path

    async def _prepare(self) -> None:
        if not (self.path / ".git").exists():
            self.path.mkdir(parents=True, exist_ok=True)
            await self._git(["init", "--quiet"], inside=True)
            await self._git(["config", _OURS, "true"], inside=True)
        await self._git(["config", f"remote.{_REMOTE}.url", self.url], inside=True)

    async def _fetch(self, commit: str, on_line: Callable[[str], None]) -> None:
        fetch = ["fetch", "--no-tags", "--force", "--filter=blob:none", "--progress", _REMOTE]
        try:
            await self._git([*fetch, commit], inside=True, on_line=on_line)
        except BuildFailed:
            # Not every server hands out a commit by its name.
            everything = ["+refs/heads/*:refs/remotes/llamesh/*", "+refs/tags/*:refs/tags/*"]
            await self._git([*fetch, *everything], inside=True, on_line=on_line)
            if not await self._has(commit):
                raise BuildFailed(STAGE, f"{hide_credentials(self.url)} has no commit {commit}") from None

    async def _find_commit(self) -> str:
        """The whole name of a commit that is named by its first letters."""
        await self._prepare()
        question = ["rev-parse", "--verify", "--quiet", f"{self.reference}^{{commit}}"]
        for fetched in (False, True):
            if fetched:
                everything = ["+refs/heads/*:refs/remotes/llamesh/*", "+refs/tags/*:refs/tags/*"]
                await self._git(
                    ["fetch", "--no-tags", "--filter=blob:none", _REMOTE, *everything], inside=True
                )
            try:
                said = await self._git(question, inside=True)
            except BuildFailed:
                continue
            if said and _COMMIT.fullmatch(said[-1]):
                return said[-1]
        raise BuildFailed(
            STAGE, f"{hide_credentials(self.url)} has no branch, tag or commit {self.reference!r}"
        )

    async def _has(self, commit: str) -> bool:
        try:
            # Without the remote: it would be asked for what is missing.
            await self._git(
                ["cat-file", "-e", f"{commit}^{{commit}}"], inside=True, more={"GIT_NO_LAZY_FETCH": "1"}
            )
        except BuildFailed:
            return False
        return True

    async def _is_ours(self) -> bool:
        try:
            return await self._git(["config", "--get", _OURS], inside=True) == ["true"]
        except BuildFailed:
            return False

    async def _refuse_to_overwrite(self) -> None:
        changed = await self._git(["status", "--porcelain", "--untracked-files=no"], inside=True)
        if changed:
            raise BuildFailed(
                STAGE,
                f"{self.path} has changes of yours ({changed[0].strip()}, {len(changed)} in all): commit or "
                "stash them, or set llama_cpp.repo_path to another folder",
            )

    async def _git(
        self,
        words: Sequence[str],
        *,
        inside: bool = False,
        on_line: Callable[[str], None] | None = None,
        more: Mapping[str, str] | None = None,
        limit: float = float("inf"),
    ) -> list[str]:
        git = need("git", self.environ, STAGE)
        # The folder itself, never a repository around it.
        where = [f"--git-dir={self.path / '.git'}", f"--work-tree={self.path}"] if inside else []
        return await run_tool(
            [git, *_GIT_OPTIONS, *where, *words],
            stage=STAGE,
            environ=self.environ,
            more={**_GIT_ENVIRONMENT, **(more or {})},
            on_line=on_line,
            silence=_SILENT_SECONDS,
            limit=limit,
            explain=functools.partial(_explain, url=hide_credentials(self.url)),
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
            raise BuildFailed(STAGE, f"{self.path} holds no CMakeLists.txt: it isn't the source of llama.cpp")
        digest = hashlib.sha256()
        for folder, folders, names in os.walk(self.path):
            # Not what lies beside the source by default: builds and their products.
            folders[:] = sorted(f for f in folders if f not in (".git", "build", "bin", "__pycache__"))
            for name in sorted(names):
                path = os.path.join(folder, name)
                try:
                    found = os.lstat(path)
                except OSError as error:
                    raise BuildFailed(STAGE, f"{path} can't be read: {error}") from error
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
                STAGE, f"{self.path} is no archive that can be unpacked here (.tar, .tar.gz, .tar.xz, .zip)"
            )
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:40]
        except OSError as error:
            raise BuildFailed(STAGE, f"{self.path} can't be read: {error}") from error

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
                raise BuildFailed(STAGE, f"{self.path} can't be unpacked: {error}") from error
            part.rename(folder)
        inside = [
            p.parent for p in (folder / "CMakeLists.txt", *folder.glob("*/CMakeLists.txt")) if p.is_file()
        ]
        if not inside:
            raise BuildFailed(STAGE, f"{self.path} holds no CMakeLists.txt: it isn't the source of llama.cpp")
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


def _explain(lines: Sequence[str], *, url: str) -> str:
    """What git's last words mean for the one who configured it; "" when they speak for themselves."""
    text = "\n".join(lines)
    if "Could not resolve host" in text or "unable to access" in text:
        return f"{url} can't be reached; without network, set llama_cpp.repo_url to a folder or an archive"
    if "does not appear to be a git repository" in text or "not found" in text:
        return f"{url} is no git repository, or not for us"
    if "Authentication failed" in text or "could not read Username" in text:
        return f"{url} asks for a password: use ssh, or a credential helper of git"
    if "No space left" in text:
        return "the disk is full"
    return ""


def processor() -> str:
    """What a binary made with -march=native is bound to: the architecture and its extensions."""
    words = [os.uname().machine, sys.platform]
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                words += sorted(line.partition(":")[2].split())
                break
    except OSError:
        pass  # not Linux: the architecture has to do
    return hashlib.sha256(" ".join(words).encode()).hexdigest()[:16]
