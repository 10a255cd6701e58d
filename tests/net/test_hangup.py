"""A client's leaving is noticed with epoll and without, once, and only while it is watched."""

from __future__ import annotations

import select
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
import trio
import trio.testing

from llamesh.net import hangup
from llamesh.net.hangup import HangupWatch

WAYS = [pytest.param(False, id="peek")]
if hasattr(select, "epoll"):
    WAYS.append(pytest.param(True, id="epoll"))


@pytest.fixture(params=WAYS)
def use_epoll(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(hangup, "PEEK_INTERVAL", 0.002)
    return bool(request.param)


class Client:
    """Both ends of a loopback connection, and how often its leaving was told."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.far = socket.create_connection(listener.getsockname())
            self.near, _ = listener.accept()
        self.near.setblocking(False)
        self.told = 0
        self._news = trio.Event()

    def left(self) -> None:
        self.told += 1
        self._news.set()

    async def wait_told(self) -> None:
        with trio.fail_after(10):
            await self._news.wait()


@contextmanager
def client() -> Iterator[Client]:
    both = Client()
    with both.near, both.far:
        yield both


@asynccontextmanager
async def watching(use_epoll: bool) -> AsyncIterator[HangupWatch]:
    watch = HangupWatch(use_epoll=use_epoll)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        yield watch
        nursery.cancel_scope.cancel()
    watch.close()


async def settle(watch: HangupWatch) -> None:
    """Return when the watch has surely looked once more: it tells of another client's leaving."""
    with client() as other:
        watch.add(other.near, other.left)
        other.far.close()
        await other.wait_told()
        watch.remove(other.near)


async def test_closing_is_told(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        with client() as one:
            watch.add(one.near, one.left)
            await settle(watch)
            assert one.told == 0
            one.far.close()
            await one.wait_told()
            watch.remove(one.near)


async def test_half_closing_is_told_and_the_rest_is_not_told_again(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        with client() as one:
            watch.add(one.near, one.left)
            one.far.shutdown(socket.SHUT_WR)
            await one.wait_told()
            one.far.close()
            await settle(watch)
            assert one.told == 1
            watch.remove(one.near)


async def test_a_reset_is_told(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        with client() as one:
            watch.add(one.near, one.left)
            one.far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
            one.far.close()
            await one.wait_told()
            watch.remove(one.near)


async def test_data_is_no_leaving(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        with client() as one:
            watch.add(one.near, one.left)
            one.far.sendall(b"the next request")
            await settle(watch)
            assert one.told == 0
            assert one.near.recv(100) == b"the next request"
            watch.remove(one.near)


async def test_nothing_is_told_after_remove(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        with client() as one:
            watch.add(one.near, one.left)
            watch.remove(one.near)
            watch.remove(one.near)
            one.far.close()
            await settle(watch)
            assert one.told == 0


async def test_one_that_left_before_it_was_watched(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        with client() as one:
            one.far.close()
            watch.add(one.near, one.left)
            await one.wait_told()
            watch.remove(one.near)


async def test_a_callback_may_remove_another_of_the_same_moment(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        with client() as one, client() as two:
            told: list[str] = []

            def of_one() -> None:
                told.append("one")
                watch.remove(two.near)
                one.left()

            def of_two() -> None:
                told.append("two")
                watch.remove(one.near)
                one.left()

            watch.add(one.near, of_one)
            watch.add(two.near, of_two)
            one.far.close()
            two.far.close()
            await one.wait_told()
            await settle(watch)
            assert len(told) == 1
            watch.remove(one.near)
            watch.remove(two.near)


async def test_many_at_once(use_epoll: bool) -> None:
    async with watching(use_epoll) as watch:
        clients = [Client() for _ in range(100)]
        for one in clients:
            watch.add(one.near, one.left)
        for one in clients:
            one.far.close()
        for one in clients:
            await one.wait_told()
            watch.remove(one.near)
            one.near.close()
        assert [one.told for one in clients] == [1] * 100
