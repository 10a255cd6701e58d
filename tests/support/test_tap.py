"""The tap on a link, tried on plain sockets: an echo behind it, and somebody who talks to it."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.tap import PATIENCE_SECONDS, Tap, replay


@contextlib.contextmanager
def echo() -> Iterator[str]:
    """The address of a server that says everything back, each connection until its end."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            while data := sock.recv(65536):
                sock.sendall(data)

    def accept() -> None:
        # The connection of the end, too.
        while not ended:
            sock, _ = listener.accept()
            threads.append(threading.Thread(target=serve, args=(sock,)))
            threads[-1].start()

    ended: list[bool] = []
    threads = [threading.Thread(target=accept)]
    threads[0].start()
    address = address_of(listener)
    try:
        yield address
    finally:
        ended.append(True)
        dial(address).close()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)
        listener.close()


def address_of(listener: socket.socket) -> str:
    """What `dial` takes."""
    return f"127.0.0.1:{listener.getsockname()[1]}"


def dial(address: str) -> socket.socket:
    """A connection whose reads don't wait for ever."""
    return socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), PATIENCE_SECONDS)


def ask(sock: socket.socket, data: bytes) -> bytes:
    """Send it, and read as much."""
    sock.sendall(data)
    return take(sock, len(data))


def take(sock: socket.socket, count: int) -> bytes:
    """Exactly so many bytes."""
    got = b""
    while len(got) < count:
        piece = sock.recv(count - len(got))
        assert piece, f"the end after {got!r}"
        got += piece
    return got


def until(condition: Callable[[], bool]) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def tap() -> Iterator[Tap]:
    """One before an echo."""
    with echo() as address, Tap(address) as made:
        yield made


def test_it_carries_everything_both_ways_and_remembers_it(tap: Tap) -> None:
    large = bytes(range(256)) * 4096
    with dial(tap.address) as one, dial(tap.address) as two:
        assert ask(one, b"hello") == b"hello"
        sender = threading.Thread(target=two.sendall, args=(large,))
        sender.start()
        assert take(two, len(large)) == large
        sender.join()
        one.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""
    until(lambda: tap.alive == [])
    first, second = tap.links
    assert (first.to_target.recorded, first.to_dialler.recorded) == (b"hello", b"hello")
    assert second.to_target.passed == second.to_dialler.passed == len(large)
    assert tap.heard() == b"hellohello" + large + large


def test_a_cut_is_a_reset_and_new_connections_pass(tap: Tap) -> None:
    with dial(tap.address) as one:
        ask(one, b"hello")
        tap.cut()
        with pytest.raises(ConnectionResetError):
            one.recv(1)
    assert tap.alive == []
    with dial(tap.address) as one:
        assert ask(one, b"again") == b"again"


def test_while_it_is_down_nobody_passes(tap: Tap) -> None:
    tap.down()
    with pytest.raises(ConnectionResetError), dial(tap.address) as one:
        one.recv(1)
    tap.up()
    with dial(tap.address) as one:
        assert ask(one, b"hello") == b"hello"


def test_a_target_that_is_not_there_is_a_reset() -> None:
    with socket.socket() as deaf:
        # Bound and not listening: nobody else gets the port.
        deaf.bind(("127.0.0.1", 0))
        with Tap(address_of(deaf)) as tap, pytest.raises(ConnectionResetError), dial(tap.address) as one:
            one.recv(1)


def test_a_stall_holds_everything_and_closes_nothing(tap: Tap) -> None:
    with dial(tap.address) as old:
        ask(old, b"hello")
        tap.stall()
        old.sendall(b"held")
        with dial(tap.address) as new:
            new.sendall(b"held, too")
            until(lambda: tap.heard().endswith(b"held, too"))
            assert [link.to_target.passed for link in tap.links] == [5, 0]
            assert len(tap.alive) == 2
            tap.resume()
            assert take(old, 4) == b"held"
            assert take(new, 9) == b"held, too"


def test_a_delay_holds_each_piece(tap: Tap) -> None:
    tap.delay(0.05)
    before = time.monotonic()
    with dial(tap.address) as one:
        assert ask(one, b"hello") == b"hello"
    # No sooner: how much later is the machine's affair.
    assert time.monotonic() - before >= 0.1


def test_a_byte_is_flipped_once(tap: Tap) -> None:
    with dial(tap.address) as one:
        assert ask(one, b"hello") == b"hello"
        [link] = tap.links
        link.to_target.flip()
        assert ask(one, b"hello") == b"xello"
        link.to_dialler.flip(at=12)
        assert ask(one, b"hello") == b"he|lo"
        assert ask(one, b"hello") == b"hello"
        assert link.to_target.recorded == b"hello" * 4


def test_a_stream_is_truncated_in_order(tap: Tap) -> None:
    with dial(tap.address) as one:
        ask(one, b"hello")
        tap.links[0].to_dialler.truncate(at=7)
        one.sendall(b"hello")
        assert take(one, 2) == b"he"
        assert one.recv(1) == b""
    until(lambda: tap.alive == [])


def test_connections_to_come_are_harmed_from_their_first_byte(tap: Tap) -> None:
    tap.on_each(lambda link: link.to_target.flip(at=0))
    with dial(tap.address) as one:
        assert ask(one, b"hello") == b"xello"
    tap.on_each(None)
    with dial(tap.address) as one:
        assert ask(one, b"hello") == b"hello"


def test_a_reset_goes_on_as_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address_of(listener)
        with Tap(address) as tap, dial(tap.address) as one:
            one.sendall(b"hello")
            target, _ = listener.accept()
            take(target, 5)
            one.sendall(b"unread")
            until(lambda: tap.links[0].to_target.passed == 11)
            # Closing with unread bytes resets.
            target.close()
            with pytest.raises(ConnectionResetError):
                one.recv(1)


def test_what_was_recorded_can_be_said_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = address_of(listener)

        def answer() -> None:
            sock, _ = listener.accept()
            with sock:
                assert take(sock, 5) == b"hello"
                sock.sendall(b"go away")

        thread = threading.Thread(target=answer)
        thread.start()
        assert replay(b"hello", address) == b"go away"
        thread.join()


def test_another_way_to_connect() -> None:
    with echo() as address, Tap(connect=lambda: dial(address)) as tap, dial(tap.address) as one:
        assert ask(one, b"hello") == b"hello"


async def test_it_works_under_trio_too(tap: Tap) -> None:
    with dial(tap.address) as one:
        assert ask(one, b"hello") == b"hello"
        tap.cut()
        with pytest.raises(ConnectionResetError):
            one.recv(1)
