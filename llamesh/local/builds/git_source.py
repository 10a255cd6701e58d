"""A git repository as a source of llama.cpp: asked for its newest commit, fetched, checked out."""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llamesh.local.builds.failure import FETCH, BuildFailed
from llamesh.local.builds.tools import hide_credentials, need, run_tool

# Of our own, so that the remotes in somebody's clone stay theirs. The setting marks clones that we made.
_REMOTE = "llamesh"
_OURS = "llamesh.managed"

# Asking for the newest commit is a small request; fetching may take long, but not in silence.
_ASK_SECONDS = 60.0
_SILENT_SECONDS = 300.0

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHORT_COMMIT = re.compile(r"[0-9a-f]{7,40}")

# Nobody is asked for a password; a transport that runs programs is refused by git, too.
_GIT_ENVIRONMENT = {
    "GIT_TERMINAL_PROMPT": "0",
    "GIT_ALLOW_PROTOCOL": "file:http:https:ssh",
    "GIT_OPTIONAL_LOCKS": "0",
    "LC_ALL": "C",
}
_SETTINGS = ("http.lowSpeedLimit=1000", "http.lowSpeedTime=60", "advice.detachedHead=false")
_GIT_OPTIONS = tuple(word for setting in _SETTINGS for word in ("-c", setting))


@dataclass(frozen=True, slots=True)
class GitSource:
    """A branch, tag or commit of a repository, checked out at `path`.

    `headers` travel by the environment: a password in a url would show in the list of processes.
    """

    url: str
    reference: str
    path: Path
    environ: Mapping[str, str]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, url: str, reference: str, path: Path, environ: Mapping[str, str]) -> GitSource:
        """Of a url that may hold a user's name and password."""
        url, headers = _without_credentials(url)
        return cls(url, reference, path, environ, headers)

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
        raise BuildFailed(FETCH, f"{hide_credentials(self.url)} has no branch and no tag {self.reference!r}")

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
                raise BuildFailed(FETCH, f"{hide_credentials(self.url)} has no commit {commit}") from None

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
            FETCH, f"{hide_credentials(self.url)} has no branch, tag or commit {self.reference!r}"
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
                FETCH,
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
        git = need("git", self.environ, FETCH)
        # The folder itself, never a repository around it.
        where = [f"--git-dir={self.path / '.git'}", f"--work-tree={self.path}"] if inside else []
        return await run_tool(
            [git, *_GIT_OPTIONS, *where, *words],
            stage=FETCH,
            environ=self.environ,
            more={**_GIT_ENVIRONMENT, **self.headers, **(more or {})},
            on_line=on_line,
            silence=_SILENT_SECONDS,
            limit=limit,
            explain=functools.partial(_explain, url=hide_credentials(self.url)),
        )


def _without_credentials(url: str) -> tuple[str, dict[str, str]]:
    """A url without name and password, and the environment that has git send them as a header."""
    if not url.startswith(("https://", "http://")):
        return url, {}
    parts = urlsplit(url)
    name_and_password, at, host = parts.netloc.rpartition("@")
    if not at:
        return url, {}
    name, _, password = name_and_password.partition(":")
    secret = base64.b64encode(f"{unquote(name)}:{unquote(password)}".encode()).decode()
    clean = parts._replace(netloc=host)
    return clean.geturl(), {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"http.{parts.scheme}://{host}/.extraHeader",
        "GIT_CONFIG_VALUE_0": f"Authorization: Basic {secret}",
    }


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
