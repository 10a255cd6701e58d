"""A node process on fake llama-servers, for plain tests that drive it through raw sockets."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil

from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import prepare
from tests.web.raw import Cut, Http1, Http2, Reply, get, post

T = TypeVar("T")

PATIENCE = 20.0
LANES = ("fast", "http1.0", "http2")
"""The ways to the same answers: the fast lane, and Hypercorn's two."""


class Served:
    """A running node. `events` grows as it logs."""

    def __init__(
        self, directory: Path, models: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        command, _, environment = prepare(
            directory,
            {"models": [self._model(name, dict(told)) for name, told in models.items()]},
            config,
            binary_path=FAKE_LLAMA_SERVER,
        )
        self.events: list[dict[str, Any]] = []
        self._popen = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.pid = self._popen.pid
        self._reader = threading.Thread(target=self._read, args=(self._popen.stdout,), daemon=True)
        self._reader.start()
        listening = self.wait(lambda: self.find("listening"), "listening")
        self.port = int(listening[0]["url"].rpartition(":")[2])

    def _model(self, name: str, told: dict[str, Any]) -> dict[str, Any]:
        profile = {
            "id": "default",
            "llama_server_args": told.pop("args", ""),
            **told.pop("profile", {}),
            "model_path": str(fake_profile_file(self.directory, name, **told)),
        }
        return {"name": name, "profiles": [profile]}

    def _read(self, stream: IO[str] | None) -> None:
        assert stream is not None
        for line in stream:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            self.events.append(entry if isinstance(entry, dict) else {"event": line})

    def close(self) -> None:
        """End it and everything below it."""
        children = psutil.Process(self.pid).children(recursive=True) if self._popen.poll() is None else []
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self._popen.wait()
        self._reader.join(5)
        if self._popen.stdout is not None:
            self._popen.stdout.close()

    # Looking.

    def find(self, event: str, **fields: Any) -> list[dict[str, Any]]:
        """The log events of that name with these fields so far."""
        return [
            entry
            for entry in list(self.events)
            if entry.get("event") == event and all(entry.get(k) == v for k, v in fields.items())
        ]

    def wait(self, look: Callable[[], T], what: str) -> T:
        """Poll until `look` returns something true."""
        deadline = time.monotonic() + PATIENCE
        while not (found := look()):
            tail = "\n".join(json.dumps(entry) for entry in self.events[-12:])
            assert self._popen.poll() is None, f"the node ended:\n{tail}"
            assert time.monotonic() < deadline, f"never: {what}; the node said:\n{tail}"
            time.sleep(0.01)
        return found

    def fake(self, model: str) -> dict[str, Any]:
        """What the newest fake of a model counted."""
        port = [e for e in self.find("starting") if e["instance"].startswith(f"{model}:default#")][-1]["port"]
        with Http1(port) as client:
            client.send(get("/__fake/stats", "Connection: close"))
            found: dict[str, Any] = client.answer().json()
            return found

    def wait_fake(self, model: str, condition: Callable[[dict[str, Any]], bool], what: str) -> None:
        """Wait until the fake's counters are so."""
        self.wait(lambda: condition(self.fake(model)), what)

    def page(self, path: str) -> Any:
        with Http1(self.port) as client:
            client.send(get(path, "Connection: close"))
            return client.answer().json()

    def process(self) -> psutil.Process:
        return psutil.Process(self.pid)

    def defects(self) -> list[dict[str, Any]]:
        """What the node logged about itself being wrong."""
        return [
            entry
            for entry in list(self.events)
            if "defect" in str(entry.get("event")) or "Traceback" in json.dumps(entry)
        ]

    # Asking.

    def ask(
        self,
        lane: str,
        document: Any,
        path: str = "/v1/chat/completions",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        host: str = "x",
    ) -> Reply:
        """One request by that lane, its own connection; `document` None sends no body."""
        fields = dict(headers or {})
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        if lane == "http2":
            with Http2(self.port) as two:
                pairs = [(name.lower(), value) for name, value in fields.items()]
                return two.answer(two.start(method, path, pairs, None if document is None else body, host))
        version = "1.0" if lane == "http1.0" else "1.1"
        lines = [f"{name}: {value}" for name, value in fields.items()]
        with Http1(self.port) as one:
            if document is None:
                one.send(get(path, *lines, method=method, version=version, host=host))
            else:
                data = post(body, path, *lines, version=version, host=host)
                one.send(data.replace(b"POST", method.encode(), 1))
            return one.answer(has_body=method != "HEAD")


@contextlib.contextmanager
def served(
    directory: Path, models: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any] | None = None
) -> Iterator[Served]:
    """`models`: name -> behaviour of its fake llama-server, besides `args` and `profile` for the cookbook."""
    node = Served(directory, models, config or {})
    try:
        yield node
        assert node.defects() == []
    finally:
        node.close()


class Asking:
    """A request whose answer is read bit by bit, the same by every lane. Raises Cut."""

    def __init__(
        self,
        node: Served,
        lane: str,
        document: Any,
        path: str = "/v1/chat/completions",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.lane = lane
        body, fields = json.dumps(document).encode(), dict(headers or {})
        if lane == "http2":
            self._two = Http2(node.port)
            self._stream = self._two.start("POST", path, [*fields.items()], body)
        else:
            self._one = Http1(node.port)
            lines = [f"{name}: {value}" for name, value in fields.items()]
            self._one.send(post(body, path, *lines, version="1.0" if lane == "http1.0" else "1.1"))

    def __enter__(self) -> Asking:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def until(self, mark: bytes) -> None:
        """Read until the answer holds `mark`."""
        if self.lane == "http2":
            self._two.until(self._stream, mark)
            return
        while mark not in self._one.buffer:
            if not self._one.fill():
                raise Cut(self._one.buffer)

    def answer(self) -> Reply:
        """Read to the end."""
        return self._two.answer(self._stream) if self.lane == "http2" else self._one.answer()

    def leave(self) -> None:
        """Close the connection."""
        (self._two if self.lane == "http2" else self._one).sock.close()

    def reset(self) -> None:
        """Give up only this request; on HTTP/1 that is the connection."""
        if self.lane == "http2":
            self._two.reset(self._stream)
        else:
            self.leave()
