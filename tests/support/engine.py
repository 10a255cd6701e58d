"""An engine alone, without a node: the embedded one, a real llama-server, or the fake.

For tests of the engines themselves and of what talks to one. Synchronous on purpose: nothing here
needs a loop, and a plain `with` block cleans up in any kind of test.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS, clean_environment

EMBEDDED = (sys.executable, "-m", "llamesh.local.engine")


class Running:
    """An engine process. `output()` is what it printed so far, both streams."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self.popen = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.client = httpx.Client(trust_env=False, timeout=PATIENCE_SECONDS)
        self.url = ""

    def output(self) -> str:
        """Everything it printed."""
        # The child shares the file's position: read without moving it.
        return os.pread(self._file.fileno(), 1 << 24, 0).decode("utf-8", "replace")

    def wait(self) -> int:
        """Wait for its end; the exit code."""
        return self.popen.wait(PATIENCE_SECONDS)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait for its end."""
        self.popen.send_signal(number)
        return self.wait()

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until `condition` holds; fails if the engine ends first or patience runs out."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            ended = self.popen.poll()
            assert ended is None, f"it ended with {ended} while waiting for {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {what}:\n{self.output()}"
            time.sleep(POLL_SECONDS)

    def learn_url(self) -> None:
        """Wait for the line that says where it listens (port 0 lets the system choose)."""
        self.until(lambda: "listening on http" in self.output(), "listening")
        found = re.search(r"listening on (http://\S+)", self.output())
        assert found is not None
        self.url = found[1]
        self.client.base_url = httpx.URL(self.url)

    def until_healthy(self) -> None:
        """Wait until `/health` says 200."""

        def healthy() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return self.client.get("/health").status_code == 200
            return False

        self.until(healthy, "health")

    def ask(self, path: str, document: Mapping[str, Any]) -> Any:
        """POST a document; the reply's document. Fails unless it is a 200."""
        reply = self.client.post(path, json=document)
        assert reply.status_code == 200, reply.text
        return reply.json()

    def close(self) -> None:
        """Kill it and release everything."""
        self.popen.kill()
        self.popen.wait()
        self.client.close()
        self._file.close()


@contextlib.contextmanager
def started(
    flags: Sequence[str | Path], *, binary: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start an engine with these flags and nothing else; the embedded one unless `binary` names another."""
    command = EMBEDDED if binary is None else (str(binary),)
    engine = Running([*command, *map(str, flags)], clean_environment(env or {}))
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def serving(
    model: Path, *flags: str, binary: Path | None = None, env: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Start an engine on a free loopback port and wait until it is healthy."""
    with started(["-m", model, "--port", "0", *flags], binary=binary, env=env) as engine:
        engine.learn_url()
        engine.until_healthy()
        yield engine
