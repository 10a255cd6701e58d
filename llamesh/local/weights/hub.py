"""What the hub says about a repository: its files, their sizes and hashes; and who may have them.

huggingface-hub asks and knows the token (HF_TOKEN, or its own login). It is imported when the first question
comes up: it costs 25 MB, and most nodes never ask. All calls block; nothing that the hub says is believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from llamesh.config.model_names import BadName, check_file
from llamesh.core.model_files import RemoteFile
from llamesh.local.weights.errors import (
    Hostile,
    NotAllowed,
    NotFound,
    Unreachable,
    WeightsError,
    WrongContent,
)

_ASK_SECONDS = 15.0
_MOST_FILES = 20_000
_LARGEST_FILE = 1 << 44
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository as it is at `commit`. `repr` hides the token."""

    repo: str
    commit: str
    files: tuple[RemoteFile, ...]
    endpoint: str
    token: str | None

    def __repr__(self) -> str:
        return f"Listing({self.repo!r}, {self.commit!r}, {len(self.files)} files)"

    def url(self, file: RemoteFile) -> str:
        """Where a file is asked for."""
        from urllib.parse import quote

        return f"{self.endpoint}/{self.repo}/resolve/{self.commit}/{quote(file.name)}"

    def refusal(self) -> Callable[[int, str], WeightsError]:
        """What a refused file means: `refusal()(status, X-Error-Code)`."""
        return lambda status, code: _refused(self.repo, status, code, self.endpoint, self.token)


def list_repo(repo: str) -> Listing:
    """Ask the hub what `main` of a repository is. Raises WeightsError."""
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    endpoint = constants.ENDPOINT
    token = get_token() if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else None
    try:
        info = HfApi(endpoint=endpoint).model_info(
            repo, revision="main", files_metadata=True, token=token or False, timeout=_ASK_SECONDS
        )
    except GatedRepoError:
        raise _refused(repo, 403, "GatedRepo", endpoint, token) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise _refused(
            repo, status, error.response.headers.get("X-Error-Code") or "", endpoint, token
        ) from None
    except OfflineModeIsEnabled as error:
        raise Unreachable(f"{repo}: {error}") from None
    # The border to a library and to whatever answers in the hub's place: timeouts, refused connections,
    # bad certificates, what isn't JSON, and what isn't the document that was expected.
    except Exception as error:
        words = str(error).splitlines()
        why = f"{type(error).__name__}: {words[0][:200]}" if words else type(error).__name__
        raise Unreachable(f"{repo}: {endpoint} gives no usable answer ({why})") from None
    return _checked(repo, endpoint, token, str(info.sha), list(info.siblings or ()))


def _checked(repo: str, endpoint: str, token: str | None, commit: str, siblings: list[object]) -> Listing:
    if not _COMMIT.fullmatch(commit):
        raise WrongContent(f"{repo}: {endpoint} doesn't say which commit it is")
    if len(siblings) > _MOST_FILES:
        raise WrongContent(f"{repo}: it has {len(siblings)} files, which is more than is looked at")
    files = []
    for one in siblings:
        name = getattr(one, "rfilename", None)
        if not isinstance(name, str) or not name.lower().endswith(".gguf"):
            continue
        try:
            check_file(name)
        except BadName as error:
            raise Hostile(f"{repo}: {error.message}; nothing of it is fetched") from None
        files.append(_file(repo, name, one))
    return Listing(repo, commit, tuple(files), endpoint, token)


def _file(repo: str, name: str, one: object) -> RemoteFile:
    lfs, blob = getattr(one, "lfs", None), getattr(one, "blob_id", None)
    sha256, size = getattr(lfs, "sha256", None), getattr(lfs, "size", getattr(one, "size", None))
    if not isinstance(size, int) or not 0 < size <= _LARGEST_FILE:
        raise WrongContent(f"{repo}/{name}: the hub says that it has {size!r} bytes")
    if isinstance(sha256, str) and _SHA256.fullmatch(sha256):
        return RemoteFile(name, size, sha256=sha256)
    if lfs is None and isinstance(blob, str) and _SHA1.fullmatch(blob):
        return RemoteFile(name, size, git_sha1=blob)
    raise WrongContent(f"{repo}/{name}: the hub says no hash that it could be checked by")


def _refused(repo: str, status: int, code: str, endpoint: str, token: str | None) -> WeightsError:
    page = f"{endpoint}/{repo}"
    login = "set HF_TOKEN, or run `hf auth login`"
    if code == "GatedRepo":
        if token:
            return NotAllowed(
                f"{repo} is gated, and your token isn't let in: accept its conditions at {page} with the "
                "account of that token, and see that the token may read gated repositories"
            )
        return NotAllowed(f"{repo} is gated: accept its conditions at {page}, then {login}")
    if code == "RevisionNotFound":
        return NotFound(f"{repo} has no revision main; see {page}")
    if code == "EntryNotFound":
        return NotFound(f"{repo} doesn't have the file any more; see {page}")
    if code == "RepoNotFound" or status in (401, 404):
        if token:
            return NotFound(f"there is no repository {repo} that your token may see; see {page}")
        return NotFound(f"there is no public repository {repo}; see {page}. If it is private, {login}")
    if status == 403:
        return NotAllowed(f"{repo}: {endpoint} refuses it (403)" + ("" if token else f"; {login}"))
    if status in (408, 425, 429) or status >= 500:
        return Unreachable(f"{repo}: {endpoint} answers {status}")
    return WrongContent(f"{repo}: {endpoint} answers {status}")
