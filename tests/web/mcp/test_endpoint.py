"""The life of the server behind `/mcp`: made once, in a thread, when it is wanted; again when it broke."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
import trio

from llamesh.errors import InternalError, InvalidRequest, MethodNotAllowed, Overloaded
from llamesh.web.access import Access
from llamesh.web.body import Body, Budget
from llamesh.web.direct import Call
from llamesh.web.mcp import endpoint
from llamesh.web.mcp.endpoint import McpEndpoint, NotInstalled, TooManyCalls


class AllMay:
    """Lets everybody in."""

    def who(self, headers: Any) -> None: ...

    def check_admin(self, headers: Any, *, loopback: bool) -> None: ...


class StandIn:
    """A server that counts its calls, holds them where it is told to, and breaks when it is told to."""

    def __init__(self) -> None:
        self.answered = 0
        self.gate: trio.Event | None = None
        self.breaks = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await self.breaks.wait()
        raise ValueError("broken")

    async def answer(self, call: Call) -> None:
        self.answered += 1
        if self.gate is not None:
            await self.gate.wait()


class Sink:
    started = False


@asynccontextmanager
async def serving(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[McpEndpoint]:
    """An endpoint whose servers `make` makes."""
    one = McpEndpoint(cast(Access, AllMay()), cast(Any, None), cast(Any, None), cast(Any, None))
    monkeypatch.setattr(one, "_make", make)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.serve)
        yield one
        nursery.cancel_scope.cancel()


def call(method: str = "POST", kind: bytes = b"application/json") -> Call:
    headers = [(b"content-type", kind)]
    return Call(method, b"/mcp", b"", headers, "id", "127.0.0.1", Body(Budget()), cast(Any, Sink()), [])


async def test_it_is_made_once_and_not_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    server, threads = StandIn(), []

    def make() -> StandIn:
        threads.append(threading.current_thread())
        return server

    async with serving(make, monkeypatch) as one:
        await trio.testing.wait_all_tasks_blocked()
        assert threads == []
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(one.run, call())
        await one.run(call())
    assert server.answered == 11
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


async def test_without_the_sdk_it_is_said_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def make() -> StandIn:
        tries.append(1)
        raise ImportError("no module named mcp")

    async with serving(make, monkeypatch) as one:
        for _ in range(3):
            with pytest.raises(NotInstalled, match="no module named mcp; install"):
                await one.run(call())
    assert len(tries) == 1


async def test_what_broke_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    servers: list[StandIn] = []

    def make() -> StandIn:
        servers.append(StandIn())
        if len(servers) == 1:
            raise ValueError("the first doesn't work")
        return servers[-1]

    async with serving(make, monkeypatch) as one:
        with pytest.raises(InternalError, match="broke"):
            await one.run(call())
        await one.run(call())
        servers[1].breaks.set()
        await trio.testing.wait_all_tasks_blocked()
        await one.run(call())
    assert [server.answered for server in servers] == [0, 1, 1]


async def test_no_more_at_once_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    server = StandIn()
    server.gate = trio.Event()
    async with serving(lambda: server, monkeypatch) as one:
        async with trio.open_nursery() as nursery:
            for _ in range(endpoint.MOST_CALLS):
                nursery.start_soon(one.run, call())
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(TooManyCalls):
                await one.run(call())
            nursery.cancel_scope.cancel()
        server.gate = None
        await one.run(call())


async def test_who_waits_for_ever_is_told(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Where nobody makes it."""
    one = McpEndpoint(cast(Access, AllMay()), cast(Any, None), cast(Any, None), cast(Any, None))
    with pytest.raises(Overloaded, match="still being prepared"):
        await one.run(call())


def test_what_is_refused_before_anything_is_read() -> None:
    async def check() -> None:
        one = McpEndpoint(cast(Access, AllMay()), cast(Any, None), cast(Any, None), cast(Any, None))
        for method in ("GET", "DELETE", "HEAD"):
            with pytest.raises(MethodNotAllowed, match="takes POST") as refused:
                one.admit(call(method))
            assert refused.value.allowed == "POST"
        for kind in (b"text/plain", b"", b"application/jsonp"):
            with pytest.raises(InvalidRequest, match="application/json"):
                one.admit(call(kind=kind))
        taken = call(kind=b"Application/JSON; charset=utf-8")
        one.admit(taken)
        assert taken.most_bytes == endpoint.MOST_BYTES

    trio.run(check)
