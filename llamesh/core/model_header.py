"""What a GGUF file says of its model, as plain values: nothing here reads a file.

Names of keys and their meaning are those of the GGUF specification and of llama.cpp's `llama-arch.cpp`;
sizes of tensor types those of its `ggml.h` and `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

__all__ = ["GGML_TYPES", "GgmlType", "GgufHeader", "Number", "Tensor", "row_bytes", "type_named"]

# A whole number, a bool as 0 or 1, or a short list of them (one for each layer, as a rule).
Number: TypeAlias = int | tuple[int, ...]


class GgmlType(NamedTuple):
    """How a tensor type is stored: `block` elements take `size` bytes."""

    name: str
    block: int
    size: int


# By the number that stands in the file (enum ggml_type). The gaps are types that were withdrawn.
GGML_TYPES: Mapping[int, GgmlType] = MappingProxyType(
    {
        0: GgmlType("f32", 1, 4),
        1: GgmlType("f16", 1, 2),
        2: GgmlType("q4_0", 32, 18),
        3: GgmlType("q4_1", 32, 20),
        6: GgmlType("q5_0", 32, 22),
        7: GgmlType("q5_1", 32, 24),
        8: GgmlType("q8_0", 32, 34),
        9: GgmlType("q8_1", 32, 36),
        10: GgmlType("q2_k", 256, 84),
        11: GgmlType("q3_k", 256, 110),
        12: GgmlType("q4_k", 256, 144),
        13: GgmlType("q5_k", 256, 176),
        14: GgmlType("q6_k", 256, 210),
        15: GgmlType("q8_k", 256, 292),
        16: GgmlType("iq2_xxs", 256, 66),
        17: GgmlType("iq2_xs", 256, 74),
        18: GgmlType("iq3_xxs", 256, 98),
        19: GgmlType("iq1_s", 256, 50),
        20: GgmlType("iq4_nl", 32, 18),
        21: GgmlType("iq3_s", 256, 110),
        22: GgmlType("iq2_s", 256, 82),
        23: GgmlType("iq4_xs", 256, 136),
        24: GgmlType("i8", 1, 1),
        25: GgmlType("i16", 1, 2),
        26: GgmlType("i32", 1, 4),
        27: GgmlType("i64", 1, 8),
        28: GgmlType("f64", 1, 8),
        29: GgmlType("iq1_m", 256, 56),
        30: GgmlType("bf16", 1, 2),
        34: GgmlType("tq1_0", 256, 54),
        35: GgmlType("tq2_0", 256, 66),
        39: GgmlType("mxfp4", 32, 17),
        40: GgmlType("nvfp4", 64, 36),
        41: GgmlType("q1_0", 128, 18),
        42: GgmlType("q2_0", 64, 18),
    }
)
_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}


def type_named(name: str) -> GgmlType | None:
    """The tensor type that llama-server's flags call `name` ("q8_0"); None for none."""
    return _BY_NAME.get(name.casefold())


def row_bytes(kind: GgmlType, elements: int) -> int:
    """Bytes of one row; a last block that isn't full takes a whole one."""
    return -(-elements // kind.block) * kind.size


class Tensor(NamedTuple):
    """One tensor: `shape` with the row length first, `size` in bytes, `layer` None outside the layers."""

    name: str
    kind: int
    shape: tuple[int, ...]
    size: int
    layer: int | None


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What was read of one model; of a split one, its parts together.

    `numbers` are the whole numbers among the architecture's keys, without its name in front:
    "attention.head_count" for "llama.attention.head_count". `vocabulary` counts tokens. `files` are the
    paths of the parts, in order, `file_bytes` their lengths together.
    """

    architecture: str
    version: int = 3
    numbers: Mapping[str, Number] = field(default_factory=dict)
    vocabulary: int = 0
    file_type: int | None = None
    tensors: tuple[Tensor, ...] = field(default=(), repr=False)
    files: tuple[str, ...] = ()
    file_bytes: int = 0

    def number(self, key: str, default: int = 0) -> int:
        """A key that holds one number. Of a list, its largest: what is planned for must be enough."""
        value = self.numbers.get(key)
        if isinstance(value, tuple):
            return max(value, default=default)
        return default if value is None else value

    def per_layer(self, key: str, layer: int, default: int = 0) -> int:
        """A key that holds one number for all layers, or a list with one for each."""
        value = self.numbers.get(key)
        if isinstance(value, tuple):
            return value[layer] if layer < len(value) else default
        return default if value is None else value

    @property
    def block_count(self) -> int:
        """Layers in the file, those for predicting several tokens included."""
        return self.number("block_count")

    @property
    def context_length(self) -> int:
        """Tokens of context that the model was trained for (`n_ctx_train`); 0: the file doesn't say."""
        return self.number("context_length")

    @property
    def embedding_length(self) -> int:
        """Width of the model, in elements."""
        return self.number("embedding_length")

    @property
    def feed_forward_length(self) -> int:
        """Width of the widest dense feed-forward layer, in elements."""
        return self.number("feed_forward_length")

    def head_count(self, layer: int) -> int:
        """Attention heads of a layer (query heads)."""
        return self.per_layer("attention.head_count", layer)

    def head_count_kv(self, layer: int) -> int:
        """Heads of a layer that have keys and values; 0 for a layer without attention."""
        return self.per_layer("attention.head_count_kv", layer, self.head_count(layer))

    @property
    def key_length(self) -> int:
        """Elements of one head's key."""
        return self.number("attention.key_length", self._head_length)

    @property
    def value_length(self) -> int:
        """Elements of one head's value."""
        return self.number("attention.value_length", self._head_length)

    @property
    def _head_length(self) -> int:
        # As llama.cpp does: the width over the heads of the first layer, which a hybrid may not have.
        heads = self.head_count(0) or self.number("attention.head_count")
        return self.embedding_length // heads if heads else 0

    @property
    def expert_count(self) -> int:
        """Experts of a layer; 0 for a dense model."""
        return self.number("expert_count")

    @property
    def expert_used_count(self) -> int:
        """Experts that one token passes through."""
        return self.number("expert_used_count")

    @property
    def sliding_window(self) -> int:
        """Tokens that layers with a window look back; 0 for none."""
        return self.number("attention.sliding_window")

    @property
    def rope_dimensions(self) -> int:
        """Elements of a head that carry the position."""
        return self.number("rope.dimension_count", self.key_length)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def layer_bytes(self) -> dict[int | None, int]:
        """Bytes of the tensors of each layer; under None those outside the layers."""
        sizes: dict[int | None, int] = {}
        for tensor in self.tensors:
            sizes[tensor.layer] = sizes.get(tensor.layer, 0) + tensor.size
        return sizes
