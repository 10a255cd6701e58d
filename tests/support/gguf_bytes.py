"""GGUF files byte by byte, so that each of them can be wrong: the counterpart of `llamesh.local.gguf`."""

from __future__ import annotations

import struct
from collections.abc import Sequence

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_LETTERS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
_LETTERS |= {U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes) -> bytes:
    """A string: its length, then its bytes."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def scalar(kind: int, value: float | str | bytes) -> bytes:
    """A value of a type, without the type."""
    if isinstance(value, (str, bytes)):
        return text(value)
    return struct.pack(f"<{_LETTERS[kind]}", value)


def key(name: str | bytes, kind: int, value: float | str | bytes) -> bytes:
    """A key with one value."""
    return text(name) + struct.pack("<I", kind) + scalar(kind, value)


def array(name: str, kind: int, values: Sequence[float | str | bytes], *, length: int | None = None) -> bytes:
    """A key with a list; `length` is what the file says, if it isn't the truth."""
    said = len(values) if length is None else length
    head = text(name) + struct.pack("<IIQ", ARRAY, kind, said)
    return head + b"".join(scalar(kind, value) for value in values)


def tensor(name: str | bytes, shape: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    """The description of a tensor."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys_said: int | None = None,
    tensors_said: int | None = None,
) -> bytes:
    """A whole file with `data` zero bytes of weights; `*_said` are counts that aren't true."""
    counts = (
        len(tensors) if tensors_said is None else tensors_said,
        len(keys) if keys_said is None else keys_said,
    )
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join([*keys, *tensors])
    return head + bytes(-len(head) % 32) + bytes(data)


def llama(**numbers: int | Sequence[int]) -> list[bytes]:
    """Keys of a small llama: `attention__head_count=2` is `llama.attention.head_count`."""
    found: dict[str, int | Sequence[int]] = {
        "block_count": 2,
        "context_length": 4096,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
    }
    found |= {name.replace("__", "."): value for name, value in numbers.items()}
    keys = [key("general.architecture", STRING, "llama")]
    for name, value in found.items():
        if isinstance(value, int):
            keys.append(key(f"llama.{name}", U32, value))
        else:
            keys.append(array(f"llama.{name}", I32, value))
    return keys
