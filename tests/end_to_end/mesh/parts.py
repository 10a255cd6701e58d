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
import trio

from llamesh.mesh.identity import public_key
from llamesh.mesh.trust import key_text
from tests.end_to_end.cookbooks import child_of, cookbook, profile
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
    """What the newest fake of a model on a node counted."""
    async with child_of(member.node, f"{model}:default") as child:
        found: dict[str, Any] = (await child.get("/__fake/stats")).json()
        return found


async def wait_stats(
    member: Member, model: str, condition: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Wait until the fake's counters are so; they."""
    found: dict[str, Any] = {}
    async with child_of(member.node, f"{model}:default") as child:
        with trio.move_on_after(PATIENCE_SECONDS):
            while not condition(found := (await child.get("/__fake/stats")).json()):
                await trio.sleep(POLL_SECONDS)
            return found
    raise AssertionError(f"{model} on {member.id} stays at {found}")


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
async def clients(entry: Member, model: str, count: int, **more: Any) -> AsyncIterator[Load]:
    """So many clients that ask `entry` one chat after the other, streamed by every second client, until the
    block ends.

    What each has begun by then is finished.
    """
    load = Load()

    async def ask(stream: bool) -> None:
        while load.running:
            try:
                answer = await entry.ask(model, stream=stream, **more)
            except (httpx.HTTPError, AssertionError) as problem:
                load.failures.append(repr(problem))
                continue
            if answer.status != 200 or (stream and answer.events[-1:] != ["[DONE]"]):
                load.failures.append(f"{answer.status} {answer.body!r:.300}")
            load.served[answer.node] = load.served.get(answer.node, 0) + 1

    async with trio.open_nursery() as nursery:
        for number in range(count):
            nursery.start_soon(ask, number % 2 == 1)
        try:
            yield load
        finally:
            load.running = False
