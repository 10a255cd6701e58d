"""A whole node as a child process, for tests from outside.

    async with running_node(tmp_path, cookbook, {"auth": {...}}, binary_path=FAKE_LLAMA_SERVER) as node:
        reply = await node.client.post("/v1/chat/completions", json={...})
        await node.wait_event("instance ready", profile="m:default")
        assert await node.stop() == 0

The node has its own directory, environment and process group; nothing of the developer's configuration
reaches it, and whatever happens in the test, neither it nor a child of it outlives the block.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import httpx
import psutil
import trio

CHECKOUT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 20.0
"""How long anything here is waited for. Generous: it only ever runs out in a test that fails."""

POLL_SECONDS = 0.01


class Node:
    """A running node. `events` grows as the node logs; `errors` are the lines of its stderr."""

    def __init__(
        self,
        command: Sequence[str],
        directory: Path,
        environment: Mapping[str, str],
        *,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """`pass_fds`: descriptors of ours that it gets under the same numbers."""
        self.directory = directory
        self.events: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.url = ""
        self._seen: set[psutil.Process] = set()
        self._news = trio.Event()
        self._token = trio.lowlevel.current_trio_token()
        self._popen = subprocess.Popen(
            command,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            pass_fds=pass_fds,
        )
        self.pid = self._popen.pid
        # Threads, not tasks: they need no nursery, so a failing test raises its own plain exception.
        self._readers = [
            self._reader(self._popen.stdout, self._take_event),
            self._reader(self._popen.stderr, self.errors.append),
        ]
        self.client = httpx.AsyncClient(trust_env=False, timeout=PATIENCE_SECONDS)

    @property
    def port(self) -> int:
        """The port of `url`."""
        return urlsplit(self.url).port or 0

    @property
    def returncode(self) -> int | None:
        """The exit code (negative: the signal), None while it runs."""
        return self._popen.poll()

    def children(self) -> list[psutil.Process]:
        """Every process below the node that is alive now."""
        try:
            found = [child for child in psutil.Process(self.pid).children(recursive=True) if _alive(child)]
        except psutil.NoSuchProcess:
            return []
        # Once the node is gone its children can't be found by it any more; `close` must.
        self._seen.update(found)
        return found

    def find_events(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """The events so far of this name that have these fields."""
        return [
            entry
            for entry in self.events
            if entry.get("event") == name and all(entry.get(key) == value for key, value in fields.items())
        ]

    async def wait_event(self, name: str, *, after: int = 0, **fields: Any) -> dict[str, Any]:
        """The first event of this name with these fields; waits for one if none came yet.

        `after` skips that many matches (1 waits for the second). Fails when the node ends first.
        """
        with trio.move_on_after(PATIENCE_SECONDS):
            while True:
                news = self._news
                if len(found := self.find_events(name, **fields)) > after:
                    return found[after]
                if self.returncode is not None and not any(reader.is_alive() for reader in self._readers):
                    break
                with trio.move_on_after(0.2):
                    await news.wait()
        raise AssertionError(f"no event {name!r} with {fields}; {self._account()}")

    def send_signal(self, number: int) -> None:
        """Send the node (not its children) a signal."""
        self._popen.send_signal(number)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the node and wait for its end; the exit code. Fails if a child of it is left."""
        children = self.children()
        self._popen.send_signal(number)
        return await self.wait_end(children)

    async def wait_end(self, children: Iterable[psutil.Process] = ()) -> int:
        """Wait until the node and `children` are gone; the exit code."""
        await wait_until(
            lambda: self.returncode is not None, lambda: f"the node didn't end; {self._account()}"
        )
        await wait_until(
            lambda: not any(_alive(child) for child in children),
            lambda: f"children left: {[child for child in children if _alive(child)]}; {self._account()}",
        )
        assert self.returncode is not None
        return self.returncode

    async def close(self) -> None:
        """Kill what is left and release everything; called by `running_node`."""
        with trio.CancelScope(shield=True):
            leftovers = {*self._seen, *self.children()}
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            for child in leftovers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            await trio.to_thread.run_sync(self._popen.wait)
            await self.client.aclose()
            for reader in self._readers:
                await trio.to_thread.run_sync(reader.join, 5)
            for stream in (self._popen.stdout, self._popen.stderr):
                if stream is not None:
                    stream.close()
        # pytest shows this for a failed test only.
        print("\n".join(json.dumps(entry) for entry in self.events), *self.errors, sep="\n")

    def _reader(self, stream: IO[str] | None, take: Callable[[str], None]) -> threading.Thread:
        def read() -> None:
            assert stream is not None
            for line in stream:
                take(line.rstrip("\n"))
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._tell)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread

    def _take_event(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        self.events.append(entry if isinstance(entry, dict) else {"event": line, "level": "unreadable"})

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _account(self) -> str:
        tail = [json.dumps(entry) for entry in self.events[-15:]] + self.errors[-15:]
        return f"exit code {self.returncode}; it said:\n" + "\n".join(tail)


async def wait_until(condition: Callable[[], bool], complaint: Callable[[], str] | str) -> None:
    """Poll until `condition` holds; fails with `complaint` when patience runs out."""
    with trio.move_on_after(PATIENCE_SECONDS):
        while not condition():
            await trio.sleep(POLL_SECONDS)
        return
    raise AssertionError(complaint if isinstance(complaint, str) else complaint())


@contextlib.asynccontextmanager
async def running_node(
    tmp_path: Path,
    cookbook: str | Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    binary_path: Path | None = None,
    env: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> AsyncIterator[Node]:
    """Start a node in `tmp_path` and wait until it listens.

    `cookbook` is YAML text or a document, `config` a document laid over a default that listens on a free
    loopback port. `binary_path` names the llama-server; without it the node has none, and uses the
    embedded engine. `env` comes on top of a clean environment, `arguments` after the two files.
    """
    node = Node(*prepare(tmp_path, cookbook, config, binary_path=binary_path, env=env, arguments=arguments))
    try:
        node.url = str((await node.wait_event("listening"))["url"])
        node.client.base_url = httpx.URL(node.url)
        yield node
    finally:
        await node.close()


def prepare(
    directory: Path,
    cookbook: str | Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
    *,
    binary_path: Path | None = None,
    env: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
) -> tuple[list[str], Path, dict[str, str]]:
    """Write the files of a node; the command, the directory and the environment to start it with."""
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "node_id": "node-a",
        "listen_addr": "127.0.0.1:0",
        "metrics_path": str(directory / "node-metrics.json"),
        "cluster": {"noise": {"config_dir": str(directory / "keys")}},
    }
    if binary_path is not None:
        settings["llama_cpp"] = {"binary_path": str(binary_path)}
    # JSON is YAML.
    files = {"config.yaml": json.dumps(overlay(settings, config or {}), indent=1)}
    files["cookbook.yaml"] = cookbook if isinstance(cookbook, str) else json.dumps(cookbook, indent=1)
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "llamesh"]
    command += ["--config", str(directory / "config.yaml"), "--cookbook", str(directory / "cookbook.yaml")]
    return [*command, *arguments], directory, clean_environment(env or {})


def clean_environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what steers a node, an engine or a proxy; `more` on top."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(("LLAMESH_", "LLAMA_", "CLUSTER_TOKEN", "NODE_PRIVATE_KEY"))
        and not name.lower().endswith("_proxy")
    }
    # A llama-server on PATH would take the embedded engine's place.
    places = environment.get("PATH", os.defpath).split(os.pathsep)
    environment["PATH"] = os.pathsep.join(
        place for place in places if shutil.which("llama-server", path=place) is None
    )
    environment["PYTHONPATH"] = str(CHECKOUT)
    return {**environment, **more}


def overlay(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """`top` over `base`, mapping by mapping."""
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = overlay(below, value) if both and below is not None else value
    return merged


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
