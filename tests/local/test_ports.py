"""Ports on the loopback address, with real listeners in the way."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamesh.local.ports import NoFreePort, Port, Ports

HOST = "127.0.0.1"


@contextmanager
def listener(host: str = HOST, port: int = 0) -> Iterator[int]:
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen()
        number: int = server.getsockname()[1]
        yield number


def free_ports(count: int) -> list[int]:
    """Numbers that were free a moment ago, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def can_listen(port: int) -> bool:
    with listener(port=port):
        return True


def test_the_system_gives_ports_that_can_be_listened_on() -> None:
    with Ports(None).reserve() as port:
        assert port.host == HOST
        assert can_listen(port.number)


def test_the_system_never_gives_one_twice_while_it_is_reserved() -> None:
    ports = Ports(None)
    numbers = [ports.reserve().number for _ in range(200)]
    assert len(set(numbers)) == 200
    assert set(ports.reserved) == set(numbers)


def test_the_same_answer_of_the_system_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that offers what is reserved, what is ours, and what was just freed, before a new one."""
    reserved, own, freed, new = free_ports(4)
    ports = Ports(None, avoid={own})
    held = ports.claim(reserved)
    ports.claim(freed).close()
    answers = iter([reserved, own, freed, new])
    asked: list[int] = []

    class Answering(socket.socket):
        def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            assert address == (HOST, 0)

        def getsockname(self) -> tuple[str, int]:
            asked.append(next(answers))
            return HOST, asked[-1]

    monkeypatch.setattr(socket, "socket", Answering)
    assert ports.reserve().number == new
    assert asked == [reserved, own, freed, new]
    held.close()


def test_a_system_without_ports_is_an_error_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = Ports(None)
    number = ports.reserve(user="qwen:default#1").number
    monkeypatch.setattr(socket.socket, "bind", lambda self, address: None)
    monkeypatch.setattr(socket.socket, "getsockname", lambda self: (HOST, number))
    with pytest.raises(NoFreePort, match="is used by qwen:default#1"):
        ports.reserve()


def test_configured_ports_come_in_order_and_run_out() -> None:
    numbers = free_ports(3)
    ports = Ports(numbers)
    assert [ports.reserve(user=f"instance {n}").number for n in range(3)] == numbers
    with pytest.raises(NoFreePort) as caught:
        ports.reserve()
    assert caught.value.taken == {number: f"is used by instance {n}" for n, number in enumerate(numbers)}
    assert f"{numbers[1]} is used by instance 1" in str(caught.value)


def test_a_freed_port_goes_to_the_end_of_the_line() -> None:
    first, second, third = free_ports(3)
    ports = Ports([first, second, third])
    ports.reserve().close()
    assert [ports.reserve().number for _ in range(3)] == [second, third, first]


def test_a_port_with_a_strangers_listener_is_skipped() -> None:
    with listener() as taken:
        [free] = free_ports(1)
        ports = Ports([taken, free])
        assert ports.reserve().number == free
        with pytest.raises(NoFreePort, match=f"{taken} is used by another program"):
            ports.reserve()
    # The stranger is gone.
    assert ports.reserve().number == taken


def test_a_listener_on_all_addresses_is_in_the_way_too() -> None:
    with listener("0.0.0.0") as taken, pytest.raises(NoFreePort, match="another program"):
        Ports([taken]).reserve()


def test_a_port_with_leftover_connections_is_free() -> None:
    """TIME_WAIT: the side that closed first remembers the connection; a server may come back at once."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((HOST, 0))
        server.listen()
        number = server.getsockname()[1]
        with socket.create_connection((HOST, number)) as client:
            accepted, _ = server.accept()
            accepted.close()
            assert client.recv(1) == b""
    with socket.socket() as plain, pytest.raises(OSError, match="in use"):
        plain.bind((HOST, number))
    with Ports([number]).reserve() as port:
        assert port.number == number
        assert can_listen(number)


def test_ports_to_avoid_are_never_given() -> None:
    own, other = free_ports(2)
    ports = Ports([own, other], avoid=[own])
    assert ports.reserve().number == other
    with pytest.raises(NoFreePort, match=f"{own} is the node's own"):
        ports.claim(own)


def test_a_claimed_port_is_nobody_elses() -> None:
    wanted, other = free_ports(2)
    ports = Ports([wanted, other])
    claimed = ports.claim(wanted, user="fixed:default#1")
    assert ports.reserve().number == other
    with pytest.raises(NoFreePort, match="is used by fixed:default#1"):
        ports.claim(wanted)
    claimed.close()
    assert ports.claim(wanted).number == wanted


def test_closing_twice_does_not_take_it_from_the_next() -> None:
    [number] = free_ports(1)
    ports = Ports([number])
    first = ports.reserve()
    first.close()
    second = ports.reserve()
    first.close()
    assert ports.reserved == {number: ""}
    second.close()
    assert ports.reserved == {}


def test_an_address_that_is_not_ours_is_a_reason() -> None:
    # TEST-NET-1: an address for documentation, on no machine.
    with pytest.raises(NoFreePort, match="can't be bound"):
        Ports(free_ports(1)).reserve("192.0.2.1")
    with pytest.raises(NoFreePort, match="refused by the system"):
        Ports(None).reserve("192.0.2.1")


def test_no_ports_at_all() -> None:
    with pytest.raises(NoFreePort, match="none to choose from"):
        Ports([]).reserve()


def test_a_long_list_is_not_spelled_out() -> None:
    message = str(NoFreePort(HOST, dict.fromkeys(range(1000), "is busy")))
    assert message.endswith("7 is busy; and 992 more")


@settings(deadline=None)
@given(st.lists(st.one_of(st.just("reserve"), st.integers(0, 5)), max_size=40))
def test_whatever_the_order_a_port_has_one_user(steps: list[str | int]) -> None:
    """`reserve`, or close the n-th of what is held: least recently used first, never one twice."""
    numbers = list(range(40000, 40004))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamesh.local.ports._why_not_free", lambda host, number: None)
        ports = Ports(numbers)
        order = list(numbers)
        held: list[Port] = []
        for step in steps:
            if step == "reserve" and len(held) < len(numbers):
                port = ports.reserve()
                in_use = {other.number for other in held}
                assert port.number == next(number for number in order if number not in in_use)
                held.append(port)
            elif step == "reserve":
                with pytest.raises(NoFreePort):
                    ports.reserve()
            elif held:
                port = held.pop(int(step) % len(held))
                port.close()
                order.remove(port.number)
                order.append(port.number)
            assert set(ports.reserved) == {port.number for port in held}
