"""SHA-256 that can be put down and taken up again, in another process, without reading anything twice.

Between two blocks of 64 bytes, SHA-256 (FIPS 180-4, section 6.2) is eight words and a length. Python's
hashlib doesn't give them away, so where its OpenSSL can be reached the same functions are called directly:
`SHA256_CTX` (openssl/sha.h) is `h[8], Nl, Nh, data[16], num, md_len`, all 32 bits. That is tried out once,
on import; where it fails, digests can't be saved, and whoever resumes reads what is there again.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from typing import Protocol

_BLOCK = 64
_CONTEXT = struct.Struct("=8I2I64sII")
_STATE = struct.Struct(">8IQ")
_CONTEXT_BYTES = 256  # twice what it takes


class Digest(Protocol):
    """A hash in the making. `size`: bytes so far. `update` releases the GIL while it works."""

    size: int

    def update(self, data: memoryview) -> None: ...
    def hexdigest(self) -> str: ...
    def save(self) -> str | None:
        """All that is needed to go on, None where that can't be had (here, or just now)."""


class PlainDigest:
    """One of hashlib's; can't be saved."""

    def __init__(self, name: str = "sha256", prefix: bytes = b"") -> None:
        self._hash = hashlib.new(name, prefix, usedforsecurity=False)
        self.size = 0

    def update(self, data: memoryview) -> None:
        self._hash.update(data)
        self.size += len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def save(self) -> str | None:
        return None


class ResumableSha256:
    """SHA-256 by OpenSSL's own context. Only where `RESUMABLE` says that this works."""

    def __init__(self, state: str | None = None) -> None:
        """`state`: what `save` gave. Raises ValueError when it isn't that."""
        self._context = ctypes.create_string_buffer(_CONTEXT_BYTES)
        library = _library()
        self._library = library
        library.SHA256_Init(self._context)
        self.size = 0
        if state is not None:
            self._restore(state)

    def update(self, data: memoryview) -> None:
        view = (ctypes.c_char * len(data)).from_buffer(data)
        self._library.SHA256_Update(self._context, view, ctypes.c_size_t(len(data)))
        self.size += len(data)

    def hexdigest(self) -> str:
        result, copy = ctypes.create_string_buffer(32), ctypes.create_string_buffer(self._context.raw)
        self._library.SHA256_Final(result, copy)
        return result.raw.hex()

    def save(self) -> str | None:
        if self.size % _BLOCK:
            return None
        words = _CONTEXT.unpack_from(self._context)[:8]
        return _STATE.pack(*words, self.size).hex()

    def _restore(self, state: str) -> None:
        raw = bytes.fromhex(state)
        if len(raw) != _STATE.size:
            raise ValueError("not a saved digest")
        *words, size = _STATE.unpack(raw)
        if size % _BLOCK or size >> 60:
            raise ValueError("not a saved digest")
        bits = size * 8
        _CONTEXT.pack_into(self._context, 0, *words, bits & 0xFFFFFFFF, bits >> 32, b"", 0, 32)
        self.size = size


def sha256(state: str | None = None) -> Digest:
    """A SHA-256, from `state` on. Raises ValueError for a state that can't be used here."""
    if RESUMABLE:
        return ResumableSha256(state)
    if state is not None:
        raise ValueError("digests can't be taken up again with this OpenSSL")
    return PlainDigest()


def git_sha1(size: int) -> Digest:
    """The hash that git gives a blob of `size` bytes: how the hub names small files."""
    return PlainDigest("sha1", b"blob %d\0" % size)


_loaded: ctypes.CDLL | None = None


def _library() -> ctypes.CDLL:
    """The OpenSSL that hashlib uses: a symbol is looked for in what the module itself was linked with."""
    global _loaded
    if _loaded is None:
        import _hashlib

        _loaded = ctypes.CDLL(getattr(_hashlib, "__file__", None))
    return _loaded


def _works() -> bool:
    sample = bytearray(range(256)) * 9
    expected = hashlib.sha256(sample).hexdigest()
    try:
        first = ResumableSha256()
        first.update(memoryview(sample)[: 7 * _BLOCK])
        second = ResumableSha256(first.save())
        second.update(memoryview(sample)[7 * _BLOCK :])
        return second.hexdigest() == expected and second.size == len(sample)
    except (OSError, AttributeError, ImportError, ValueError, TypeError):
        return False


RESUMABLE = _works()
