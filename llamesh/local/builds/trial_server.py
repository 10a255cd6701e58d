"""An engine that is started for a trial: on a port of its own, asked a few things, ended."""

from __future__ import annotations

import math
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.tools import LAST_LINES
from llamesh.local.launch import child_environment
from llamesh.local.ports import Ports
from llamesh.local.process import Child
from llamesh.net.exchange import UpstreamBroken, UpstreamConnection
from llamesh.net.transport import connect

STAGE = "testing the build"

# A tiny model loads in milliseconds; setting up a GPU for the first time can take a minute.
START_SECONDS = 180.0
_ANSWER_SECONDS = 60.0
_STOP_SECONDS = 5.0
_POLL_SECONDS = 0.02
_MAX_ANSWER = 1 << 20


class TrialServer:
    """One that is healthy. `ask` posts to it."""

    def __init__(self, child: Child, port: int, key: str, command: str) -> None:
        self._child = child
        self._port = port
        self._key = key
        self.command = command

    async def ask(self, path: str, document: Any) -> Any:
        """The decoded answer to a POST. Raises BuildFailed unless it is a 200 with a JSON document."""
        status, body = await self._exchange("POST", path, msgspec.json.encode(document))
        if status == 200:
            try:
                return msgspec.json.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError):
                pass
        raise self.failed(f"it answers {path} with {status}: {body[:200].decode('utf-8', 'replace')}")

    async def wait_healthy(self) -> None:
        """Poll `/health`. Raises BuildFailed when the process ends first."""
        with trio.move_on_after(START_SECONDS):
            while self._child.returncode is None:
                try:
                    status, _ = await self._exchange("GET", "/health", b"")
                    if status == 200:
                        return
                except BuildFailed:
                    pass  # its port isn't open yet
                await trio.sleep(_POLL_SECONDS)
            code = self._child.returncode
            ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise self.failed(f"it {ended} before it could serve a tiny model", code)
        raise self.failed(f"it wasn't ready with a tiny model after {START_SECONDS:g} s")

    def failed(self, reason: str, code: int | None = None) -> BuildFailed:
        """The error that says so, with the last lines of its log."""
        lines = self._child.tail.lines()[-LAST_LINES:]
        return BuildFailed(STAGE, reason, command=self.command, exit_code=code, last_lines=lines)

    async def _exchange(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Authorization: Bearer {self._key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode()
        connection: UpstreamConnection | None = None
        answer = b""
        try:
            with trio.fail_after(_ANSWER_SECONDS):
                connection = UpstreamConnection(await connect("127.0.0.1", self._port))
                await connection.send(head, [body] if body else [])
                while not connection.response.complete:
                    await connection.read()
                    answer += connection.response.take()
                    if len(answer) > _MAX_ANSWER:
                        raise self.failed(f"it answers {path} without end")
                return connection.response.status, answer
        except (OSError, UpstreamBroken) as error:
            raise self.failed(f"it doesn't answer {path}: {error}") from error
        except trio.TooSlowError as error:
            raise self.failed(f"it doesn't answer {path} within {_ANSWER_SECONDS:g} s") from error
        finally:
            if connection is not None:
                connection.close()


@asynccontextmanager
async def trial_server(
    binary: Path, arguments: Sequence[str], environ: Mapping[str, str]
) -> AsyncIterator[TrialServer]:
    """Start `binary` with these arguments, wait until it is healthy; end it after use. Raises BuildFailed."""
    key = secrets.token_urlsafe(24)
    with Ports(None).reserve(user="a build's trial") as port:
        command = [str(binary), *arguments, "--host", "127.0.0.1", "--port", str(port.number)]
        shown = " ".join(command)
        try:
            child = Child.spawn(command, env=child_environment(environ, api_key=key))
        except OSError as error:
            raise BuildFailed(STAGE, f"{binary} can't be started: {error}", command=shown) from error
        failure: BuildFailed | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child.run)
            server = TrialServer(child, port.number, key, shown)
            try:
                await server.wait_healthy()
                yield server
            except BuildFailed as error:
                # Out of the nursery by itself, not in a group.
                failure = error
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(_STOP_SECONDS + 8):
                    await child.stop(_STOP_SECONDS)
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure


def top_gap(choice: Mapping[str, Any]) -> float:
    """How far, in natural logarithms, the likeliest token was before the next one; infinite where unknown."""
    try:
        first, second = (float(one["logprob"]) for one in choice["top_logprobs"][:2])
    except (KeyError, TypeError, ValueError):
        return math.inf
    return first - second
