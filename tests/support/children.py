"""A dispatcher and a pool with real children, without the web around them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from llamesh.config.cookbook import Cookbook, ModelPath, Profile
from llamesh.config.current import Current
from llamesh.config.settings import Settings
from llamesh.core.lifecycle import State
from llamesh.dispatch import Dispatch
from llamesh.dispatch.lease import Ask, Lease
from llamesh.local.instance import Instance
from llamesh.local.keeper import Keeper
from llamesh.local.launch import DEFAULT_BINARY_PATH, Engine, find_engine
from llamesh.local.memory import Memory
from llamesh.local.orphans import Ledger
from llamesh.local.pool import Pool
from llamesh.local.ports import Ports
from llamesh.net.exchange import UpstreamConnection
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.stats import NodeStats
from tests.support.fake import FAKE_LLAMA_SERVER, fake_profile_file
from tests.support.node import clean_environment, wait_until


@dataclass
class Local:
    """What a node has inside."""

    dispatch: Dispatch
    pool: Pool
    ports: Ports
    stats: NodeStats
    learned: LearnedValues

    async def lease(self, profile: Profile, *, streams: bool = False) -> Lease:
        """A slot, as the relay gets it."""
        ask = Ask(profile, "test", streams)
        lease = self.dispatch.take(ask)
        if lease is None:
            with self.dispatch.join(ask) as ticket:
                lease = await ticket.wait()
        assert lease is not None
        return lease

    async def complete(self, profile: Profile, **document: Any) -> tuple[int, Any]:
        """A whole completion: status and document."""
        lease = await self.lease(profile)
        connection = None
        complete = False
        try:
            connection = await lease.connect()
            answer = await exchange(connection, lease.instance, document)
            complete = True
        finally:
            lease.release(connection, complete=complete)
        return answer

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        """Poll until `condition` holds."""
        await wait_until(condition, lambda: f"never: {what}; {list(self.pool.all())}")

    async def until_ready(self, instance: Instance) -> None:
        """Wait until it serves."""
        await self.until(lambda: instance.state is State.READY, f"{instance} ready")


def request(instance: Instance, document: dict[str, Any], path: str = "/v1/completions") -> bytes:
    """A POST to a child, with its key."""
    body = json.dumps({"prompt": "hi", "max_tokens": 3, **document}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    head += b"Authorization: " + instance.authorization + b"\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


async def exchange(
    connection: UpstreamConnection, instance: Instance, document: dict[str, Any]
) -> tuple[int, Any]:
    """One request on a connection: status and document."""
    await connection.send(request(instance, document))
    body = b""
    while not connection.response.complete:
        await connection.read()
        body += connection.response.take()
    return connection.response.status, json.loads(body)


def fake(tmp_path: Path, name: str = "m", *, arguments: tuple[str, ...] = (), **behaviour: Any) -> Profile:
    """A profile on the fake llama-server that behaves so."""
    source = ModelPath(str(fake_profile_file(tmp_path, name, **behaviour)))
    return Profile(name, "default", "", "", source, arguments)


@asynccontextmanager
async def local(
    tmp_path: Path, *, binary: Path | None = FAKE_LLAMA_SERVER, ports: Ports | None = None, **settings: Any
) -> AsyncIterator[Local]:
    """A running pool; `binary` None means the embedded engine. At the end no child and no port is left."""
    path = DEFAULT_BINARY_PATH if binary is None else binary
    engine: Engine = await find_engine(path, environ=clean_environment({}), ask_seconds=1)
    current = Current(Settings(node_id="node-a", **settings), Cookbook((), {}))
    stats, learned = NodeStats(), LearnedValues(tmp_path / "metrics.json")
    ports = ports or Ports(None)
    ledger = Ledger(tmp_path / "children")
    memory = Memory(current, engine, learned)
    pool = Pool(current, engine, ports, ledger, stats, learned, memory)
    dispatch = Dispatch(current, pool, learned)
    keeper = Keeper(current, pool)
    async with trio.open_nursery() as nursery:
        await nursery.start(pool.run)
        nursery.start_soon(keeper.run)
        yield Local(dispatch, pool, ports, stats, learned)
        await pool.close()
        assert list(pool.all()) == []
        assert ports.reserved == {}
        assert list((tmp_path / "children").glob("node-*")) == []
        nursery.cancel_scope.cancel()
