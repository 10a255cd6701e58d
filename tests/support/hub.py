"""A hub of model files on this machine, with a content network beside it, that behaves and misbehaves.

    with running_hub() as hub:
        hub.add("owner/name", {"model-Q4_K_M.gguf": content})
        ... HF_ENDPOINT=hub.url ...
        assert hub.downloads("model-Q4_K_M.gguf") ...

It answers as the real one does, as far as a client can tell: `GET
/api/models/OWNER/NAME/revision/REV?blobs=true` lists files with their sizes and hashes;
`/OWNER/NAME/resolve/REV/FILE` says X-Repo-Commit, X-Linked-Size and X-Linked-Etag and redirects to another
origin, by an address that is good for some time, where ranges can be had. What goes wrong is set in `Fault`s
of single files, or of a whole repository.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

PATIENCE_SECONDS = 20.0
_PIECE = 1 << 20


@dataclass
class Fault:
    """What goes wrong with a file. Numbers of bytes count from the start of each answer.

    `stall_after`: then nothing comes until `resume` is set; `cut_after`: then the connection ends, `cuts`
    times; `statuses`: what the content network answers first, one after another; `ranges`: False for a
    server that knows none; `told_size`: what the hub says its size is; `served`: other content than was
    promised; `redirect`: where the hub sends us instead; `uses`: so often its address may be called before
    it has expired; `pace`: seconds of pause after each 64 KiB.
    """

    stall_after: int | None = None
    resume: threading.Event = field(default_factory=threading.Event)
    cut_after: int | None = None
    cuts: int = 1 << 30
    statuses: list[int] = field(default_factory=list)
    ranges: bool = True
    told_size: int | None = None
    served: bytes | None = None
    redirect: str | None = None
    uses: int | None = None
    pace: float = 0.0


@dataclass
class Repo:
    """`gated`: nobody gets in but with a token of `allowed`; `private`: the same, but it isn't even there."""

    files: dict[str, bytes | Path]
    commit: str
    gated: bool = False
    private: bool = False
    allowed: frozenset[str] = frozenset()
    status: int = 0  # answered to everything, when set


@dataclass(frozen=True)
class Seen:
    """A request: at "hub" or "store", its path, token and range; `sent`: bytes of content."""

    where: str
    method: str
    path: str
    authorization: str | None
    range: str | None


class Hub:
    """See the module."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: dict[str, Fault] = {}
        self.seen: list[Seen] = []
        self.sent = 0  # bytes of content, over all answers
        self.lock = threading.Lock()
        self._servers = [
            _serve(self, "hub", "127.0.0.1", context),
            _serve(self, "store", "127.0.0.1", context),
        ]
        scheme = "https" if context is not None else "http"
        # Two names, so that they are two hosts and not only two ports.
        self.url = f"{scheme}://127.0.0.1:{self._servers[0].server_port}"
        self.store_url = f"{scheme}://localhost:{self._servers[1].server_port}"

    def add(self, name: str, files: Mapping[str, bytes | Path], **more: Any) -> Repo:
        """Have a repository; `more` are fields of `Repo`."""
        commit = hashlib.sha1(repr(sorted((n, digest_of(c)) for n, c in files.items())).encode()).hexdigest()
        repo = self.repos[name] = Repo(dict(files), commit, **more)
        return repo

    def fault(self, file: str, **more: Any) -> Fault:
        """Have something go wrong with the files of this name."""
        fault = self.faults[file] = Fault(**more)
        return fault

    def asked(self, where: str = "store", containing: str = "") -> list[Seen]:
        """The requests so far."""
        with self.lock:
            return [one for one in self.seen if one.where == where and containing in unquote(one.path)]

    def close(self) -> None:
        """End all answers and both servers."""
        for fault in self.faults.values():
            fault.resume.set()
        for server in self._servers:
            server.closing.set()
            server.shutdown()
            server.server_close()


@contextlib.contextmanager
def running_hub(context: ssl.SSLContext | None = None) -> Iterator[Hub]:
    """A hub on free ports of the loopback. `context`: speak TLS."""
    hub = Hub(context)
    try:
        yield hub
    finally:
        hub.close()


def digest_of(content: bytes | Path) -> str:
    """SHA-256."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(content: bytes | Path) -> int:
    """In bytes."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: Hub, where: str, host: str) -> None:
        self.hub, self.where = hub, where
        self.closing = threading.Event()
        super().__init__((host, 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients go away in the middle: that is what is tested


def _serve(hub: Hub, where: str, host: str, context: ssl.SSLContext | None) -> _Server:
    server = _Server(hub, where, host)
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub, url = self.server.hub, urlsplit(self.path)
        seen = Seen(
            self.server.where, self.command, self.path, self.headers["Authorization"], self.headers["Range"]
        )
        with hub.lock:
            hub.seen.append(seen)
        if self.server.where == "store":
            self._store(url.path, parse_qs(url.query))
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", url.path):
            self._list(found[1], unquote(found[2] or "main"))
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path):
            self._resolve(found[1], unquote(found[3]))
        else:
            self._say(404, {"error": "not a page of this hub"})

    # The hub.

    def _allowed(self, name: str) -> Repo | None:
        """The repository, if the caller may see it; else the answer has gone out."""
        repo = self.server.hub.repos.get(name)
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        if repo is not None and repo.status:
            self._say(repo.status, {"error": "told to fail"})
        elif repo is None or (repo.private and token not in repo.allowed):
            # Whoever has no token isn't told whether it exists.
            self._say(404 if token else 401, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and token not in repo.allowed:
            text = f"Access to model {name} is restricted."
            headers = {"X-Error-Code": "GatedRepo", "X-Error-Message": text}
            self._say(403 if token else 401, {"error": text}, headers)
        else:
            return repo
        return None

    def _list(self, name: str, revision: str) -> None:
        hub, repo = self.server.hub, self.server.hub.repos.get(name)
        # A gated repository shows its files to everyone.
        if repo is None or not repo.gated:
            repo = self._allowed(name)
        if repo is None:
            return
        if revision not in ("main", repo.commit):
            self._say(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return
        siblings = []
        for file, content in repo.files.items():
            told = hub.faults[file].told_size if file in hub.faults else None
            size = size_of(content) if told is None else told
            entry: dict[str, Any] = {"rfilename": file, "size": size}
            if file.endswith(".gguf"):
                entry["lfs"] = {"sha256": digest_of(content), "size": size, "pointerSize": 134}
                entry["blobId"] = "0" * 40
            else:
                assert isinstance(content, bytes)
                entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            siblings.append(entry)
        document = {
            "id": name,
            "modelId": name,
            "sha": repo.commit,
            "private": repo.private,
            "siblings": siblings,
        }
        self._say(200, document)

    def _resolve(self, name: str, file: str) -> None:
        hub = self.server.hub
        repo = self._allowed(name)
        if repo is None:
            return
        content = repo.files.get(file)
        if content is None:
            self._say(404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"})
            return
        fault = hub.faults.get(file, Fault())
        size = size_of(content) if fault.told_size is None else fault.told_size
        headers = {
            "X-Repo-Commit": repo.commit,
            "X-Linked-Size": str(size),
            "X-Linked-Etag": f'"{digest_of(content)}"',
            "Location": fault.redirect or f"{hub.store_url}/{name}/{quote(file)}?signature=secret",
        }
        self._say(302, {}, headers)

    # The content network.

    def _store(self, path: str, query: Mapping[str, list[str]]) -> None:
        hub = self.server.hub
        owner, name, file = path.strip("/").split("/", 2)
        file, repo = unquote(file), hub.repos.get(f"{owner}/{name}")
        content = repo.files.get(file) if repo is not None else None
        fault = hub.faults.setdefault(file, Fault())
        with hub.lock:
            status = fault.statuses.pop(0) if fault.statuses else 0
            if fault.uses is not None:
                fault.uses -= 1
                if fault.uses < 0:
                    fault.uses, status = 1, 403
        if query.get("signature") != ["secret"] and not path.startswith("/plain/"):
            status = status or 403
        if content is None or status:
            self._say(status or 404, {"error": "no"}, {"Retry-After": "0"} if status == 429 else {})
            return
        content = fault.served if fault.served is not None else content
        size = size_of(content)
        start, end = 0, size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked and fault.ranges:
            start, end = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
            if start >= size:
                self._say(416, {}, {"Content-Range": f"bytes */{size}"})
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        if fault.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{digest_of(content)}"' if isinstance(content, bytes) else '"file"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command != "HEAD":
            self._send(content, start, end, fault)

    def _send(self, content: bytes | Path, start: int, end: int, fault: Fault) -> None:
        hub, at = self.server.hub, start
        stall = None if fault.stall_after is None or fault.resume.is_set() else start + fault.stall_after
        with hub.lock:
            cut = None if fault.cut_after is None or fault.cuts <= 0 else start + fault.cut_after
            if cut is not None and cut < end:
                fault.cuts -= 1
        if isinstance(content, Path) and not (fault.pace or stall or cut) and not self._is_tls():
            with content.open("rb") as file:
                hub.sent += self.connection.sendfile(file, start, end - start)
            return
        step = 65536 if fault.pace else _PIECE
        while at < end:
            if stall is not None and at >= stall:
                fault.resume.wait(PATIENCE_SECONDS)
                stall = None
            if (cut is not None and at >= cut) or self.server.closing.is_set():
                self.close_connection = True
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            limits = [end, at + step, *(limit for limit in (stall, cut) if limit is not None and limit > at)]
            piece = _read(content, at, min(limits))
            self.wfile.write(piece)
            with hub.lock:
                hub.sent += len(piece)
            at += len(piece)
            if fault.pace:
                fault.resume.wait(fault.pace)

    def _is_tls(self) -> bool:
        return isinstance(self.connection, ssl.SSLSocket)

    def _say(self, status: int, document: Any, headers: Mapping[str, str] | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _read(content: bytes | Path, start: int, end: int) -> bytes:
    if isinstance(content, bytes):
        return content[start:end]
    with content.open("rb") as file:
        file.seek(start)
        return file.read(end - start)
