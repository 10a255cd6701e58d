"""`python -m benchmarks.noise`: what the encryption of a peer connection costs on one core."""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import trio

from llamesh.mesh import records
from llamesh.mesh.noise import MESSAGE_1, PREAMBLE, Initiator, Responder
from llamesh.mesh.noise_transport import NoiseTransport
from llamesh.mesh.records import Records, Session
from llamesh.mesh.stream import Welcome
from llamesh.net.transport import SocketTransport, Transport

_MIB = 1 << 20


def _sessions() -> tuple[Session, Session]:
    one, two = os.urandom(32), os.urandom(32)
    return Session(one, two, b"", b""), Session(two, one, b"", b"")


def _handshake(count: int) -> float:
    """Milliseconds of both sides together."""
    token, one, two = os.urandom(32), os.urandom(32), os.urandom(32)
    started = time.perf_counter()
    for _ in range(count):
        initiator, responder = Initiator(one, token), Responder(two, [token])
        message_1 = initiator.start()[len(PREAMBLE) + 2 :]
        assert len(message_1) == MESSAGE_1
        responder.last(initiator.reply(responder.first(message_1)[2:])[2:])
    return (time.perf_counter() - started) / count * 1e3


def _small(size: int, count: int) -> tuple[float, float]:
    """Microseconds to seal and to open one record of `size` bytes."""
    sender, receiver = _sessions()
    data = os.urandom(size)
    started = time.perf_counter()
    sealed = [sender.seal(data) for _ in range(count)]
    between = time.perf_counter()
    taking = Records(receiver)
    for record in sealed:
        taking.feed(record)
    return (between - started) / count * 1e6, (time.perf_counter() - between) / count * 1e6


def _bulk(mebibytes: int) -> tuple[float, float]:
    """MiB/s of sealing, and of opening what comes in reads of 64 KiB."""
    sender, receiver = _sessions()
    data = memoryview(os.urandom(mebibytes * _MIB))
    started = time.perf_counter()
    wire = b"".join(sender.seal(data[at : at + 262_144]) for at in range(0, len(data), 262_144))
    between = time.perf_counter()
    taking = Records(receiver)
    for at in range(0, len(wire), 65_536):
        taking.feed(wire[at : at + 65_536])
    return mebibytes / (between - started), mebibytes / (time.perf_counter() - between)


def _ends(*, encrypted: bool) -> tuple[Transport, Transport]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    plain = SocketTransport(one), SocketTransport(two)
    if not encrypted:
        return plain
    welcome = Welcome("far", "1", 1, "local")
    near, far = (
        NoiseTransport(sock, session, welcome, "local")
        for sock, session in zip((one, two), _sessions(), strict=True)
    )
    return near, far


async def _round_trips(count: int, *, encrypted: bool) -> float:
    """Microseconds from a send of 256 bytes to the answer of 256 bytes, both ends in one process."""
    near, far = _ends(encrypted=encrypted)

    async def echo() -> None:
        for _ in range(count):
            await far.send(await far.receive())

    data = os.urandom(256)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo)
        started = time.perf_counter()
        for _ in range(count):
            await near.send(data)
            await near.receive()
        took = time.perf_counter() - started
    near.close()
    far.close()
    return took / count * 1e6


async def _transfer(mebibytes: int, *, encrypted: bool) -> float:
    """MiB/s from one end to the other, both in one process."""
    near, far = _ends(encrypted=encrypted)
    data = os.urandom(_MIB)

    async def send() -> None:
        for _ in range(mebibytes):
            await near.send(data)

    async with trio.open_nursery() as nursery:
        started = time.perf_counter()
        nursery.start_soon(send)
        left = mebibytes * _MIB
        while left:
            left -= len(await far.receive())
        took = time.perf_counter() - started
    near.close()
    far.close()
    return mebibytes / took


def _medians(rounds: int, measure: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    first, second = zip(*(measure() for _ in range(rounds)), strict=True)
    return statistics.median(first), statistics.median(second)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table: medians of rounds, sealing and opening apart."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.noise", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short: a smoke test, not a measurement")
    quick = parser.parse_args(argv).quick
    rounds, count, size = (1, 200, 2) if quick else (5, 20_000, 64)

    took = statistics.median(_handshake(max(10, count // 100)) for _ in range(rounds))
    print(f"{'handshake, both sides':30} {took:7.2f} ms")
    for length in (64, 256, 4096):
        seal, opening = _medians(rounds, partial(_small, length, count))
        rate = 1e6 / (seal + opening)
        print(f"{f'record of {length} B':30} {seal:7.2f} us {opening:7.2f} us, {rate:9,.0f} records/s both")
    usual = records.RECORD_SIZE
    for records.RECORD_SIZE in (8_192, 16_384, 32_768, 65_519):
        seal, opening = _medians(rounds, lambda: _bulk(size))
        mark = "  (used)" if usual == records.RECORD_SIZE else ""
        print(
            f"{f'bulk, {records.RECORD_SIZE} B a record':30} {seal:7,.0f} MiB/s {opening:7,.0f} MiB/s{mark}"
        )
    records.RECORD_SIZE = usual
    for name, encrypted in (("plain", False), ("encrypted", True)):
        trips, rates = [], []
        for _ in range(rounds):
            trips.append(trio.run(partial(_round_trips, max(10, count // 4), encrypted=encrypted)))
            rates.append(trio.run(partial(_transfer, 4 * size, encrypted=encrypted)))
        trip, rate = statistics.median(trips), statistics.median(rates)
        print(f"{f'loopback, {name}':30} {trip:7.1f} us a round trip, {rate:,.0f} MiB/s")


if __name__ == "__main__":
    main()
