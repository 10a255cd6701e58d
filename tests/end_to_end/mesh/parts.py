"""What the tests of a mesh share: cookbooks of fakes, looks at their children, tireless clients."""

from __future__ import annotations

import base64
import contextlib
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import trio

from llamesh.mesh.identity import public_key
from llamesh.mesh.trust import key_text
from tests.end_to_end.cookbooks import cookbook, profile
from tests.support.fake import fake_profile_file
from tests.support.mesh import NO_MODELS, Member
from tests.support.node import PATIENCE_SECONDS, POLL_SECONDS

__all__ = ["NO_MODELS", "Load", "clients", "fakes", "make_key", "stats", "wait_stats", "with_mdns"]


def fakes(
    directory: Path, *, entry: Mapping[str, Any] | None = None, **models: Mapping[str, Any]
) -> dict[str, Any]:
    """A cookbook of fake models, by name the way that each behaves, written into `directory`.

    `entry` are more members of each profile.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return cookbook(
        **{
            name: profile(fake_profile_file(directory, name, **behaviour), **(entry or {}))
            for name, behaviour in models.items()
        }
    )


def with_mdns(*interfaces: str) -> dict[str, Any]:
    """A configuration that finds others by multicast, and nobody who isn't of this test."""
    service = f"_lm{secrets.token_hex(5)}._tcp.local"
    return {"cluster": {"discovery": {"mdns": True, "interfaces": list(interfaces), "service_name": service}}}


def make_key(member: Member) -> str:
    """Give a node that never ran a key; the public half as `allowed_keys` has it."""
    private = secrets.token_bytes(32)
    path = member.keys / "node.key"
    path.touch(mode=0o600)
    path.write_bytes(base64.b64encode(private) + b"\n")
    return key_text(public_key(private))


async def stats(member: Member, model: str) -> dict[str, Any]:
    """What the newest fake of a model on a node counted; fails when there is none."""
    found = await _stats(member, model)
    assert found is not None, f"{member.id} runs no {model}"
    return found


async def wait_stats(
    member: Member, model: str, condition: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Wait until there is a fake of the model whose counters are so; they."""
    found = None
    with trio.move_on_after(PATIENCE_SECONDS):
        while (found := await _stats(member, model)) is None or not condition(found):
            await trio.sleep(POLL_SECONDS)
        return found
    raise AssertionError(f"{model} on {member.id} stays at {found}")


async def _stats(member: Member, model: str) -> dict[str, Any] | None:
    running = (await member.get("/running"))["running"]
    pids = [entry["pid"] for entry in running if entry["instance"].startswith(f"{model}:default#")]
    with contextlib.suppress(psutil.NoSuchProcess, httpx.TransportError):
        for pid in reversed(pids):
            words = psutil.Process(pid).cmdline()
            if "--port" not in words:  # forked, and still as its parent
                continue
            url = f"http://127.0.0.1:{words[words.index('--port') + 1]}/__fake/stats"
            async with httpx.AsyncClient(trust_env=False) as client:
                found: dict[str, Any] = (await client.get(url)).json()
                return found
    return None


@dataclass
class Load:
    """What clients got who ask all the time: served requests by node, and everything that went wrong."""

    served: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    running: bool = True

    async def wait_served(self, count: int) -> None:
        """Wait for so many more."""
        goal = sum(self.served.values()) + count
        with trio.move_on_after(PATIENCE_SECONDS):
            while sum(self.served.values()) < goal:
                await trio.sleep(POLL_SECONDS)
            return
        raise AssertionError(f"nobody is served any more: {self}")


@contextlib.asynccontextmanager
async def clients(entry: Member, model: str, count: int, *, streams: bool) -> AsyncIterator[Load]:
    """So many clients that ask `entry` one chat after the other until the block ends; with `streams` every
    second one of them has its answers streamed.

    What each has begun by then is finished.
    """
    load = Load()

    async def ask(stream: bool) -> None:
        while load.running:
            try:
                answer = await entry.ask(model, stream=stream)
            except (httpx.HTTPError, AssertionError) as problem:
                load.failures.append(repr(problem))
                continue
            if answer.status != 200 or (stream and answer.events[-1:] != ["[DONE]"]):
                load.failures.append(f"{answer.status} {answer.body!r:.300}")
            load.served[answer.node] = load.served.get(answer.node, 0) + 1

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(ask, streams and number % 2 == 1)
        try:
            yield load
        finally:
            load.running = False
