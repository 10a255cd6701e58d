"""A process that samples on request, since a process can load only one NVML.

Reads lines of JSON, {"now": seconds, "pids": [...]}, and answers each with the reading as a line of JSON;
with "background", the answer is empty at once, and a thread samples. `Probe` is the other end.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

import msgspec

from llamesh.core.readings import Reading
from llamesh.local.sensors import Sensors

PATIENCE_SECONDS = 30.0


class Probe:
    """The process, seen from a test. A context manager."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def sample(self, now: float = 0.0, *pids: int) -> Reading:
        """One reading of `Sensors` over there."""
        return msgspec.json.decode(self._ask(now=now, pids=pids), type=Reading)

    def sample_in_background(self, now: float) -> None:
        """Have a thread over there take a reading, which may hang, and return."""
        self._ask(now=now, pids=[], background=True)

    def _ask(self, **order: Any) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        # One answer to one order, so nothing can wait in the buffer of `stdout` already.
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(PATIENCE_SECONDS):
                self._process.kill()
                raise AssertionError("the probe hangs")
        answer = self._process.stdout.readline()
        assert answer, f"the probe ended with {self._process.wait()}"
        return answer

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        # End of input: it leaves by itself.
        try:
            self._process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        assert self._process.returncode == 0


def main() -> None:
    sensors = Sensors()
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        if order.get("background"):
            threading.Thread(target=sensors.sample, args=([],), kwargs={"now": order["now"]}).start()
            print(flush=True)
            continue
        reading = sensors.sample(order["pids"], now=order["now"])
        print(msgspec.json.encode(reading).decode(), flush=True)
    sensors.close()


if __name__ == "__main__":
    main()
