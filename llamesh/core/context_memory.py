"""How many bytes a model's context takes: keys and values, windows, recurrent states, layer by layer.

From llama.cpp (b11434): `llama-kv-cache.cpp`, `llama-kv-cache-iswa.cpp`, `llama-memory-recurrent.cpp`,
`llama_model::create_memory` and the `load_arch_hparams` of its models.

Where an architecture does something of its own that isn't known here, the answer is an upper bound: every
layer holds keys and values for the whole context. So it is for chunked and compressed attention
(deepseek4, kimi-k3) and for windows of architectures that aren't in the table below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llamesh.core.model_header import GgmlType, GgufHeader, row_bytes

__all__ = ["ContextShape", "LayerMemory", "has_cache", "layer_memory", "pad", "window_cells"]

# A cache has a multiple of so many cells (llama_context, llama_kv_cache_iswa).
CELLS = 256

# Architectures that keep nothing between two batches (encoders, diffusion).
_WITHOUT_CACHE = frozenset(
    {
        *("bert", "eurobert", "jina-bert-v2", "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert"),
        *(
            "nomic-bert-moe",
            "gemma-embedding",
            "wavtokenizer-dec",
            "clef",
            "dream",
            "llada",
            "llada-moe",
            "rnd1",
        ),
    }
)
# Every how many layers one looks back without a window, where the file doesn't list them; True: the first of
# each group, else the last.
_FULL_LAYER_EVERY: dict[str, tuple[int, bool]] = {
    "afmoe": (4, False),
    "cohere2": (4, False),
    "cohere2moe": (4, True),
    "exaone-moe": (4, False),
    "exaone4": (4, False),
    "gemma2": (2, False),
    "gemma3": (6, False),
    "gemma3n": (5, False),
    "gpt-oss": (2, False),
    "laguna": (4, True),
    "llama4": (4, False),
    "mellum": (4, False),
    "muse-glimmer": (4, False),
    "olmo2": (4, False),
    "plamo3": (8, False),
    "smallthinker": (4, True),
}
# Windows that llama.cpp assumes where the file says nothing.
_ASSUMED_WINDOW = {"gemma2": 4096, "llama4": 8192}
_EXAONE4_LAYERS_WITH_WINDOW = 64  # the smaller ones have none
_GEMMA3N_LAYERS_WITH_CACHE = 20

_RECURRENT = re.compile(r"\.(?:ssm_|time_mix_|shortconv\.)")
_ATTENTION = re.compile(r"\.attn_(?:k|kv|v|q)(?:[._]|$)")
_FUSED_ATTENTION = re.compile(r"\.attn_qkv\.")
_F32_SIZE = 4


@dataclass(frozen=True, slots=True)
class ContextShape:
    """How the cache is cut: `cells` tokens for each of `streams` sequences, `slots` in all.

    One stream where the slots share one cache (`--kv-unified`), else one for each slot.
    """

    cells: int
    streams: int
    slots: int
    ubatch: int
    type_k: GgmlType
    type_v: GgmlType
    swa_full: bool = False


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of one layer: keys and values, the state that doesn't grow, and what one token adds.

    `windowed`: the keys and values are those of a window.
    """

    cache: int = 0
    state: int = 0
    per_token: int = 0
    windowed: bool = False


def pad(tokens: int) -> int:
    """Rounded up to whole groups of cells."""
    return -(-tokens // CELLS) * CELLS


def has_cache(header: GgufHeader) -> bool:
    """Whether the model keeps anything between two batches at all."""
    return header.architecture not in _WITHOUT_CACHE


def window_cells(header: GgufHeader, shape: ContextShape) -> int:
    """Cells of the layers with a window, for each stream; 0 when no layer has one."""
    if not any(_windows(header)):
        return 0
    if shape.swa_full:
        return shape.cells
    window = _window(header) * (shape.slots if shape.streams == 1 else 1)
    return pad(min(shape.cells, window + shape.ubatch))


def layer_memory(header: GgufHeader, shape: ContextShape) -> tuple[LayerMemory, ...]:
    """What each layer of the file takes, in order."""
    if not has_cache(header):
        return (LayerMemory(),) * header.block_count
    recurrent, attentive = _kinds(header)
    windows = _windows(header)
    own_cache = _layers_with_cache(header)
    small = window_cells(header, shape)
    state = _state_bytes(header)
    found = []
    for layer in range(header.block_count):
        token = 0
        if layer < own_cache and (not recurrent or layer in attentive):
            token = _token_bytes(header, layer, shape, windowed=windows[layer])
        cells = small if windows[layer] else shape.cells
        found.append(
            LayerMemory(
                cache=token * cells * shape.streams,
                state=state * shape.slots if layer in recurrent else 0,
                per_token=token,
                windowed=windows[layer],
            )
        )
    return tuple(found)


def _layers_with_cache(header: GgufHeader) -> int:
    """Layers from the first one on that have a cache of their own: the rest predict ahead or share."""
    layers = header.block_count - header.number("nextn_predict_layers")
    if header.architecture == "gemma3n":
        return min(layers, _GEMMA3N_LAYERS_WITH_CACHE)
    return layers - header.number("attention.shared_kv_layers")


def _token_bytes(header: GgufHeader, layer: int, shape: ContextShape, *, windowed: bool) -> int:
    heads = header.head_count_kv(layer)
    key, value = header.key_length, header.value_length
    if windowed:
        key = header.number("attention.key_length_swa", key)
        value = header.number("attention.value_length_swa", value)
    size = row_bytes(shape.type_k, heads * key)
    # Latent attention (MLA) keeps one compressed row for both, under the key's length.
    if not header.number("attention.key_length_mla"):
        size += row_bytes(shape.type_v, heads * value)
    # Sparse attention keeps small keys of its indexer as well (counted for all layers: some have none).
    if indexer := header.number("attention.indexer.key_length"):
        size += row_bytes(shape.type_k, indexer)
    return size


def _window(header: GgufHeader) -> int:
    """Tokens that layers with a window look back; 0 when llama.cpp gives the architecture none."""
    name = header.architecture
    if name == "phi3" or (name == "exaone4" and header.block_count != _EXAONE4_LAYERS_WITH_WINDOW):
        return 0
    return header.number("attention.sliding_window", _ASSUMED_WINDOW.get(name, 0))


def _windows(header: GgufHeader) -> tuple[bool, ...]:
    """Which layers look back through a window only."""
    layers = header.block_count
    nowhere = (False,) * layers
    if not _window(header):
        return nowhere
    pattern = header.numbers.get("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return tuple(layer < len(pattern) and bool(pattern[layer]) for layer in range(layers))
    if header.architecture not in _FULL_LAYER_EVERY:
        return nowhere
    every, first = _FULL_LAYER_EVERY[header.architecture]
    every = every if pattern is None else pattern
    if every == 0:
        return (True,) * layers
    return tuple(layer % every != (0 if first else every - 1) for layer in range(layers))


def _kinds(header: GgufHeader) -> tuple[set[int], set[int]]:
    """Layers with a recurrent state, and those with keys and values, as their tensors show."""
    recurrent: set[int] = set()
    attentive: set[int] = set()
    fused: set[int] = set()
    for tensor in header.tensors:
        if tensor.layer is None:
            continue
        if _RECURRENT.search(tensor.name):
            recurrent.add(tensor.layer)
        elif _ATTENTION.search(tensor.name):
            attentive.add(tensor.layer)
        elif _FUSED_ATTENTION.search(tensor.name):
            fused.add(tensor.layer)
    # Linear attention has fused projections beside its state, and no keys and values.
    return recurrent, attentive | (fused - recurrent)


def _state_bytes(header: GgufHeader) -> int:
    """Bytes that one recurrent layer keeps for one slot (`n_embd_r` and `n_embd_s`), in float32."""
    width = header.embedding_length
    if head := header.number("wkv.head_size"):
        return (header.number("token_shift_count", 2) * width + width * head) * _F32_SIZE
    if length := header.number("shortconv.l_cache"):
        return width * (length - 1) * _F32_SIZE
    kernel = header.number("ssm.conv_kernel")
    if head := header.number("kda.head_dim"):
        heads = header.number("attention.head_count")
        return (3 * max(kernel - 1, 0) * heads * head + head * head * heads) * _F32_SIZE
    inner, state = header.number("ssm.inner_size"), header.number("ssm.state_size")
    convolution = max(kernel - 1, 0) * (inner + 2 * header.number("ssm.group_count") * state)
    return (convolution + inner * state) * _F32_SIZE
