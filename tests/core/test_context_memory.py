"""Keys, values, windows and recurrent states, against numbers that llama-server itself printed."""

from __future__ import annotations

from typing import Any

import pytest

from llamesh.core.context_memory import ContextShape, LayerMemory, layer_memory, window_cells
from llamesh.core.memory_arguments import MemoryArguments
from llamesh.core.model_header import GgufHeader, Number, Tensor, type_named

MIB = 1 << 20
F16 = MemoryArguments().cache_type_k


def shape(cells: int, **values: Any) -> ContextShape:
    """A cache that four slots share."""
    fields: dict[str, Any] = {"streams": 1, "slots": 4, "ubatch": 512, "type_k": F16, "type_v": F16}
    return ContextShape(cells=cells, **(fields | values))


def model(architecture: str = "llama", tensors: tuple[str, ...] = (), **numbers: Any) -> GgufHeader:
    """A model of width 512 with 8 heads, 4 of them with keys: `attention__x` is "attention.x"."""
    found: dict[str, Number] = {
        "block_count": 6,
        "embedding_length": 512,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
    }
    found |= {name.replace("__", "."): value for name, value in numbers.items()}
    return GgufHeader(
        architecture,
        numbers=found,
        tensors=tuple(Tensor(name, 0, (1,), 4, int(name.split(".")[1])) for name in tensors),
    )


def total(header: GgufHeader, cut: ContextShape) -> int:
    return sum(layer.cache + layer.state for layer in layer_memory(header, cut))


def test_plain_attention() -> None:
    """SmolLM2-135M: 180 MiB for 8192 cells, printed by llama-server; 95.62 as q8_0."""
    smol = model(block_count=30, embedding_length=576, attention__head_count=9, attention__head_count_kv=3)
    assert total(smol, shape(8192)) == 180 * MIB
    q8 = type_named("q8_0")
    assert total(smol, shape(8192, type_k=q8, type_v=q8)) == 180 * MIB * 34 // 64
    assert total(smol, shape(8192, type_k=q8)) == 90 * MIB + 90 * MIB * 34 // 64
    assert total(smol, shape(1024, streams=2, slots=2)) == 45 * MIB
    assert layer_memory(smol, shape(256))[0] == LayerMemory(cache=256 * 768, per_token=768)


@pytest.mark.parametrize(
    ("architecture", "cut", "mib"),
    [
        # Printed by llama-server for models of these shapes with a window of 512.
        ("gemma3", shape(8192), 20.5),
        ("gemma3", shape(8192, swa_full=True), 48),
        ("gemma3", shape(4096, streams=2, slots=2), 18),
        ("gemma3", shape(2816, streams=3, slots=3), 23.25),
        ("gemma2", shape(8192), 31.5),
        # Not in llama.cpp's list, so no window, whatever the file says.
        ("llama", shape(8192), 48),
        ("phi3", shape(8192), 48),
        ("exaone4", shape(8192), 48),
    ],
)
def test_windows(architecture: str, cut: ContextShape, mib: float) -> None:
    assert total(model(architecture, attention__sliding_window=512), cut) == mib * MIB


def test_a_window_is_not_wider_than_the_context() -> None:
    header = model("gemma3", attention__sliding_window=512)
    assert window_cells(header, shape(1024)) == 1024
    assert window_cells(header, shape(8192, ubatch=100)) == 2304
    assert window_cells(model(), shape(1024)) == 0


def test_where_the_windows_are() -> None:
    def windowed(architecture: str, **numbers: Any) -> str:
        layers = layer_memory(model(architecture, block_count=8, **numbers), shape(256))
        return "".join("w" if layer.windowed else "-" for layer in layers)

    assert windowed("gemma2") == "w-w-w-w-"  # llama.cpp assumes a window of 4096
    assert windowed("gemma3", attention__sliding_window=64) == "wwwww-ww"
    assert windowed("gemma3", attention__sliding_window=0) == "--------"
    assert windowed("llama4") == "www-www-"
    assert windowed("llama4", attention__sliding_window=0) == "--------"
    assert windowed("laguna", attention__sliding_window=64) == "-www-www"
    four: dict[str, Number] = {"attention__sliding_window": 64, "attention__sliding_window_pattern": 4}
    assert windowed("gpt-oss", **four) == "www-www-"
    listed: dict[str, Number] = {
        "attention__sliding_window": 64,
        "attention__sliding_window_pattern": (1, 0, 1),
    }
    assert windowed("gemma4", **listed) == "w-w-----"
    assert windowed("gpt-oss", attention__sliding_window=64, attention__sliding_window_pattern=0) == "w" * 8


def test_windows_with_heads_of_their_own_length() -> None:
    header = model(
        "gemma4",
        block_count=2,
        attention__sliding_window=256,
        attention__sliding_window_pattern=(1, 0),
        attention__head_count_kv=(8, 2),
        attention__key_length=512,
        attention__value_length=512,
        attention__key_length_swa=256,
        attention__value_length_swa=256,
    )
    small, whole = layer_memory(header, shape(4096))
    assert small.per_token == 8 * 256 * 2 * 2
    assert whole.per_token == 2 * 512 * 2 * 2
    assert small.cache == small.per_token * 1536  # four windows and a micro-batch
    assert whole.cache == whole.per_token * 4096


def test_layers_without_a_cache_of_their_own() -> None:
    def with_cache(header: GgufHeader) -> int:
        return sum(layer.cache > 0 for layer in layer_memory(header, shape(256)))

    assert with_cache(model("glm4moe", nextn_predict_layers=1)) == 5
    assert with_cache(model("gemma4", attention__shared_kv_layers=4)) == 2
    assert with_cache(model("gemma3n", block_count=35)) == 20
    assert with_cache(model("bert")) == 0
    assert with_cache(model(attention__head_count_kv=(4, 0, 4, 0, 4, 0))) == 3
    assert with_cache(model(nextn_predict_layers=9)) == 0


def test_latent_attention_keeps_one_row_for_both() -> None:
    deepseek = model(
        "deepseek2",
        block_count=61,
        attention__head_count=128,
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__value_length=512,
        attention__key_length_mla=192,
        attention__value_length_mla=128,
    )
    assert total(deepseek, shape(4096)) == 61 * 576 * 2 * 4096
    indexed = model(attention__indexer__key_length=128)
    assert layer_memory(indexed, shape(256))[0].per_token == (256 + 256 + 128) * 2


def test_recurrent_states() -> None:
    """0.89 MiB for four slots of a Mamba of three layers, 1024 wide inside, printed by llama-server."""
    mamba = model(
        "mamba",
        tuple(f"blk.{n}.ssm_in.weight" for n in range(3)),
        block_count=3,
        ssm__conv_kernel=4,
        ssm__inner_size=1024,
        ssm__state_size=16,
    )
    assert total(mamba, shape(8192)) == 3 * 4 * (3 * 1024 + 16 * 1024) * 4
    assert f"{total(mamba, shape(8192)) / MIB:.2f}" == "0.89"
    assert not any(layer.per_token for layer in layer_memory(mamba, shape(256)))


def test_states_of_other_kinds() -> None:
    def state(**numbers: Any) -> int:
        header = model("hybrid", ("blk.0.ssm_conv1d.weight",), block_count=1, **numbers)
        return layer_memory(header, shape(256, slots=1))[0].state

    assert state(wkv__head_size=64) == (2 * 512 + 512 * 64) * 4
    assert state(shortconv__l_cache=3) == 512 * 2 * 4
    assert state(kda__head_dim=128, ssm__conv_kernel=4) == (3 * 3 * 8 * 128 + 128 * 128 * 8) * 4
    grouped = {"ssm__conv_kernel": 4, "ssm__inner_size": 32, "ssm__state_size": 8, "ssm__group_count": 2}
    assert state(**grouped) == (3 * (32 + 2 * 2 * 8) + 32 * 8) * 4


def test_a_hybrid_has_each_where_its_tensors_are() -> None:
    header = model(
        "qwen3next",
        (
            "blk.0.attn_qkv.weight",  # linear attention: beside a state, these are no keys and values
            "blk.0.ssm_conv1d.weight",
            "blk.1.attn_k.weight",
            "blk.2.attn_k.weight",
            "blk.2.ssm_in.weight",
            "blk.3.ffn_up.weight",
            "blk.4.attn_qkv.weight",
            "blk.5.attn_kv_a_mqa.weight",
        ),
        ssm__conv_kernel=4,
        ssm__inner_size=8,
        ssm__state_size=8,
    )
    kinds = [(bool(layer.cache), bool(layer.state)) for layer in layer_memory(header, shape(256))]
    assert kinds == [(False, True), (True, False), (True, True), (False, False), (True, False), (True, False)]
