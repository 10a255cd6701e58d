"""The hub's own cache on this disk, and our notes about what is in it.

The layout is huggingface-hub's (its guide "Understand caching"), so that its tools and llama.cpp see what we
fetch, and we what they fetched:

    HF_HUB_CACHE/models--OWNER--NAME/blobs/SHA256                      the content
    HF_HUB_CACHE/models--OWNER--NAME/snapshots/COMMIT/path/file.gguf   a relative symlink to it
    HF_HUB_CACHE/models--OWNER--NAME/refs/main                         the commit that `main` was
    HF_HUB_CACHE/.locks/models--OWNER--NAME/SHA256.lock

What is ours alone lies where that library has other programs put theirs: HF_ASSETS_CACHE/llamesh, with
`records/KEY.json` for each model that was fetched or found (`Record`; its time says when it was last used),
and `web/SHA256/name` for files from plain addresses. All calls block.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamesh.config.cookbook import UrlFile
from llamesh.config.model_names import BadName, check_file, file_of_url, split_repo
from llamesh.core.model_files import NoSuchModel, RemoteFile, choose
from llamesh.local.weights.part import sync_folder, trouble
from llamesh.local.weights.wanted import Found, Wanted

_RECORD_BYTES = 4 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


@dataclass(frozen=True, slots=True)
class Stored:
    """A file on this disk. `path` is where engines look, `blob` where the bytes are; both absolute. `sha256`
    is "" for a small file that the hub knows by another hash. `ours`: fetched by llamesh."""

    name: str
    path: str
    blob: str
    size: int
    sha256: str
    ours: bool


@dataclass(frozen=True, slots=True)
class Record:
    """One model on this disk. `key` is `Wanted.key`, `name` for people; `used`: Unix time of the last use."""

    key: str
    name: str
    repo: str
    commit: str
    parts: tuple[Stored, ...]
    projector: Stored | None = None
    used: float = 0.0

    @property
    def files(self) -> tuple[Stored, ...]:
        return self.parts if self.projector is None else (*self.parts, self.projector)

    @property
    def found(self) -> Found:
        return Found(self.parts[0].path, self.projector.path if self.projector else None)


@dataclass(frozen=True, slots=True)
class Cache:
    """`hub` is the hub's cache, `own` our own folder."""

    hub: Path
    own: Path
    offline: bool = False

    # Where things lie.

    def folder(self, repo: str) -> Path:
        return self.hub / ("models--" + repo.replace("/", "--"))

    def blob(self, repo: str, digest: str) -> Path:
        return self.folder(repo) / "blobs" / digest

    def pointer(self, repo: str, commit: str, file: str) -> Path:
        return self.folder(repo) / "snapshots" / commit / file

    def lock(self, repo: str, digest: str) -> Path:
        return self.hub / ".locks" / self.folder(repo).name / f"{digest}.lock"

    def web_file(self, source: UrlFile) -> Path:
        return self.own / "web" / source.sha256 / file_of_url(source.url)

    def web_lock(self, source: UrlFile) -> Path:
        return self.own / "locks" / f"{source.sha256}.lock"

    # What is there.

    def look(self, wanted: Wanted) -> Record | None:
        """The weights, when all of them are on this disk: by our record, else as the hub's cache has them."""
        record = self.record(wanted.key)
        if record is not None and all(_is_whole(file) for file in record.files):
            return record
        if isinstance(wanted.source, UrlFile):
            return None
        repo, quant = split_repo(wanted.source.repo)
        file = wanted.source.file
        if file is None and quant is None and not self.offline:
            return None  # which one is the usual one, the hub has to say
        commit, files = self.snapshot(repo)
        try:
            choice = choose(files, file=file, quant=quant, projector=wanted.projector)
        except NoSuchModel:
            return None
        parts = tuple(self._stored(repo, commit, one) for one in choice.parts)
        projector = self._stored(repo, commit, choice.projector) if choice.projector else None
        return Record(wanted.key, wanted.name, repo, commit, parts, projector)

    def snapshot(self, repo: str) -> tuple[str, list[RemoteFile]]:
        """What the cache has of `main`: its commit, and the files. "" and none where it has nothing."""
        try:
            commit = (self.folder(repo) / "refs" / "main").read_text()[:64].strip()
        except (OSError, UnicodeDecodeError):
            return "", []
        if not _COMMIT.fullmatch(commit):
            return "", []
        root = self.folder(repo) / "snapshots" / commit
        files = []
        for folder, _, names in os.walk(root):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(OSError, BadName):
                    relative = check_file(path.relative_to(root).as_posix())
                    files.append(RemoteFile(relative, path.stat().st_size, sha256=path.resolve().name))
        return commit, sorted(files, key=lambda one: one.name)

    def record(self, key: str) -> Record | None:
        """What we noted under a key."""
        path = self._record_path(key)
        try:
            with path.open("rb") as file:
                document = json.loads(file.read(_RECORD_BYTES))
                used = os.fstat(file.fileno()).st_mtime
            return _record(document, used)
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return None

    def records(self) -> Iterator[Record]:
        """All that we noted, whether it is still there or not."""
        with contextlib.suppress(OSError):
            for path in sorted((self.own / "records").glob("*.json")):
                if (record := self.record(path.stem)) is not None:
                    yield record

    # Changes.

    def note(self, record: Record) -> None:
        """Remember a model, used just now. Raises WeightsError."""
        path = self._record_path(record.key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            document = asdict(replace(record, used=0.0))
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
            temporary.write_text(json.dumps(document, indent=1))
            os.replace(temporary, path)
        except OSError as error:
            raise trouble(error, path) from None

    def touch(self, key: str) -> None:
        """It is used just now. Best effort: a note about use isn't worth an error."""
        with contextlib.suppress(OSError):
            os.utime(self._record_path(key))

    def publish(self, repo: str, commit: str, file: RemoteFile) -> Stored:
        """Have the snapshot of a commit show a blob that is there. Raises WeightsError."""
        blob, pointer = self.blob(repo, file.digest), self.pointer(repo, commit, file.name)
        try:
            pointer.parent.mkdir(parents=True, exist_ok=True)
            if not pointer.exists():
                temporary = pointer.with_name(f".{pointer.name[:200]}.{uuid.uuid4().hex}")
                try:
                    temporary.symlink_to(os.path.relpath(blob, pointer.parent))
                except OSError:
                    os.link(blob, temporary)  # a disk without symlinks
                os.replace(temporary, pointer)
            sync_folder(pointer.parent)
        except OSError as error:
            raise trouble(error, pointer) from None
        return Stored(file.name, str(pointer), str(blob), file.size, file.sha256 or "", ours=True)

    def note_main(self, repo: str, commit: str) -> None:
        """`main` is this commit now. Raises WeightsError."""
        path = self.folder(repo) / "refs" / "main"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".main.{uuid.uuid4().hex}")
            temporary.write_text(commit)
            os.replace(temporary, path)
        except OSError as error:
            raise trouble(error, path) from None

    def remove(self, record: Record, *, only_ours: bool = False) -> int:
        """Remove a model: its files, but those that another record needs, and the record. Bytes that are free
        now. `only_ours`: nothing that somebody else fetched. Raises WeightsError.
        """
        needed = {file.blob for other in self.records() if other.key != record.key for file in other.files}
        freed = 0
        for file in record.files:
            if file.blob in needed or (only_ours and not file.ours):
                continue
            try:
                for path in {file.path, file.blob}:
                    Path(path).unlink(missing_ok=True)
            except OSError as error:
                raise trouble(error, Path(file.blob)) from None
            freed += file.size
        with contextlib.suppress(OSError):
            self._record_path(record.key).unlink(missing_ok=True)
        return freed

    def _stored(self, repo: str, commit: str, file: RemoteFile) -> Stored:
        path = self.pointer(repo, commit, file.name)
        blob = path.resolve()
        sha256 = blob.name if len(blob.name) == 64 else ""
        return Stored(file.name, str(path), str(blob), file.size, sha256, ours=False)

    def _record_path(self, key: str) -> Path:
        return self.own / "records" / f"{key}.json"


def find_cache(environ: Mapping[str, str]) -> Cache:
    """The cache that these variables name, by huggingface-hub's rules (its `constants`), without importing
    it: an idle node is spared 25 MB."""

    def path(*choices: str | None) -> Path:
        chosen = next(choice for choice in choices if choice)
        return Path(os.path.expandvars(os.path.expanduser(chosen))).absolute()

    xdg = environ.get("XDG_CACHE_HOME")
    home = path(environ.get("HF_HOME"), f"{xdg}/huggingface" if xdg else None, "~/.cache/huggingface")
    hub = path(environ.get("HF_HUB_CACHE"), environ.get("HUGGINGFACE_HUB_CACHE"), str(home / "hub"))
    assets = path(
        environ.get("HF_ASSETS_CACHE"), environ.get("HUGGINGFACE_ASSETS_CACHE"), str(home / "assets")
    )
    offline = environ.get("HF_HUB_OFFLINE") or environ.get("TRANSFORMERS_OFFLINE") or ""
    return Cache(hub, assets / "llamesh", offline.upper() in _TRUE)


def _is_whole(file: Stored) -> bool:
    try:
        return os.stat(file.path).st_size == file.size
    except (OSError, ValueError):
        return False


def _record(document: dict[str, Any], used: float) -> Record:
    parts = tuple(Stored(**entry) for entry in document["parts"])
    projector = Stored(**document["projector"]) if document["projector"] else None
    names = (document["key"], document["name"], document["repo"], document["commit"])
    if not parts or not all(isinstance(name, str) for name in names):
        raise ValueError("not a record")
    return Record(*names, parts, projector, used)
