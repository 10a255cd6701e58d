"""Read what a GGUF file says of its model, without its weights and without trust.

The format is GGUF 2 and 3 of the ggml project (`docs/gguf.md` there; the order of checks follows `gguf.cpp`):
magic, version, number of tensors, number of keys, then the keys with their values, then name, shape, type and
offset of each tensor, then the data. All little-endian.

Nothing is believed: each count is held against the bytes that are left before anything is made of it, each
string against a limit, and what isn't needed (vocabularies, above all) is walked over without an object for
it. So a hostile file costs milliseconds (half a second with the longest vocabulary that is let pass) and
little memory, and every failure is a `BadGguf`.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from types import MappingProxyType

from llamesh.core.model_header import GGML_TYPES, GgufHeader, Number, Tensor

__all__ = ["BadGguf", "GgufHeader", "read_header"]

_WINDOW = 256 * 1024
_MAX_KEYS = 8192  # large models have 60
_MAX_TENSORS = 32768  # over all parts; the largest models have 2,500
_MAX_KEY_LENGTH = 256
_MAX_NAME_LENGTH = 127  # llama.cpp itself takes 63
_MAX_STRINGS = 2_097_152  # tokens and merges of one file; the largest vocabularies have 800,000 of both
_MAX_KEPT_LIST = 4096  # a number for each layer; longer lists are vocabularies
_MAX_KEPT_NUMBERS = 65536
_MAX_LAYERS = 4096
_MAX_PARTS = 4096
_MAX_ELEMENTS = (1 << 63) - 1
_DEFAULT_ALIGNMENT = 32

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRING, _ARRAY = 8, 9
# Value types by number: the struct letter. Strings and arrays are apart.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOATS = frozenset({6, 12})

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LAYER = re.compile(r"(?:^|\.)blk\.(\d{1,9})\.")
_PART_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class BadGguf(Exception):
    """The file can't be read, or isn't a GGUF file that can be used. `message` doesn't repeat `path`."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path
        self.message = message


def read_header(path: str | os.PathLike[str]) -> GgufHeader:
    """What the model in `path` needs to be known; of a split model `path` is the first part.

    Reads the head of the file only, 256 KiB at a time. Blocks, for as long as the file system does: call it
    in a thread. Raises BadGguf for whatever is wrong, a missing file or part included.
    """
    name = os.fspath(path)
    first = _Part(name)
    paths = [name, *_further_parts(first)]
    tensors = dict(first.tensors)
    file_bytes = first.size
    for index, part_path in enumerate(paths[1:], start=1):
        part = _Part(part_path, tensors_before=len(tensors))
        if part.number("split.count") != len(paths) or part.number("split.no") != index:
            raise BadGguf(part_path, f"isn't part {index + 1} of {len(paths)} of the model in {name}")
        file_bytes += part.size
        for tensor_name, tensor in part.tensors.items():
            if tensor_name in tensors:
                raise BadGguf(part_path, f"holds tensor {_shown(tensor_name)}, as an earlier part does")
            tensors[tensor_name] = tensor
    expected = first.number("split.tensors.count")
    if len(paths) > 1 and expected not in (0, len(tensors)):
        raise BadGguf(name, f"its {len(paths)} parts hold {len(tensors)} tensors, not {expected}")
    return _header(first, tuple(paths), tuple(tensors.values()), file_bytes)


def _further_parts(first: _Part) -> list[str]:
    count = first.number("split.count")
    if count <= 1:
        return []
    if count > _MAX_PARTS:
        raise BadGguf(first.path, f"says that it is split into {count} parts")
    if (position := first.number("split.no")) != 0:
        raise BadGguf(first.path, f"is part {position + 1} of {count}: name the first part")
    found = _PART_NAME.fullmatch(first.path)
    if found is None or (int(found[2]), int(found[3])) != (1, count):
        raise BadGguf(first.path, f"is part 1 of {count}, so its name must end in -00001-of-{count:05}.gguf")
    return [f"{found[1]}-{number:05}-of-{count:05}.gguf" for number in range(2, count + 1)]


def _header(first: _Part, files: tuple[str, ...], tensors: tuple[Tensor, ...], file_bytes: int) -> GgufHeader:
    architecture = first.architecture
    if architecture is None:
        raise BadGguf(first.path, "doesn't say its architecture (general.architecture)")
    prefix = f"{architecture}."
    numbers = {
        key.removeprefix(prefix): value
        for key, value in first.numbers.items()
        if key.startswith(prefix) and _sensible(value)
    }
    layers = first.number(f"{prefix}block_count")
    if not 0 <= layers <= _MAX_LAYERS:
        raise BadGguf(first.path, f"says that it has {layers} layers")
    size = numbers.get("vocab_size", 0)
    return GgufHeader(
        architecture=architecture,
        version=first.version,
        numbers=MappingProxyType(numbers),
        vocabulary=first.lengths.get("tokenizer.ggml.tokens", 0) or (0 if isinstance(size, tuple) else size),
        file_type=first.number("general.file_type") if "general.file_type" in first.numbers else None,
        tensors=tensors,
        files=files,
        file_bytes=file_bytes,
    )


def _sensible(value: Number) -> bool:
    """Whether it can be a size or a count: llama.cpp keeps those in 32 bits without sign."""
    values = value if isinstance(value, tuple) else (value,)
    return all(0 <= number < 1 << 32 for number in values)


def _shown(text: str) -> str:
    """Text of a stranger, as an error may show it: one line, not too long."""
    return ascii(text if len(text) <= 60 else f"{text[:57]}...")


class _Part:
    """One file: its keys and tensors. `lengths` are those of its arrays, by key."""

    def __init__(self, path: str, *, tensors_before: int = 0) -> None:
        self.path = path
        self.architecture: str | None = None
        self.numbers: dict[str, Number] = {}
        self.lengths: dict[str, int] = {}
        self.tensors: dict[str, Tensor] = {}
        self._may_keep = _MAX_KEPT_NUMBERS
        try:
            # Not blocking: opening a pipe would wait for a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as problem:
            raise BadGguf(path, _reason(problem)) from problem
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BadGguf(path, "isn't a regular file")
            self.size = status.st_size
            self._file = _Window(path, descriptor, self.size)
            self._read(tensors_before)
        except OSError as problem:
            raise BadGguf(path, _reason(problem)) from problem
        finally:
            os.close(descriptor)

    def number(self, key: str) -> int:
        """A key that holds one number, 0 where it doesn't."""
        value = self.numbers.get(key, 0)
        return 0 if isinstance(value, tuple) else value

    def _read(self, tensors_before: int) -> None:
        file = self._file
        magic = file.take(min(4, self.size))
        if magic != b"GGUF":
            start = f"it begins with {magic!a}" if magic else "it is empty"
            raise BadGguf(self.path, f"isn't a GGUF file: {start}")
        self.version = file.u32()
        if self.version and not self.version & 0xFFFF:
            raise BadGguf(self.path, "is a big-endian GGUF file, which this machine's engine can't load")
        if self.version not in (2, 3):
            raise BadGguf(self.path, f"is GGUF version {self.version}: versions 2 and 3 can be read")
        tensors = file.u64()
        keys = file.u64()
        # The least that a key takes is 14 bytes: the length of its name, a letter, a type, a byte. A tensor
        # takes 24: the length of its name, a number of dimensions, a type, an offset.
        if keys > _MAX_KEYS or keys * 14 > file.left:
            raise BadGguf(self.path, f"says that it has {keys} keys")
        if tensors > _MAX_TENSORS - tensors_before or tensors * 24 > file.left:
            raise BadGguf(self.path, f"says that it has {tensors} tensors")
        seen: set[str] = set()
        for _ in range(keys):
            key = file.text(_MAX_KEY_LENGTH, "a key")
            if not key or key in seen:
                raise BadGguf(self.path, f"has key {_shown(key)} twice" if key else "has a key without name")
            seen.add(key)
            self._read_value(key)
        self._read_tensors(tensors)

    def _read_value(self, key: str) -> None:
        file = self._file
        kind = file.u32()
        if kind == _STRING:
            if key == "general.architecture":
                self.architecture = file.text(64, key)
                if not _ARCHITECTURE.fullmatch(self.architecture):
                    raise BadGguf(self.path, f"says its architecture is {_shown(self.architecture)}")
            else:
                file.skip(file.u64())
        elif kind == _ARRAY:
            self._read_array(key)
        elif (letter := _SCALARS.get(kind)) is not None:
            (value,) = struct.unpack(f"<{letter}", file.take(struct.calcsize(f"<{letter}")))
            if kind not in _FLOATS:
                self.numbers[key] = int(value)
        else:
            raise BadGguf(self.path, f"key {_shown(key)} has a value of unknown type {kind}")

    def _read_array(self, key: str) -> None:
        file = self._file
        kind = file.u32()
        length = file.u64()
        if kind == _STRING:
            file.skip_strings(length)
        elif (letter := _SCALARS.get(kind)) is not None:
            size = struct.calcsize(f"<{letter}")
            if kind in _FLOATS or length > min(_MAX_KEPT_LIST, self._may_keep):
                file.skip(length * size)
            else:
                self._may_keep -= length
                values = struct.unpack(f"<{length}{letter}", file.take(length * size))
                self.numbers[key] = tuple(map(int, values))
        elif kind == _ARRAY:
            raise BadGguf(self.path, f"key {_shown(key)} holds lists in a list")
        else:
            raise BadGguf(self.path, f"key {_shown(key)} holds a list of unknown type {kind}")
        self.lengths[key] = length

    def _read_tensors(self, count: int) -> None:
        file = self._file
        ends = 0
        shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        for _ in range(count):
            name = file.text(_MAX_NAME_LENGTH, "the name of a tensor")
            if name in self.tensors:
                raise BadGguf(self.path, f"has tensor {_shown(name)} twice")
            dimensions = file.u32()
            if dimensions > 4:
                raise BadGguf(self.path, f"tensor {_shown(name)} has {dimensions} dimensions")
            shape = struct.unpack(f"<{dimensions}Q", file.take(8 * dimensions))
            kind = file.u32()
            offset = file.u64()
            size = self._size(name, shape, kind)
            ends = max(ends, offset + size)
            found = _LAYER.search(name)
            # Hundreds of tensors share a few shapes.
            shape = shapes.setdefault(shape, shape)
            self.tensors[name] = Tensor(name, kind, shape, size, int(found[1]) if found else None)
        alignment = self.numbers.get("general.alignment", _DEFAULT_ALIGNMENT)
        if isinstance(alignment, tuple) or alignment <= 0 or alignment & (alignment - 1) or alignment >> 32:
            raise BadGguf(self.path, "general.alignment isn't a power of two")
        start = -(-file.position // alignment) * alignment
        if count and start + ends > self.size:
            raise BadGguf(self.path, f"is cut off: it lacks {start + ends - self.size} bytes of its weights")

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        stored = GGML_TYPES.get(kind)
        if stored is None:
            raise BadGguf(self.path, f"tensor {_shown(name)} has unknown type {kind}")
        elements = 1
        for length in shape:
            # Each alone as well: a zero beside it would hide one that is beyond all measure.
            elements *= length
            if max(length, elements) > _MAX_ELEMENTS:
                raise BadGguf(self.path, f"tensor {_shown(name)} is too large: {list(shape)}")
        if (shape[0] if shape else 1) % stored.block:
            raise BadGguf(self.path, f"tensor {_shown(name)}: its rows aren't whole blocks of {stored.name}")
        return elements // stored.block * stored.size


def _reason(problem: OSError | ValueError) -> str:
    return f"can't be read: {problem.strerror if isinstance(problem, OSError) else problem}"


class _Window:
    """The head of a file, a piece of at most 256 KiB in memory at a time."""

    def __init__(self, path: str, descriptor: int, size: int) -> None:
        self.position = 0
        self._path = path
        self._descriptor = descriptor
        self._size = size
        self._start = 0
        self._buffer = b""
        self._strings = 0

    @property
    def left(self) -> int:
        return self._size - self.position

    def _load(self, count: int) -> int:
        """Have the next `count` bytes (at most a window) in the buffer; where they begin in it."""
        offset = self.position - self._start
        if not 0 <= offset <= len(self._buffer) - count:
            if count > self.left:
                raise BadGguf(self._path, f"is cut off at byte {self._size}, in its header")
            self._buffer = os.pread(self._descriptor, min(_WINDOW, self.left), self.position)
            self._start, offset = self.position, 0
            if len(self._buffer) < count:
                raise BadGguf(self._path, "was cut off while it was read")
        return offset

    def take(self, count: int) -> bytes:
        offset = self._load(count)
        self.position += count
        return self._buffer[offset : offset + count]

    def u32(self) -> int:
        value: int = _U32.unpack(self.take(4))[0]
        return value

    def u64(self) -> int:
        value: int = _U64.unpack(self.take(8))[0]
        return value

    def text(self, limit: int, what: str) -> str:
        length = self.u64()
        if length > limit:
            raise BadGguf(self._path, f"{what} is {length} bytes long")
        # Strict UTF-8 isn't asked for by llama.cpp either; two different names stay different.
        return self.take(length).decode("utf-8", "backslashreplace")

    def skip(self, count: int) -> None:
        if count > self.left:
            raise BadGguf(
                self._path, f"is cut off at byte {self._size}, or a length in it is wrong ({count})"
            )
        self.position += count

    def skip_strings(self, count: int) -> None:
        """Walk over `count` strings: the one loop that runs hundreds of thousands of times in good files."""
        self._strings += count
        if self._strings > _MAX_STRINGS:
            raise BadGguf(self._path, f"holds a list of {count} strings")
        if count * 8 > self.left:
            raise BadGguf(self._path, f"is cut off in a list of {count} strings")
        unpack = _U64.unpack_from
        while count:
            offset = self._load(8)
            buffer = self._buffer
            last = len(buffer) - 8
            while count and offset <= last:
                offset += 8 + unpack(buffer, offset)[0]
                count -= 1
            self.position = self._start + offset
            if self.left < 0:
                raise BadGguf(self._path, f"is cut off at byte {self._size}, in a list of strings")
