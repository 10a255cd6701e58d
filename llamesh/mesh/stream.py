"""From a TCP connection to an encrypted one with a node that is known: both sides of the opening.

    transport = await dial(sock, identity, Hello(...), known_peers.check)
    transport = await accept(sock, first_bytes, identity, welcome, known_peers.check)

Rules
- The dialler sends nothing but the HELLO, and believes nothing, before a WELCOME was decrypted: only
  then is it proven that the other side knows the token.
- `check` is called with a `Claim` whose key (and previous key, if it has one) is proven. The acceptor
  calls it before the WELCOME, the dialler after. `NotTrusted` goes to the other side, encrypted.
- The whole opening takes `HANDSHAKE_SECONDS` at most, and a few kilobytes. Nothing is made for a
  connection before its first message is complete.
- However it fails, the socket is closed.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from typing import Final, NoReturn

import trio

from llamesh.mesh.hello import (
    MAX_HELLO,
    BadHello,
    Hello,
    Identity,
    Refused,
    Welcome,
    decode_hello,
    decode_refusal,
    decode_welcome,
    encode_hello,
    encode_refusal,
    encode_welcome,
)
from llamesh.mesh.noise import (
    HINT_TOKEN,
    HINT_VERSION,
    MAGIC,
    MESSAGE_1,
    MESSAGE_2,
    MESSAGE_3,
    PREAMBLE,
    WIRE_VERSION,
    HandshakeFailed,
    Initiator,
    Responder,
    Role,
    public_key,
    rotation_proof,
)
from llamesh.mesh.noise_transport import NoiseTransport, Truncated
from llamesh.mesh.records import HEADER_SIZE, HELLO, REFUSED, TAG_SIZE, WELCOME, RecordBroken, Session
from llamesh.mesh.trust import Claim, NotTrusted

HANDSHAKE_SECONDS: Final = 5.0

_FRAME_SIZE: Final = 2
_HINT_SIZE: Final = len(HINT_TOKEN)
_HINT_FIRST: Final = 0xFF

_UPDATE: Final = f"this node speaks {WIRE_VERSION}: update the older of the two"

Check = Callable[[Claim], None]


async def dial(
    sock: socket.socket, identity: Identity, hello: Hello, check: Check, *, token: bytes | None = None
) -> NoiseTransport:
    """Open an encrypted connection on a connected socket, which is taken over.

    `token`: instead of the identity's. Raises HandshakeFailed, Refused (the other node said no),
    NotTrusted (`check` did), OSError, and BadHello for a `hello` that breaks its own rules. The socket
    is closed then.
    """
    line = _Line(sock, b"")
    return await _bounded(line, _dial(line, identity, hello, check, token or identity.token))


async def dial_any_token(
    connect: Callable[[], Awaitable[socket.socket]], identity: Identity, hello: Hello, check: Check
) -> NoiseTransport:
    """`dial`, and once more on a fresh socket with the previous token where the present one isn't taken.

    `connect` makes a connected socket, and bounds its own time.
    """
    try:
        return await dial(await connect(), identity, hello, check)
    except HandshakeFailed as error:
        if error.reason != "token" or identity.previous_token is None:
            raise
    return await dial(await connect(), identity, hello, check, token=identity.previous_token)


async def accept(
    sock: socket.socket,
    read_before: bytes,
    identity: Identity,
    welcome: Callable[[Hello, str], Welcome],
    check: Check,
) -> NoiseTransport:
    """The other side of `dial`. `read_before`: what was read from the socket so far.

    `welcome` gets the HELLO and the dialler's address ("host:port") and answers it; it may raise
    NotTrusted as `check` may. Raises HandshakeFailed, NotTrusted, OSError, and BadHello for a Welcome
    that breaks its own rules. The socket is closed then.
    """
    line = _Line(sock, read_before)
    return await _bounded(line, _accept(line, identity, welcome, check))


async def _bounded(line: _Line, opening: Awaitable[NoiseTransport]) -> NoiseTransport:
    """The border of an opening: its time, its socket, and one kind of error with the address in it."""
    try:
        with trio.fail_after(HANDSHAKE_SECONDS):
            transport = await opening
    except BaseException as error:
        trio.lowlevel.notify_closing(line.sock)
        line.sock.close()
        if isinstance(error, trio.TooSlowError):
            text = f"{line.address}: no handshake within {HANDSHAKE_SECONDS:g} s"
            raise HandshakeFailed("timeout", text) from None
        if isinstance(error, RecordBroken):
            raise HandshakeFailed("garbage", f"{line.address}: {error}") from None
        if isinstance(error, HandshakeFailed):
            raise HandshakeFailed(error.reason, f"{line.address}: {error}") from None
        raise
    return transport


async def _dial(line: _Line, identity: Identity, hello: Hello, check: Check, token: bytes) -> NoiseTransport:
    line.prepare()
    initiator = Initiator(identity.private, token)
    await line.write(initiator.start())
    message_3 = initiator.reply(await line.frame(MESSAGE_2))
    session = initiator.session
    assert session is not None  # noqa: S101 - `reply` made it
    previous, proof = _own_proof(identity, session, "dialler")
    hello = replace(hello, previous_key=previous, proof=proof)
    # One write: the acceptor reads both before it judges the token, so no reset can eat its hint.
    await line.write(message_3 + session.encrypt(HELLO, encode_hello(hello)))
    kind, data = await line.record(session, (WELCOME, REFUSED))
    if kind == REFUSED:
        own_key = hmac.compare_digest(session.remote_static, identity.public)
        raise decode_refusal(data, line.address, own_key=own_key)
    # From here on the other side has proven that it knows the token.
    try:
        welcome = decode_welcome(data)
        check(_claim(welcome, session, identity, "acceptor", line.address))
    except (BadHello, NotTrusted) as error:
        await _refuse(line, session, error)
    return NoiseTransport(line.sock, session, welcome, line.address)


async def _accept(
    line: _Line, identity: Identity, welcome: Callable[[Hello, str], Welcome], check: Check
) -> NoiseTransport:
    line.prepare()
    preamble = await line.exactly(len(PREAMBLE))
    if not preamble.startswith(MAGIC):
        raise HandshakeFailed("garbage", "that is no llamesh node")
    if preamble != PREAMBLE:
        line.hint(HINT_VERSION)
        version = preamble[len(MAGIC)]
        raise HandshakeFailed("version", f"it speaks version {version} of the mesh's wire, {_UPDATE}")
    message_1 = await line.frame(MESSAGE_1)
    if line.unread:
        raise HandshakeFailed("garbage", "it went on before it was answered")
    tokens = [identity.token] + ([identity.previous_token] if identity.previous_token is not None else [])
    responder = Responder(identity.private, tokens)
    await line.write(responder.first(message_1))
    message_3 = await line.frame(MESSAGE_3)
    header, ciphertext = await line.sealed_record((HELLO,))
    try:
        session = responder.last(message_3)
    except HandshakeFailed as error:
        if error.reason == "token":
            line.hint(HINT_TOKEN)
        raise
    try:
        hello = decode_hello(session.decrypt(header, ciphertext))
        check(_claim(hello, session, identity, "dialler", line.address))
        answer = welcome(hello, line.address)
    except (BadHello, NotTrusted) as error:
        await _refuse(line, session, error)
    previous, proof = _own_proof(identity, session, "acceptor")
    answer = replace(answer, previous_key=previous, proof=proof)
    await line.write(session.encrypt(WELCOME, encode_welcome(answer)))
    return NoiseTransport(line.sock, session, hello, line.address)


async def _refuse(line: _Line, session: Session, error: BadHello | NotTrusted) -> NoReturn:
    """Say why to a side that has proven the token, and raise it here."""
    with suppress(OSError):  # it left: what is wrong is still what is wrong
        await line.write(session.encrypt(REFUSED, encode_refusal(error)))
    if isinstance(error, NotTrusted):
        raise error
    raise HandshakeFailed("protocol", f"it sent {error}") from None


def _own_proof(identity: Identity, session: Session, role: Role) -> tuple[bytes | None, bytes | None]:
    """Our previous public key and the proof that it was ours, while there is one."""
    previous = identity.previous_private
    if previous is None:
        return None, None
    proof = rotation_proof(previous, session.remote_static, session.handshake_hash, role)
    return public_key(previous), proof


def _claim(
    greeting: Hello | Welcome, session: Session, identity: Identity, role: Role, address: str
) -> Claim:
    """What is proven about the other side. Raises NotTrusted for a wrong proof of a previous key."""
    previous = greeting.previous_key
    if previous is not None:
        try:
            expected = rotation_proof(identity.private, previous, session.handshake_hash, role)
        except ValueError:  # a key that makes any secret zero
            expected = None
        if expected is None or not hmac.compare_digest(expected, greeting.proof or b""):
            raise NotTrusted(
                f"{greeting.node_id} at {address} names a previous key that it doesn't prove to have had"
            )
    return Claim(greeting.node_id, session.remote_static, previous, address)


class _Line:
    """The plain socket during the opening: reads exactly what is due and nothing beyond."""

    def __init__(self, sock: socket.socket, read_before: bytes) -> None:
        self.sock = sock
        self.unread = bytearray(read_before)
        self.address = "local"  # what isn't TCP has no address

    def prepare(self) -> None:
        """Raises OSError when the connection is gone already."""
        sock = self.sock
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            self.address = _address_text(sock.getpeername())
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    async def exactly(self, size: int) -> bytes:
        """The next `size` bytes. Raises HandshakeFailed at the end of the connection."""
        unread = self.unread
        while len(unread) < size:
            try:
                data = self.sock.recv(size - len(unread))
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.sock)
                continue
            if not data:
                raise HandshakeFailed("closed", "the connection was closed during the handshake")
            unread += data
        data = bytes(unread[:size])
        del unread[:size]
        return data

    async def frame(self, size: int) -> bytes:
        """A handshake message of this size. Raises HandshakeFailed, for a hint as well."""
        length = await self.exactly(_FRAME_SIZE)
        if length[0] == _HINT_FIRST:
            await self._take_hint(length)
        if int.from_bytes(length, "big") != size:
            raise HandshakeFailed("garbage", "what answers there doesn't speak as a llamesh node does")
        return await self.exactly(size)

    async def sealed_record(self, kinds: tuple[int, ...]) -> tuple[bytes, bytes]:
        """Header and ciphertext of a record of one of these kinds, of at most MAX_HELLO bytes."""
        header = await self.exactly(HEADER_SIZE)
        if header[0] == _HINT_FIRST:
            await self._take_hint(header)
        length = int.from_bytes(header[1:], "big")
        if header[0] not in kinds or not TAG_SIZE < length <= MAX_HELLO + TAG_SIZE:
            raise HandshakeFailed("garbage", "a record that doesn't belong into a handshake")
        return header, await self.exactly(length)

    async def record(self, session: Session, kinds: tuple[int, ...]) -> tuple[int, bytes]:
        """Kind and plaintext of such a record. Raises RecordBroken as well."""
        header, ciphertext = await self.sealed_record(kinds)
        return header[0], session.decrypt(header, ciphertext)

    async def write(self, data: bytes) -> None:
        """All of it."""
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[self.sock.send(rest) :]
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.sock)

    def hint(self, hint: bytes) -> None:
        """Four plain bytes to a dialler that can open nothing of ours. Best effort: the handshake failed."""
        with suppress(OSError):
            self.sock.send(hint)
            self.sock.recv(MAX_HELLO)  # bytes left unread would turn the close into a reset

    async def _take_hint(self, begun: bytes) -> NoReturn:
        hint = begun + await self.exactly(_HINT_SIZE - len(begun))
        if hint == HINT_TOKEN:
            text = (
                "it says that the cluster tokens differ (anybody on the way could say so): "
                "compare `llamesh token` on both nodes"
            )
            raise HandshakeFailed("token", text)
        if hint == HINT_VERSION:
            text = (
                f"it says that it speaks another version of the mesh's wire, and not {WIRE_VERSION}: "
                "update the older of the two nodes"
            )
            raise HandshakeFailed("version", text)
        raise HandshakeFailed("garbage", "what answers there doesn't speak as a llamesh node does")


def _address_text(address: tuple[str | int, ...]) -> str:
    """host:port, or [host]:port; an IPv4 address in an IPv6 dress is written as the IPv4 address."""
    host, port = str(address[0]), address[1]
    if ":" in host:
        mapped = host.lower().removeprefix("::ffff:")
        return f"{mapped}:{port}" if "." in mapped and ":" not in mapped else f"[{host}]:{port}"
    return f"{host}:{port}"


__all__ = [
    "HANDSHAKE_SECONDS", "PREAMBLE", "Check", "HandshakeFailed", "Hello", "Identity", "NoiseTransport",
    "RecordBroken", "Refused", "Truncated", "Welcome", "accept", "dial", "dial_any_token",
]  # fmt: skip
