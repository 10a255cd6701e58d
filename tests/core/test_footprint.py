"""What an instance will take: by place, by flag, and how much context fits a budget."""

from __future__ import annotations

import shlex
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.footprint import MIB, Footprint, estimate, largest_context
from llamesh.core.memory_arguments import read_memory_arguments
from llamesh.core.model_header import GgufHeader, Number, Tensor

F32, F16, Q4_0, Q4_1 = 0, 1, 2, 3


def header(
    architecture: str = "llama", *, layers: int = 4, experts: int = 0, kind: int = F16, **numbers: Any
) -> GgufHeader:
    """A model of width 512, with a feed-forward part (or experts) of 2048 and 1000 tokens."""

    def tensor(name: str, rows: int, layer: int | None, times: int = 1) -> Tensor:
        size = {F32: 4 * 512, F16: 2 * 512, Q4_0: 512 // 32 * 18, Q4_1: 512 // 32 * 20}[kind]
        shape = (512, rows) if times == 1 else (512, rows, times)
        return Tensor(name, kind, shape, rows * times * size, layer)

    tensors = [tensor("token_embd.weight", 1000, None)]
    for n in range(layers):
        for name, rows in (("attn_q", 512), ("attn_k", 256), ("attn_v", 256), ("attn_output", 512)):
            tensors.append(tensor(f"blk.{n}.{name}.weight", rows, n))
        for name in ("ffn_up", "ffn_gate", "ffn_down"):
            if experts:
                tensors.append(tensor(f"blk.{n}.{name}_exps.weight", 2048, n, experts))
            else:
                tensors.append(tensor(f"blk.{n}.{name}.weight", 2048, n))
    tensors.append(tensor("output.weight", 1000, None))
    found: dict[str, Number] = {
        "block_count": layers,
        "context_length": 32768,
        "embedding_length": 512,
        "feed_forward_length": 2048,
        "attention.head_count": 8,
        "attention.head_count_kv": 4,
        "expert_count": experts,
        "expert_used_count": 2 if experts else 0,
    }
    found |= {name.replace("__", "."): value for name, value in numbers.items()}
    return GgufHeader(architecture, numbers=found, vocabulary=1000, tensors=tuple(tensors))


LAYER = (512 + 256 + 256 + 512 + 3 * 2048) * 512 * 2
FEED_FORWARD = 3 * 2048 * 512 * 2
EMBEDDING = 1000 * 512 * 2
KV_TOKEN = 2 * 4 * 64 * 2  # of one layer


def of(line: str = "", *, gpu: bool = False, model: GgufHeader | None = None, **others: Any) -> Footprint:
    arguments = read_memory_arguments(shlex.split(line))
    return estimate(model or header(), arguments, gpu=gpu, **others)


# -- context and slots


@pytest.mark.parametrize(
    ("line", "context", "slots", "cells"),
    [
        ("", 32768, 4, 32768),
        ("-c 0", 32768, 4, 32768),
        ("-c 4096", 4096, 4, 4096),
        ("-c 1000", 1024, 4, 1024),
        ("-c 4096 -np 2", 4096, 2, 4096),
        ("-c 5000 -np 3", 5376, 3, 5376),
        ("-c 5000 -np 3 -kvu", 5120, 3, 5120),
        ("-c 1 -np 8", 2048, 8, 2048),
    ],
)
def test_context_and_slots(line: str, context: int, slots: int, cells: int) -> None:
    found = of(line)
    assert (found.context, found.slots) == (context, slots)
    assert found.kv_cpu == 4 * KV_TOKEN * cells


def test_a_file_that_does_not_say_its_context() -> None:
    assert of(model=header(context_length=0)).context == 4096


# -- by place


def test_without_a_gpu_all_is_on_the_host_and_weights_are_mapped() -> None:
    found = of("-c 4096")
    assert found.total_gpu == 0
    assert found.weights_cpu_mapped == 4 * LAYER + 2 * EMBEDDING
    assert found.weights_cpu == 0
    assert found.kv_cpu == 4 * KV_TOKEN * 4096
    parts = found.weights_cpu + found.weights_cpu_mapped + found.kv_cpu + found.compute_cpu
    assert found.total_cpu == parts + found.process_cpu
    assert of("-c 4096 -dev none", gpu=True) == found


def test_on_a_gpu_only_the_input_stays() -> None:
    found = of("-c 4096", gpu=True)
    assert found.weights_gpu == 4 * LAYER + EMBEDDING
    assert (found.weights_cpu, found.weights_cpu_mapped) == (0, EMBEDDING)
    assert (found.kv_gpu, found.kv_cpu) == (4 * KV_TOKEN * 4096, 0)
    assert found.compute_gpu == of("-c 4096").compute_cpu - 4 * 1000 * 4
    assert 0 < found.compute_cpu < found.compute_gpu
    assert found.process_gpu > 0


@pytest.mark.parametrize("gpu_layers", range(7))
def test_the_last_layers_go_first_and_the_output_before_them(gpu_layers: int) -> None:
    found = of(f"-c 4096 -ngl {gpu_layers}", gpu=True)
    there = max(0, min(gpu_layers - 1, 4))
    assert found.weights_gpu == there * LAYER + (EMBEDDING if gpu_layers else 0)
    assert found.weights_gpu + found.weights_cpu_mapped == 4 * LAYER + 2 * EMBEDDING
    assert found.kv_gpu == there * KV_TOKEN * 4096
    assert found.kv_gpu + found.kv_cpu == 4 * KV_TOKEN * 4096
    # What the CPU computes needs room there.
    assert (found.compute_cpu == of("-c 4096").compute_cpu) == (gpu_layers < 5)


def test_a_cache_kept_on_the_host() -> None:
    found = of("-c 4096 -nkvo", gpu=True)
    assert (found.kv_gpu, found.kv_cpu) == (0, 4 * KV_TOKEN * 4096)
    assert found.weights_gpu == of("-c 4096", gpu=True).weights_gpu


def test_tied_weights_are_on_both_sides() -> None:
    whole = header()
    tied = GgufHeader("llama", numbers=whole.numbers, vocabulary=1000, tensors=whole.tensors[:-1])
    found = of(model=tied, gpu=True)
    assert (found.weights_gpu, found.weights_cpu_mapped) == (4 * LAYER + EMBEDDING, EMBEDDING)
    assert of("-ngl 0", model=tied, gpu=True).weights_gpu == 0
    assert of(model=tied).weights_cpu_mapped == 4 * LAYER + EMBEDDING


def test_experts_and_feed_forward_parts_kept_on_the_host() -> None:
    moe = header(experts=8)
    every = 8 * FEED_FORWARD
    whole = of(model=moe, gpu=True)
    for line, layers in (("-cmoe", 4), ("-ncmoe 3", 3), ("-ot exps=CPU", 4), (r"-ot blk\.0\..*exps=CPU", 1)):
        found = of(line, model=moe, gpu=True)
        assert found.weights_gpu == whole.weights_gpu - layers * every
        assert found.weights_cpu_mapped == EMBEDDING + layers * every
        # Large batches are computed on the GPU all the same, with a copy of one tensor at a time.
        assert found.compute_gpu == whole.compute_gpu + every // 3
        assert of(f"{line} --no-op-offload", model=moe, gpu=True).compute_gpu == whole.compute_gpu
    dense = of("-ncffn 2", gpu=True)
    assert dense.weights_cpu_mapped == EMBEDDING + 2 * FEED_FORWARD
    assert of("-ncffn 2 -cmoe", model=moe, gpu=True) == of("-cmoe", model=moe, gpu=True)
    # The first pattern that fits decides; one that isn't a pattern is left out.
    mixed = of("-ot blk.0=CUDA0,exps=CPU -ot [=CPU", model=moe, gpu=True)
    assert mixed.weights_cpu_mapped == EMBEDDING + 3 * every
    assert of("-ot token_embd=CUDA0", gpu=True).weights_cpu_mapped == 0


def test_weights_in_memory_of_the_process() -> None:
    assert of("--no-mmap").weights_cpu == 4 * LAYER + 2 * EMBEDDING
    assert of("-lm none").weights_cpu_mapped == 0
    quantised = header(kind=Q4_0)
    found = of(model=quantised)
    # A CPU wants these in another order; the embedding is only looked up in.
    assert found.weights_cpu_mapped == 1000 * 512 // 32 * 18
    assert found.weights_cpu == quantised.weight_bytes - found.weights_cpu_mapped
    assert of("--no-repack", model=quantised).weights_cpu == 0
    assert of(model=header(kind=Q4_1)).weights_cpu == 0


# -- compute buffers


def test_compute_grows_with_the_micro_batch_and_what_it_looks_at() -> None:
    def compute(line: str, **others: Any) -> int:
        return of(line, **others).compute_cpu

    # Fitted values, exactly: the mask in float16, and three rows of 2048, five of 512 and ten numbers.
    outputs = 4 * 1000 * 4
    assert compute("-c 8192") == outputs + 512 * 8192 * 2 + 512 * (3 * 2048 + 5 * 512 + 10) * 4
    assert compute("-c 8192 -ub 128") == outputs + 128 * 8192 * 2 + 128 * (3 * 2048 + 5 * 512 + 10) * 4
    assert compute("-c 8192 -ub 4096") == compute("-c 8192 -ub 2048")  # -b is 2048
    assert compute("-c 8192 -ub 4096 -b 4096") > compute("-c 8192 -ub 2048")
    assert compute("-c 256") == outputs + 256 * 256 * 2 + 256 * (3 * 2048 + 5 * 512 + 10) * 4
    # Without flash attention, the scores of all heads.
    scores = 512 * 8192 * 8 * 4
    assert scores < compute("-c 8192 -fa off") < 2 * scores
    # Embeddings come out for each token, and older engines reserve as much for text.
    wide = GgufHeader("llama", numbers=header().numbers, vocabulary=100_000, tensors=header().tensors)
    rows = 512 * 100_000 * 4
    assert compute("--embedding -c 8192", model=wide) > rows > compute("-c 8192", model=wide)
    assert compute("-c 8192", model=wide, all_outputs=True) == compute("--embedding -c 8192", model=wide)


def test_windows_and_experts_take_part() -> None:
    windowed = header("gemma3", attention__sliding_window=512)
    extra = of("-c 8192", model=windowed).compute_cpu - of("-c 8192").compute_cpu
    assert extra == 512 * (4 * 512 + 512) * 2
    moe = header(experts=8)
    assert of(model=moe).compute_cpu - of().compute_cpu == 512 * 3 * 2048 * 4


def test_a_model_without_attention_has_no_mask() -> None:
    mamba = GgufHeader(
        "mamba",
        numbers={"block_count": 2, "embedding_length": 512, "context_length": 8192, "ssm.inner_size": 1024},
        tensors=tuple(Tensor(f"blk.{n}.ssm_in.weight", 0, (1,), 4, n) for n in range(2)),
    )
    assert of(model=mamba).compute_cpu == of("-c 65536", model=mamba).compute_cpu


def test_encoders_look_at_their_own_batch_only() -> None:
    bert = header("bert", attention__causal=0, context_length=512)
    found = of("--embedding", model=bert)
    assert found.kv_cpu == found.prompt_cache_cpu == 0
    assert found.compute_cpu == of("--embedding -c 4096", model=bert).compute_cpu


# -- what comes beside


def test_a_draft_model_has_the_same_context() -> None:
    small = header(layers=1)
    alone = of("-c 4096 -md d", gpu=True)
    both = of("-c 4096 -md d", gpu=True, draft=small)
    assert both.weights_gpu - alone.weights_gpu == LAYER + EMBEDDING
    assert both.kv_gpu - alone.kv_gpu == KV_TOKEN * 4096
    assert both.compute_gpu > alone.compute_gpu
    assert both.process_gpu == alone.process_gpu
    assert (both.context, both.slots) == (alone.context, alone.slots)
    assert both.prompt_cache_cpu == alone.prompt_cache_cpu
    on_host = of("-c 4096 -md d -devd none -ctkd q8_0", gpu=True, draft=small)
    assert on_host.weights_gpu == alone.weights_gpu
    assert on_host.kv_cpu == KV_TOKEN * 4096 * (64 + 34) // 128


def test_a_projector_and_adapters() -> None:
    clip = GgufHeader(
        "clip",
        numbers={
            "vision.image_size": 448,
            "vision.patch_size": 14,
            "vision.embedding_length": 1024,
            "vision.feed_forward_length": 4096,
        },
        tensors=(Tensor("v.blk.0.ffn_up.weight", F16, (10, 10), 600 * MIB, None),),
    )
    alone = of(gpu=True)
    there = of("-mm p", gpu=True, projector=clip)
    assert there.weights_gpu - alone.weights_gpu == 600 * MIB
    assert there.compute_gpu - alone.compute_gpu == 32 * 32 * (3 * 4096 + 5 * 1024) * 4
    here = of("-mm p --no-mmproj-offload", gpu=True, projector=clip)
    assert here.weights_gpu == alone.weights_gpu
    assert here.weights_cpu - alone.weights_cpu == 600 * MIB
    assert of("--lora a", gpu=True, adapter_bytes=7).weights_gpu == alone.weights_gpu + 7
    assert of("--lora a", adapter_bytes=7).weights_cpu == 7


def test_the_prompt_cache_is_a_ceiling_beside_the_totals() -> None:
    found = of("-c 4096")
    assert found.prompt_cache_cpu == 8192 * MIB
    assert found.total_cpu == of("-c 4096 -cram 0").total_cpu
    assert of("-c 4096 -cram 0").prompt_cache_cpu == 0
    assert of("-c 4096 -cram 100").prompt_cache_cpu == 100 * MIB
    assert of("-c 4096 -cram -1").prompt_cache_cpu == 4 * KV_TOKEN * 4096
    assert of("--embedding").prompt_cache_cpu == 0
    # Checkpoints of what can't be rewound, for each slot.
    windowed = header("gemma3", attention__sliding_window=512, layers=6)
    window = of("-cram 0 -ctxcp 1", model=windowed).prompt_cache_cpu
    assert window == 5 * KV_TOKEN * 2560
    assert of("-cram 0", model=windowed).prompt_cache_cpu == 32 * window
    assert of("-cram 0 --swa-full", model=windowed).prompt_cache_cpu == 0


def test_footprints_add_up() -> None:
    one, two = of("-c 4096", gpu=True), of("-c 8192")
    both = one + two
    assert both.total_gpu == one.total_gpu
    assert both.total_cpu == one.total_cpu + two.total_cpu
    assert (both.context, both.slots) == (4096, 4)


# -- the largest context


def test_the_whole_context_where_it_fits() -> None:
    need = of("")
    assert largest_context(header(), read_memory_arguments([]), None, need.total_cpu) == 32768
    assert largest_context(header(), read_memory_arguments([]), None, None) == 32768
    assert largest_context(header(context_length=1000), read_memory_arguments([]), None, None) == 1000


def test_as_much_as_fits_and_not_a_group_more() -> None:
    for gpu in (False, True):
        for budget_mib in (40, 60, 64, 80, 100, 700):
            budget = budget_mib * MIB + (of("", gpu=True).process_gpu if gpu else 0)
            found = largest_context(
                header(),
                read_memory_arguments([]),
                budget if gpu else None,
                None if gpu else budget,
                floor=256,
            )
            if found is None:
                lowest = of("-c 256", gpu=gpu)
                assert (lowest.total_gpu if gpu else lowest.total_cpu) > budget
                continue
            fits, more = of(f"-c {found}", gpu=gpu), of(f"-c {found + 256}", gpu=gpu)
            assert (fits.total_gpu if gpu else fits.total_cpu) <= budget
            assert found == 32768 or (more.total_gpu if gpu else more.total_cpu) > budget
            assert found % 256 == 0


def test_below_the_floor_is_not_worth_it() -> None:
    arguments = read_memory_arguments([])
    at_floor = of("-c 8192").total_cpu
    assert largest_context(header(), arguments, None, at_floor) == 8192
    assert largest_context(header(), arguments, None, at_floor - 1) is None
    assert largest_context(header(), arguments, None, at_floor - 1, floor=4096) == 7936
    # A model that was trained with less than the floor: all or nothing.
    short = header(context_length=2048)
    whole = of("", model=short).total_cpu
    assert largest_context(short, arguments, None, whole) == 2048
    assert largest_context(short, arguments, None, whole - 1) is None


def test_both_budgets_count() -> None:
    arguments = read_memory_arguments(["-nkvo"])
    need = of("-c 16384 -nkvo", gpu=True)
    assert largest_context(header(), arguments, need.total_gpu, need.total_cpu) == 16384
    assert largest_context(header(), arguments, need.total_gpu - 1, need.total_cpu) != 16384
    assert largest_context(header(), arguments, 0, None) is None
    small = header(layers=1)
    beside = largest_context(header(), arguments, need.total_gpu, need.total_cpu, draft=small)
    assert beside is None or beside < 16384


# -- properties

COUNTS = st.sampled_from([0, 1, 2, 7, 64, 511, 4096, (1 << 32) - 1])
KEYS = st.sampled_from(
    [
        *("context_length", "embedding_length", "feed_forward_length", "attention.head_count"),
        *("attention.head_count_kv", "attention.key_length", "attention.sliding_window", "expert_used_count"),
        *("attention.sliding_window_pattern", "nextn_predict_layers", "attention.shared_kv_layers"),
        *("ssm.inner_size", "ssm.conv_kernel", "shortconv.l_cache", "kda.head_dim", "vision.patch_size"),
    ]
)
FLAGS = (
    *("-c 0", "-c 77", "-c 100000", "-np 1", "-np 5", "-kvu", "-no-kvu", "-ub 0", "-ub 9", "-b 1", "-ngl 0"),
    *("-ngl 1", "-ngl 3", "-fa off", "-nkvo", "-ctk q8_0", "-ctv q4_0", "--swa-full", "--embedding", "-cmoe"),
    *("-ncmoe 1", "--no-mmap", "-cram -1", "-dev none", "-md d"),
)
LINES = st.lists(st.sampled_from(FLAGS), max_size=6).map(" ".join)


@given(
    architecture=st.sampled_from(["llama", "gemma3", "gpt-oss", "bert", "mamba", "gemma3n", "llama4", "?"]),
    layers=st.integers(0, 5),
    numbers=st.dictionaries(KEYS, COUNTS | st.lists(COUNTS, max_size=6).map(tuple)),
    line=LINES,
    gpu=st.booleans(),
)
def test_whatever_a_file_says_the_answer_is_whole_and_not_negative(
    architecture: str, layers: int, numbers: dict[str, Number], line: str, gpu: bool
) -> None:
    of_file: dict[str, Any] = dict(numbers)
    model = header(architecture, layers=layers, **of_file)
    found = of(line, model=model, gpu=gpu, draft=model, projector=model)
    for field in fields(Footprint):
        value = getattr(found, field.name)
        assert type(value) is int, field.name
        assert value >= 0, field.name
    assert found.weights_gpu + found.weights_cpu + found.weights_cpu_mapped >= model.weight_bytes


@given(line=LINES, gpu=st.booleans(), context=st.integers(1, 1 << 17), more=st.integers(0, 1 << 17))
def test_a_larger_context_never_needs_less(line: str, gpu: bool, context: int, more: int) -> None:
    small = of(f"{line} -c {context}", gpu=gpu)
    large = of(f"{line} -c {context + more}", gpu=gpu)
    assert small.total_gpu <= large.total_gpu
    assert small.total_cpu <= large.total_cpu
