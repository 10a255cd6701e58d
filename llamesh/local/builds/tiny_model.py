"""A GGUF model of 300 KB with random weights, to try an engine with; made here, nothing is downloaded.

One block of a llama with a byte-level tokenizer. What it says is noise, but noise that depends on every
token of its context, always the same for the same context, only letters and digits, and without end:
whether an engine computes at all, and whether it keeps two conversations apart, shows in it.
The format is GGUF version 3 (docs/gguf.md of ggml): header, keys, tensor descriptions, aligned weights.
"""

from __future__ import annotations

import random
import struct
import sys
from array import array
from collections.abc import Iterable, Sequence

_WIDTH, _FEED_FORWARD, _HEADS = 64, 128, 2
_CONTEXT = 8192
_ALIGNMENT = 32

_U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9
_NORMAL, _CONTROL = 1, 3

_BEGIN, _END = "<|begin|>", "<|end|>"

# How strongly the attention counts beside the token itself: what was said long ago has to show.
_ATTENTION_GAIN = 3.0

# The best two tokens are far apart with this, mostly by more than rounding can turn.
_LOGIT_SPREAD = 16.0


def tiny_model() -> bytes:
    """The file. The same bytes each time; takes a tenth of a second."""
    tokens = _tokens()
    tensors = _tensors(tokens)
    keys = _keys(tokens)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys)
    data, described = b"", b""
    for name, shape, values in tensors:
        # Shapes are written with the fastest dimension first.
        described += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, len(data))
        data += _padded(_bytes(values))
    return _padded(head + described) + data


def _tokens() -> list[str]:
    """The vocabulary: GPT-2's printable stand-ins for the 256 bytes, two specials, and one merged token."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    alphabet = [chr(byte if byte in prints else next(spare)) for byte in range(256)]
    # A tokenizer of this kind without any merge is refused.
    return [*alphabet, _BEGIN, _END, "th"]


def _keys(tokens: Sequence[str]) -> list[bytes]:
    kinds = [_CONTROL if token in (_BEGIN, _END) else _NORMAL for token in tokens]
    numbers = {
        "llama.context_length": _CONTEXT,
        "llama.embedding_length": _WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": _FEED_FORWARD,
        "llama.attention.head_count": _HEADS,
        "llama.attention.head_count_kv": _HEADS,
        "llama.rope.dimension_count": _WIDTH // _HEADS,
        "tokenizer.ggml.bos_token_id": tokens.index(_BEGIN),
        "tokenizer.ggml.eos_token_id": tokens.index(_END),
        "general.file_type": 0,
    }
    texts = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
    }
    return [
        *(_key(name, _STRING, _text(value)) for name, value in texts.items()),
        *(_key(name, _U32, struct.pack("<I", value)) for name, value in numbers.items()),
        _key("llama.attention.layer_norm_rms_epsilon", _F32, struct.pack("<f", 1e-5)),
        _list("tokenizer.ggml.tokens", _STRING, (_text(token) for token in tokens), len(tokens)),
        _list("tokenizer.ggml.token_type", _I32, (struct.pack("<i", kind) for kind in kinds), len(kinds)),
        _list("tokenizer.ggml.merges", _STRING, [_text("t h")], 1),
        _key("tokenizer.ggml.add_bos_token", _BOOL, b"\1"),
    ]


def _tensors(tokens: Sequence[str]) -> list[tuple[str, tuple[int, ...], array[float]]]:
    chance = random.Random(1)  # noqa: S311 - for weights

    def matrix(columns: int, rows: int, spread: float) -> array[float]:
        return array("f", (chance.gauss(0.0, spread) for _ in range(columns * rows)))

    def ones() -> array[float]:
        return array("f", [1.0] * _WIDTH)

    def query_or_key() -> array[float]:
        # The first head asks for nothing in particular: it sees the mean of all that was said.
        weights = matrix(_WIDTH, _WIDTH, small)
        weights[: _WIDTH * (_WIDTH // _HEADS)] = array("f", bytes(4 * _WIDTH * (_WIDTH // _HEADS)))
        return weights

    square, small = (_WIDTH, _WIDTH), _WIDTH**-0.5
    output = matrix(_WIDTH, len(tokens), _LOGIT_SPREAD * small)
    for number, token in enumerate(tokens):
        # Rows of zeros have a logit of 0, far below the best of the others: they are never said.
        if not (len(token) == 1 and token.isascii() and token.isalnum()):
            output[number * _WIDTH : (number + 1) * _WIDTH] = array("f", bytes(4 * _WIDTH))
    return [
        ("token_embd.weight", (_WIDTH, len(tokens)), matrix(_WIDTH, len(tokens), 1.0)),
        ("blk.0.attn_norm.weight", (_WIDTH,), ones()),
        ("blk.0.attn_q.weight", square, query_or_key()),
        ("blk.0.attn_k.weight", square, query_or_key()),
        ("blk.0.attn_v.weight", square, matrix(_WIDTH, _WIDTH, small * _ATTENTION_GAIN)),
        ("blk.0.attn_output.weight", square, matrix(_WIDTH, _WIDTH, small * _ATTENTION_GAIN)),
        ("blk.0.ffn_norm.weight", (_WIDTH,), ones()),
        ("blk.0.ffn_gate.weight", (_WIDTH, _FEED_FORWARD), matrix(_WIDTH, _FEED_FORWARD, small)),
        ("blk.0.ffn_up.weight", (_WIDTH, _FEED_FORWARD), matrix(_WIDTH, _FEED_FORWARD, small)),
        (
            "blk.0.ffn_down.weight",
            (_FEED_FORWARD, _WIDTH),
            matrix(_FEED_FORWARD, _WIDTH, _FEED_FORWARD**-0.5),
        ),
        ("output_norm.weight", (_WIDTH,), ones()),
        ("output.weight", (_WIDTH, len(tokens)), output),
    ]


def _bytes(values: array[float]) -> bytes:
    if sys.byteorder == "big":
        values = array("f", values)
        values.byteswap()
    return values.tobytes()


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % _ALIGNMENT)


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _key(name: str, kind: int, value: bytes) -> bytes:
    return _text(name) + struct.pack("<I", kind) + value


def _list(name: str, kind: int, values: Iterable[bytes], length: int) -> bytes:
    return _key(name, _ARRAY, struct.pack("<IQ", kind, length) + b"".join(values))
