"""Which flags decide about memory, in all their spellings."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.core.memory_arguments import ALL_LAYERS, MemoryArguments, read_memory_arguments
from llamesh.core.model_header import GgmlType, type_named
from tests.support.engine import started

Q8 = type_named("q8_0")
Q4 = type_named("q4_0")


def read(line: str, **environ: str) -> MemoryArguments:
    """The arguments in a line, with LLAMA_ARG_* of these names."""
    return read_memory_arguments(
        shlex.split(line), {f"LLAMA_ARG_{name}": value for name, value in environ.items()}
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", {}),
        ("-c 4096", {"context": 4096}),
        ("--ctx-size 0", {"context": 0}),
        ("--ctx_size 512", {"context": 512}),
        ("-c 1 -c 2", {"context": 2}),
        ("--ctx-size=512", {"context": 512}),
        ("-np 8", {"slots": 8}),
        ("-np 8 -np -1", {"slots": 8}),
        ("--parallel 2 -kvu", {"slots": 2, "unified": True}),
        ("--no-kv-unified", {"unified": False}),
        ("-b 64 -ub 32", {"batch": 64, "ubatch": 32}),
        ("-fa", {}),
        ("-fa -c 9", {"context": 9}),
        ("-fa off", {"flash_attention": False}),
        ("--flash-attn auto", {}),
        ("-ctk q8_0 --cache-type-v Q4_0", {"cache_type_k": Q8, "cache_type_v": Q4}),
        ("-nkvo", {"kv_offload": False}),
        ("-nkvo -kvo", {}),
        ("--swa-full", {"swa_full": True}),
        ("--embeddings", {"whole_batch_outputs": True}),
        ("--reranking", {"whole_batch_outputs": True}),
        ("--pooling mean", {"whole_batch_outputs": True}),
        ("--pooling none", {}),
        ("--pooling none --embedding", {"whole_batch_outputs": True}),
        ("-ngl 20", {"gpu_layers": 20}),
        ("-ngl 0", {"gpu_layers": 0}),
        ("--n-gpu-layers all", {}),
        ("-ngl auto", {}),
        ("-ngl -1", {}),
        ("-dev none", {"use_devices": False}),
        ("-dev CUDA0,CUDA1", {}),
        ("--no-op-offload", {"op_offload": False}),
        ("-cmoe", {"cpu_expert_layers": ALL_LAYERS}),
        ("-ncmoe 12 -ncffn 3", {"cpu_expert_layers": 12, "cpu_feed_forward_layers": 3}),
        ("-ot exps=CPU,blk.1=CUDA0", {"overrides": (("exps", True), ("blk.1", False))}),
        ("-ot a=CPU -ot b=CPU", {"overrides": (("a", True), ("b", True))}),
        ("-lm none", {"mapped": False}),
        ("-lm mmap+mlock", {}),
        ("--no-mmap", {"mapped": False}),
        ("-nr", {"repack": False}),
        ("-cram 0", {"cache_ram_mib": 0}),
        ("--cache-ram -1", {"cache_ram_mib": -1}),
        ("--swa-checkpoints 3", {"checkpoints": 3}),
        ("-mm p.gguf", {"projector": "p.gguf"}),
        ("-mm p.gguf --no-mmproj", {}),
        ("--mmproj p --no-mmproj-offload", {"projector": "p", "projector_offload": False}),
        ("--lora a,b --lora c", {"adapters": ("a", "b", "c")}),
        ("-md d.gguf -ngld 3", {"draft": "d.gguf", "draft_gpu_layers": 3}),
        ("-ctkd q8_0 --spec-draft-type-v q4_0", {"draft_cache_type_k": Q8, "draft_cache_type_v": Q4}),
        ("--spec-draft-n-max 16 -devd none", {"draft_tokens": 16, "draft_use_devices": False}),
        # What llama-server refuses, or what has no value, counts as not given.
        ("-c", {}),
        ("-c many", {}),
        ("-c -5", {}),
        ("-c " + "9" * 5000, {}),
        ("-c ²", {}),
        ("-np 0", {}),
        ("-ctk q99", {}),
        ("-lm fast", {}),
        ("--unknown -c 7", {"context": 7}),
        ("--temp 0.5 --port 80 free words", {}),
    ],
)  # fmt: skip
def test_flags(line: str, expected: dict[str, Any]) -> None:
    assert read(line) == MemoryArguments(**expected)


def test_the_environment_counts_where_no_flag_does() -> None:
    assert read("", CTX_SIZE="2048", N_PARALLEL="2", CACHE_TYPE_K="q8_0", KV_OFFLOAD="0") == MemoryArguments(
        context=2048, slots=2, cache_type_k=Q8 or GgmlType("", 1, 1), kv_offload=False
    )
    assert read("-c 1024", CTX_SIZE="2048").context == 1024
    assert read("", CTX_SIZE="x", KV_OFFLOAD="maybe", OTHER="1") == MemoryArguments()


def test_arguments_of_the_draft_model() -> None:
    own = read("-c 4096 -np 2 -ngl 5 -ctk q8_0 -cmoe -ot x=CPU -mm p --embedding -md d -ngld 7 -ctvd q4_0")
    draft = own.for_draft()
    assert (draft.context, draft.slots, draft.gpu_layers) == (4096, 2, 7)
    assert (draft.cache_type_k.name, draft.cache_type_v.name) == ("f16", "q4_0")
    assert draft.cpu_expert_layers == draft.cache_ram_mib == draft.checkpoints == 0
    assert draft.overrides == ()
    assert draft.projector is None
    assert draft.draft is None
    assert not draft.whole_batch_outputs
    assert draft.use_devices
    assert not read("-dev none -md d").for_draft().use_devices
    assert read("-dev none -md d -devd CUDA1").for_draft().use_devices


WORDS = [
    "-c",
    "-np",
    "-ngl",
    "-fa",
    "-ot",
    "--lora",
    "-ctk",
    "--pooling",
    "-lm",
    "=",
    "-c=",
    "1",
    "-1",
    "x=y",
]


@given(st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=8)), max_size=12))
def test_nothing_raises(words: list[str]) -> None:
    found = read_memory_arguments(words)
    assert found.context is None or found.context >= 0
    assert found.slots is None or found.slots > 0


def test_llama_server_knows_these_flags(llama_server: Path) -> None:
    """Of each group of spellings one is in `--help`, so that a renamed flag is noticed."""
    with started(["--help"], binary=llama_server) as engine:
        engine.wait()
        said = engine.output()
    for spelling in (
        *("--ctx-size", "--parallel", "--kv-unified", "--batch-size", "--ubatch-size", "--flash-attn"),
        *("--cache-type-k", "--cache-type-v", "--no-kv-offload", "--swa-full", "--n-gpu-layers", "--device"),
        *(
            "--cpu-moe",
            "--n-cpu-moe",
            "--override-tensor",
            "--cache-ram",
            "--mmproj",
            "--model-draft",
            "--lora",
        ),
    ):
        assert spelling in said, spelling
