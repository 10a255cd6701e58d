"""The records of an encrypted connection, without I/O.

- A record is a byte for its kind, a u16 length (big-endian), and a ciphertext of that length, by
  ChaCha20-Poly1305 with the keys that the Noise handshake split. The three bytes are its associated
  data; the nonce is the record's number in its direction. So nothing can be changed, dropped,
  repeated, reordered or turned back without the next record failing to open.
- The end of a stream is a record as well. A connection that ends without it was cut.
"""

from __future__ import annotations

import struct
from typing import Final, NoReturn

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

# Kinds of records.
DATA: Final = 0
END: Final = 1
HELLO: Final = 2
WELCOME: Final = 3
REFUSED: Final = 4

HEADER_SIZE: Final = 3
TAG_SIZE: Final = 16

# Plaintext bytes of the records that `Session.seal` makes. Larger ones are no faster to speak of, but cost
# a receiver more memory and the first byte more waiting (`python -m benchmarks.noise` shows it).
RECORD_SIZE = 32_768

# Far below the 2**64 - 1 that Noise allows, and out of reach: 10^6 records a second for 100,000 years.
_MAX_RECORDS = 1 << 62

# Slices of a view copy nothing, but take as long as copies of less than this.
_VIEW_FROM = 2048

_header = struct.Struct(">BH").pack
_read_header = struct.Struct(">BH").unpack_from
_nonce = struct.Struct("<4xQ").pack


class RecordBroken(ConnectionError):
    """A record that the other side didn't send like that: changed, repeated, left out or made up."""


class Session:
    """An established session: seals and opens records, each direction with a key and a counter.

    The library's cipher states would do; two layers of calls less save a sixth of a small record.
    """

    __slots__ = ("_open", "_opened", "_seal", "_sealed", "handshake_hash", "remote_static")

    def __init__(
        self, send_key: bytes, receive_key: bytes, handshake_hash: bytes, remote_static: bytes
    ) -> None:
        self._seal = ChaCha20Poly1305(send_key).encrypt
        self._open = ChaCha20Poly1305(receive_key).decrypt
        self._sealed = 0
        self._opened = 0
        self.handshake_hash = handshake_hash
        self.remote_static = remote_static

    def encrypt(self, kind: int, data: bytes | memoryview) -> bytes:
        """A whole record, header included. `data`: 65,519 bytes at most."""
        number = self._sealed
        if number >= _MAX_RECORDS:
            raise RecordBroken("the session is used up: connect again")
        self._sealed = number + 1
        header = _header(kind, len(data) + TAG_SIZE)
        return header + self._seal(_nonce(number), data, header)

    def seal(self, data: bytes | memoryview) -> bytes:
        """The DATA records of any amount of data, one after the other. Nothing for nothing."""
        size = len(data)
        if 0 < size <= RECORD_SIZE:
            return self.encrypt(DATA, data)
        view = memoryview(data)
        return b"".join(
            [self.encrypt(DATA, view[at : at + RECORD_SIZE]) for at in range(0, size, RECORD_SIZE)]
        )

    def decrypt(self, header: bytes, ciphertext: bytes | memoryview) -> bytes:
        """The plaintext of the next record. Raises RecordBroken; the session is of no use then."""
        number = self._opened
        if number >= _MAX_RECORDS:
            raise RecordBroken("the session is used up: connect again")
        try:
            data = self._open(_nonce(number), ciphertext, header)
        except InvalidTag:
            raise RecordBroken("a record was changed on its way, or isn't the next one") from None
        self._opened = number + 1
        return data


class Records:
    """Takes the bytes of an established stream as they come, gives the data in them.

    Holds at most one incomplete record (65,538 bytes). `ended` after the END record; `refusal` is
    the payload of a REFUSED record, which ends the stream too. After RecordBroken it stays broken.
    """

    __slots__ = ("_need", "_partial", "_session", "broken", "ended", "refusal")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._partial = bytearray()
        self._need = HEADER_SIZE  # bytes that `_partial` must hold before there is anything to do
        self.ended = False
        self.refusal: bytes | None = None
        self.broken = False

    def feed(self, data: bytes) -> bytes:
        """What the records that are complete now hold, joined. Raises RecordBroken."""
        read: bytes | bytearray = data
        if self._partial:
            self._partial += data
            if len(self._partial) < self._need:
                return b""
            read, self._partial = self._partial, bytearray()
        if self.ended or self.broken:
            self._break("bytes after the end of the stream")
        size = len(read)
        view = memoryview(read) if size > _VIEW_FROM else bytes(read)
        at = 0
        parts: list[bytes] = []
        while size - at >= HEADER_SIZE:
            kind, length = _read_header(view, at)
            if length < TAG_SIZE or (kind != DATA and kind != END and kind != REFUSED):
                self._break("not a record")
            start = at + HEADER_SIZE
            end = start + length
            if end > size:
                self._need = end - at
                break
            try:
                plain = self._session.decrypt(bytes(view[at:start]), view[start:end])
            except RecordBroken:
                self.broken = True
                raise
            at = end
            if kind == DATA:
                if not plain:
                    self._break("an empty record")
                parts.append(plain)
            else:
                self._finish(kind, plain)
                if at < size:
                    self._break("bytes after the end of the stream")
        else:
            self._need = HEADER_SIZE
        if at < size:
            self._partial += view[at:]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _finish(self, kind: int, plain: bytes) -> None:
        if kind == REFUSED:
            self.refusal = plain
        elif plain:
            self._break("an end with something in it")
        self.ended = True

    def _break(self, why: str) -> NoReturn:
        self.broken = True
        raise RecordBroken(why)
