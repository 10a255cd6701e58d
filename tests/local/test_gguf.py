"""The GGUF reader: what it reads of good files, and that nothing in a bad one hurts it."""

from __future__ import annotations

import os
import struct
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf as reference
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamesh.core.model_header import GGML_TYPES, Tensor
from llamesh.local.gguf import BadGguf, GgufHeader, read_header
from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    I32,
    I64,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    gguf,
    key,
    llama,
    tensor,
    text,
)

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write bytes to a file of that test."""

    def to_file(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return to_file


# -- good files


def test_it_agrees_with_the_reference_on_a_real_file(tiny_model: Path) -> None:
    header = read_header(tiny_model)
    truth = reference.GGUFReader(tiny_model)
    assert header.architecture == "llama"
    assert (header.version, header.file_type) == (3, 0)
    assert header.files == (str(tiny_model),)
    assert header.file_bytes == tiny_model.stat().st_size
    assert header.vocabulary == 260
    assert {t.name: t.size for t in header.tensors} == {t.name: t.n_bytes for t in truth.tensors}
    assert {t.name: t.shape for t in header.tensors} == {t.name: tuple(t.shape) for t in truth.tensors}
    assert header.block_count == 1
    assert header.context_length == 8192
    assert header.embedding_length == 64
    assert header.feed_forward_length == 128
    assert (header.head_count(0), header.head_count_kv(0)) == (2, 2)
    assert (header.key_length, header.value_length, header.rope_dimensions) == (32, 32, 32)
    assert (header.expert_count, header.expert_used_count, header.sliding_window) == (0, 0, 0)
    layers = header.layer_bytes()
    assert set(layers) == {0, None}
    assert sum(layers.values()) == header.weight_bytes


@pytest.mark.parametrize("number", sorted(GGML_TYPES))
def test_sizes_of_types_are_those_of_the_reference(number: int) -> None:
    kind = GGML_TYPES[number]
    try:
        known = reference.GGMLQuantizationType(number)
    except ValueError:
        return  # Newer than the reference that is installed.
    assert kind.name == known.name.lower()
    if kind.name != "q8_1":  # of the reference's own, older layout; it is never stored in files
        assert (kind.block, kind.size) == reference.GGML_QUANT_SIZES[known]


def test_quantised_weights_and_lists_for_each_layer(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = reference.GGUFWriter(path, "gemma3")
    writer.add_block_count(3)
    writer.add_head_count_kv([4, 0, 2])
    writer.add_array("gemma3.attention.sliding_window_pattern", [True, False, True])
    writer.add_feed_forward_length([512, 256, 128])
    writer.add_array("gemma3.notes", [0.5, 1.5])
    weights = np.zeros((64, 512), dtype=np.float32)
    quantised = reference.quants.quantize(weights, reference.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.2.ffn_up.weight", quantised, raw_dtype=reference.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_header(path)
    assert [header.head_count_kv(layer) for layer in range(4)] == [4, 0, 2, 0]
    assert header.feed_forward_length == 512
    assert header.numbers["attention.sliding_window_pattern"] == (1, 0, 1)
    assert "notes" not in header.numbers
    assert header.tensors == (Tensor("blk.2.ffn_up.weight", 8, (512, 64), 64 * 512 // 32 * 34, 2),)


@pytest.mark.parametrize("version", [2, 3])
def test_versions(write: Write, version: int) -> None:
    assert read_header(write(gguf(llama(), version=version))).version == version


def test_keys_may_come_in_any_order_and_others_are_left_out(write: Write) -> None:
    keys = [
        key("llama.context_length", U64, 1 << 20),
        key("other.block_count", U32, 99),
        key("general.name", STRING, "x" * 100_000),
        key("llama.rope.freq_base", F32, 1e6),
        key("llama.use_parallel_residual", BOOL, True),
        key("llama.attention.causal", BOOL, False),
        key("llama.odd", I64, -1),
        key("llama.huge", U64, 1 << 60),
        key("llama.block_count", U8, 7),
        key("general.architecture", STRING, "llama"),
    ]
    header = read_header(write(gguf(keys)))
    assert dict(header.numbers) == {
        "context_length": 1 << 20,
        "use_parallel_residual": 1,
        "attention.causal": 0,
        "block_count": 7,
    }
    assert header.file_type is None


def test_the_vocabulary_is_counted_and_not_kept(write: Write) -> None:
    tokens = [f"token {number}" for number in range(50_000)]
    keys = [*llama(vocab_size=3), array("tokenizer.ggml.tokens", STRING, tokens)]
    keys.append(array("tokenizer.ggml.scores", F32, [0.5] * 50_000))
    keys.append(array("llama.long", I32, range(50_000)))
    path = write(gguf(keys))
    header, peak = _peak_of(path)
    assert isinstance(header, GgufHeader)
    assert header.vocabulary == 50_000
    assert "long" not in header.numbers
    assert peak < 1 << 20
    assert read_header(write(gguf(llama(vocab_size=3)))).vocabulary == 3


def test_an_alignment_of_its_own(write: Write) -> None:
    keys = [*llama(), key("general.alignment", U32, 4096)]
    data = gguf(keys, [tensor("output.weight", [64], 0)])
    data += bytes(4096 - len(data) + 256)
    assert read_header(write(data)).weight_bytes == 256
    with pytest.raises(BadGguf, match="lacks 1 bytes"):
        read_header(write(data[:-1]))


def test_names_that_are_not_utf8_stay_apart(write: Write) -> None:
    data = gguf(llama(), [tensor(b"blk.0.\xff", [8]), tensor(b"blk.1.\xfe", [8], 0, 32)], 64)
    assert [t.layer for t in read_header(write(data)).tensors] == [0, 1]


# -- bad files


def _bad(path: Path, message: str) -> None:
    """It is refused with such a message, which names the file, and without much memory."""
    problem, peak = _peak_of(path)
    assert isinstance(problem, BadGguf)
    assert message in problem.message
    assert problem.path == str(path)
    assert str(problem) == f"{path}: {problem.message}"
    assert len(problem.message) < 300
    assert "\n" not in problem.message
    assert peak < 4 << 20


def _peak_of(path: Path) -> tuple[GgufHeader | BadGguf, int]:
    tracemalloc.start()
    try:
        outcome: GgufHeader | BadGguf = read_header(path)
    except BadGguf as problem:
        outcome = problem
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return outcome, peak


HUGE = 1 << 60
ARCHITECTURE = key("general.architecture", STRING, "llama")

HOSTILE = {
    "empty": (b"", "it is empty"),
    "short": (b"GG", "begins with b'GG'"),
    "another file": (b"\x7fELF" + bytes(100), "begins with b'\\x7fELF'"),
    "magic only": (b"GGUF", "cut off at byte 4"),
    "version 1": (gguf(version=1), "is GGUF version 1"),
    "version 4": (gguf(version=4), "is GGUF version 4"),
    "version 0": (gguf(version=0), "is GGUF version 0"),
    "big-endian": (gguf(version=3 << 24), "big-endian"),
    "2^60 keys": (gguf(keys_said=HUGE), f"says that it has {HUGE} keys"),
    "2^60 tensors": (gguf(tensors_said=HUGE), f"says that it has {HUGE} tensors"),
    "all ones": (b"GGUF\x03\0\0\0" + b"\xff" * 64, "18446744073709551615 keys"),
    "more keys than bytes": (gguf(keys_said=9), "says that it has 9 keys"),
    "more tensors than bytes": (gguf(llama(), tensors_said=99), "says that it has 99 tensors"),
    "fewer keys than said": (gguf([ARCHITECTURE], [], 100, keys_said=2), "key without name"),
    "a key of 2^63 bytes": (gguf([struct.pack("<Q", 1 << 63) + bytes(32)]), "a key is 9223372036854775808"),
    "a long key": (gguf([key("k" * 300, U32, 1)]), "a key is 300 bytes"),
    "a value of 2^63 bytes": (
        gguf([text("general.name") + struct.pack("<IQ", STRING, 1 << 63) + bytes(32)]),
        "a length in it is wrong",
    ),
    "a key twice": (gguf([ARCHITECTURE, ARCHITECTURE]), "has key 'general.architecture' twice"),
    "a value of no type": (gguf([text("a.b") + struct.pack("<I", 13) + bytes(9)]), "unknown type 13"),
    "a list of no type": (
        gguf([text("a.b") + struct.pack("<IIQ", ARRAY, 77, 1) + bytes(9)]),
        "a list of unknown type 77",
    ),
    "lists in a list": (
        gguf([text("a.b") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(99)]),
        "lists in a list",
    ),
    "a list of 2^60 numbers": (gguf([array("a.b", U32, [1, 2], length=HUGE)]), "a length in it is wrong"),
    "a list of 2^60 strings": (gguf([array("a.b", STRING, ["x"], length=HUGE)]), "a list of"),
    "a list of too many strings": (gguf([array("a.b", STRING, ["x"] * 9, length=99)]), "cut off in a list"),
    "strings beyond the end": (
        gguf([array("a.b", STRING, [b"x"], length=2) + struct.pack("<Q", 1 << 63) + bytes(64)]),
        "in a list of strings",
    ),
    "no architecture": (gguf([key("a.b", U32, 1)]), "doesn't say its architecture"),
    "an odd architecture": (gguf([key("general.architecture", STRING, "a\nb")]), "'a\\nb'"),
    "a long architecture": (gguf([key("general.architecture", STRING, "a" * 65)]), "is 65 bytes long"),
    "architecture as a number": (gguf([key("general.architecture", U32, 1)]), "doesn't say its architecture"),
    "a million layers": (gguf(llama(block_count=1_000_000)), "says that it has 1000000 layers"),
    "alignment 0": (gguf([*llama(), key("general.alignment", U32, 0)]), "power of two"),
    "alignment 33": (gguf([*llama(), key("general.alignment", U32, 33)]), "power of two"),
    "alignment 2^40": (gguf([*llama(), key("general.alignment", U64, 1 << 40)]), "power of two"),
    "alignment as a list": (gguf([*llama(), array("general.alignment", U32, [32])]), "power of two"),
    "a tensor twice": (gguf(llama(), [tensor("t", [8])] * 2, 999), "has tensor 't' twice"),
    "a long name": (gguf(llama(), [tensor("t" * 128, [8])], 999), "the name of a tensor is 128 bytes"),
    "five dimensions": (gguf(llama(), [tensor("t", [1] * 5)], 999), "has 5 dimensions"),
    "2^32 dimensions": (
        gguf(llama(), [text("t") + struct.pack("<I", 0xFFFFFFFF)], 999),
        "has 4294967295 dimensions",
    ),
    "an overflowing shape": (gguf(llama(), [tensor("t", [1 << 32, 1 << 32])], 999), "is too large"),
    "a shape with zero beside 2^63": (gguf(llama(), [tensor("t", [0, 1 << 63])], 999), "is too large"),
    "a withdrawn type": (gguf(llama(), [tensor("t", [32], 4)], 999), "has unknown type 4"),
    "a future type": (gguf(llama(), [tensor("t", [32], 1 << 31)], 999), "has unknown type 2147483648"),
    "half a block": (gguf(llama(), [tensor("t", [33], 8)], 999), "aren't whole blocks of q8_0"),
    "weights beyond the end": (gguf(llama(), [tensor("t", [100])], 399), "lacks 1 bytes of its weights"),
    "an offset beyond the end": (gguf(llama(), [tensor("t", [8], 0, 1 << 63)], 999), "bytes of its weights"),
    "part 2": (
        gguf([*llama(), key("split.count", U16, 3), key("split.no", U16, 1)]),
        "is part 2 of 3: name the first part",
    ),
    "a part by another name": (
        gguf([*llama(), key("split.count", U16, 3), key("split.no", U16, 0)]),
        "must end in -00001-of-00003.gguf",
    ),
    "65,535 parts": (gguf([*llama(), key("split.count", U16, 65535)]), "is split into 65535 parts"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_file_is_refused(write: Write, name: str) -> None:
    data, message = HOSTILE[name]
    _bad(write(data), message)


def test_a_vast_sparse_file_is_refused_at_once(tmp_path: Path) -> None:
    """Counts that the file's length allows are still beyond what any model has."""
    path = tmp_path / "m.gguf"
    for said, message in (
        (gguf(keys_said=1 << 30), "keys"),
        (gguf(tensors_said=1 << 30), "tensors"),
        (gguf([array("a.b", STRING, [], length=1 << 30)]), "list of 1073741824 strings"),
    ):
        path.write_bytes(said)
        os.truncate(path, 1 << 40)
        _bad(path, message)


def test_many_lists_are_not_kept(write: Write) -> None:
    lists = [array(f"llama.l{number}", U8, bytes(4096)) for number in range(256)]
    header, peak = _peak_of(write(gguf([*llama(), *lists])))
    assert isinstance(header, GgufHeader)
    assert sum(len(value) for value in header.numbers.values() if isinstance(value, tuple)) <= 65536
    assert peak < 4 << 20


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    _bad(tmp_path / "missing.gguf", "can't be read: No such file")
    _bad(tmp_path, "isn't a regular file")
    _bad(tmp_path / "pipe", "isn't a regular file")
    _bad(Path("/dev/zero"), "isn't a regular file")
    with pytest.raises(BadGguf, match="can't be read"):
        read_header("with\0zero")


def test_each_cut_of_a_real_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = tiny_model.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 200, 7), *range(200, len(data), len(data) // 40), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(BadGguf):
            read_header(path)


BOUNDED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@BOUNDED
@given(tail=st.binary(max_size=400), counts=st.tuples(st.integers(0, 6), st.integers(0, 6)))
def test_random_bytes_behind_a_good_beginning(tmp_path: Path, tail: bytes, counts: tuple[int, int]) -> None:
    _survives(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)


@BOUNDED
@given(
    st.lists(
        st.tuples(
            st.integers(0, 12_000),
            st.sampled_from([b"\0", b"\xff", b"\x09", b"\xff" * 8, bytes(8), b"\x80" + bytes(7)]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_real_file_with_wrong_bytes(
    tiny_model: Path, tmp_path: Path, edits: list[tuple[int, bytes]]
) -> None:
    data = bytearray(tiny_model.read_bytes())
    for place, wrong in edits:
        data[place : place + len(wrong)] = wrong
    _survives(tmp_path, bytes(data))


def _survives(folder: Path, data: bytes) -> None:
    path = folder / "fuzz.gguf"
    path.write_bytes(data)
    outcome, peak = _peak_of(path)
    assert peak < 2 << 20
    if isinstance(outcome, BadGguf):
        assert outcome.path == str(path)
    else:
        assert outcome.weight_bytes <= len(data)


# -- split models


def _split(folder: Path, parts: int = 3) -> list[Path]:
    paths = []
    for number in range(parts):
        keys = [key("split.count", U16, parts), key("split.no", U16, number)]
        keys.append(key("split.tensors.count", I32, parts))
        if number == 0:
            keys += llama()
        path = folder / f"m-{number + 1:05}-of-{parts:05}.gguf"
        path.write_bytes(gguf(keys, [tensor(f"blk.{number}.attn_k.weight", [64, 2], 1)], 256))
        paths.append(path)
    return paths


def test_parts_add_up(tmp_path: Path) -> None:
    paths = _split(tmp_path)
    header = read_header(paths[0])
    assert header.files == tuple(map(str, paths))
    assert header.layer_bytes() == {0: 256, 1: 256, 2: 256}
    assert header.file_bytes == sum(path.stat().st_size for path in paths)
    assert header.block_count == 2


def test_what_is_wrong_with_a_part_names_the_part(tmp_path: Path) -> None:
    paths = _split(tmp_path)

    def refused(name: Path, message: str) -> None:
        with pytest.raises(BadGguf, match=message) as caught:
            read_header(paths[0])
        assert caught.value.path == str(name)

    second = paths[1].read_bytes()
    paths[1].unlink()
    refused(paths[1], "No such file")
    paths[1].write_bytes(second[:-1])
    refused(paths[1], "lacks 1 bytes")
    paths[1].write_bytes(paths[2].read_bytes())
    refused(paths[1], "isn't part 2 of 3")
    keys = [key("split.count", U16, 3), key("split.no", U16, 1)]
    paths[1].write_bytes(gguf(keys, [tensor("blk.0.attn_k.weight", [64, 2], 1)], 256))
    refused(paths[1], "as an earlier part does")
    paths[1].write_bytes(gguf(keys))
    refused(paths[0], "hold 2 tensors, not 3")


def test_reading_leaves_no_descriptor_open(tiny_model: Path, write: Write) -> None:
    bad = write(HOSTILE["five dimensions"][0])
    descriptors = Path("/proc/self/fd") if Path("/proc/self/fd").exists() else Path("/dev/fd")
    before = len(os.listdir(descriptors))
    for _ in range(20):
        read_header(tiny_model)
        with pytest.raises(BadGguf):
            read_header(bad)
    assert len(os.listdir(descriptors)) == before


def test_threads_read_side_by_side(tiny_model: Path) -> None:
    found: list[GgufHeader] = []
    threads = [threading.Thread(target=lambda: found.append(read_header(tiny_model))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(header == found[0] for header in found)
