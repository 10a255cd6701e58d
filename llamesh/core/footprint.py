"""How much memory an instance will take, before it is started: an estimate from header and arguments.

Sources: llama.cpp b11434, `llama-model.cpp` (which tensor goes where), `llama-context.cpp` (batches, outputs,
reserved graphs), `server.cpp` and `server-context.cpp` (slots, prompt cache). Weights and caches follow its
rules exactly. Compute buffers depend on how its allocator packs a graph; the formula here was fitted to what
it reports on a CPU, for models of many widths, heads, experts, windows and batches: most are exact to a
percent, the others higher than the truth by up to a fifth of the buffer.

All sizes are bytes in whole numbers. What several GPUs hold counts together.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from llamesh.core.context_memory import (
    ContextShape,
    LayerMemory,
    has_cache,
    layer_memory,
    pad,
    window_cells,
)
from llamesh.core.memory_arguments import MemoryArguments
from llamesh.core.model_header import GgufHeader
from llamesh.core.weight_placement import Placement

__all__ = ["MIB", "Footprint", "estimate", "largest_context"]

MIB = 1 << 20

# llama-server's own choice, with one cache for all of them.
_AUTO_SLOTS = 4
_F32 = 4
# Where a file doesn't say what context the model was trained with, llama-server fails to start.
_UNKNOWN_CONTEXT = 4096

# What a process takes beside its model: code, threads, tables (measured: 6 MiB, with the embedded engine 21)
# and the vocabulary (measured: 15 MiB for 49,152 tokens).
_PROCESS = 16 * MIB
_PROCESS_PER_TOKEN = 320
# A GPU runtime's context, its kernels and work space aren't part of the engine's own account. An allowance,
# not a measurement: it depends on device and driver. Sensors see it, so the first start teaches the truth.
_DEVICE_PROCESS = 256 * MIB
_DEVICE_PROCESS_HOST = 128 * MIB


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by purpose and place.

    `weights_cpu` is memory of the process, `weights_cpu_mapped` the part of the file that it reads in place:
    it should stay in memory, but the system may drop and read it again. Weights on a GPU aren't counted
    for the host, though they pass through its page cache. `process_*` is what any process takes.

    `prompt_cache_cpu` is a ceiling: what the prompt cache (`--cache-ram`, 8192 MiB unless told otherwise)
    and the checkpoints may grow to as prompts come by. Nothing of it is there at the start, so the totals
    leave it out: take it as what an instance may still add, not as what it needs to run.

    `context` is in tokens, over all slots.
    """

    weights_gpu: int = 0
    weights_cpu: int = 0
    weights_cpu_mapped: int = 0
    kv_gpu: int = 0
    kv_cpu: int = 0
    compute_gpu: int = 0
    compute_cpu: int = 0
    process_gpu: int = 0
    process_cpu: int = 0
    prompt_cache_cpu: int = 0
    context: int = 0
    slots: int = 0

    @property
    def total_gpu(self) -> int:
        """What it needs of the GPUs."""
        return self.weights_gpu + self.kv_gpu + self.compute_gpu + self.process_gpu

    @property
    def total_cpu(self) -> int:
        """What it needs of the system's memory, the mapped weights that it computes with included."""
        return self.weights_cpu + self.weights_cpu_mapped + self.kv_cpu + self.compute_cpu + self.process_cpu

    def __add__(self, other: Footprint) -> Footprint:
        """Both in one process: bytes add up, context and slots stay this one's."""
        sums = {
            field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(Footprint)
        }
        return replace(Footprint(**sums), context=self.context, slots=self.slots)


def estimate(
    header: GgufHeader,
    arguments: MemoryArguments,
    *,
    gpu: bool,
    draft: GgufHeader | None = None,
    projector: GgufHeader | None = None,
    adapter_bytes: int = 0,
    all_outputs: bool = False,
) -> Footprint:
    """What an instance of the model in `header` takes with these arguments.

    `gpu`: whether there is one that its engine can use. `draft`, `projector` and `adapter_bytes` are those
    that `arguments` name (`-md`, `--mmproj`, the sizes of `--lora` files); None where they can't be read yet,
    which leaves them out. `all_outputs`: for engines built before llama.cpp limited its outputs (in 2026),
    which reserve the logits of a whole micro-batch.
    """
    # With --gpu-layers 0 as well: the engine still computes large batches there.
    gpu = gpu and arguments.use_devices
    found = _model(
        header, arguments, gpu=gpu, all_outputs=all_outputs, speculative=arguments.draft is not None
    )
    if draft is not None:
        own = replace(arguments.for_draft(), context=found.context)
        on_gpu = gpu and own.use_devices
        found += _model(draft, own, gpu=on_gpu, all_outputs=all_outputs, speculative=False)
    if projector is not None:
        found += _projector(projector, gpu=gpu and arguments.projector_offload)
    return found + Footprint(
        weights_gpu=adapter_bytes if gpu else 0,
        weights_cpu=0 if gpu else adapter_bytes,
        process_gpu=_DEVICE_PROCESS if gpu else 0,
        process_cpu=_PROCESS + (_DEVICE_PROCESS_HOST if gpu else 0),
    )


def largest_context(
    header: GgufHeader,
    arguments: MemoryArguments,
    budget_gpu: int | None,
    budget_cpu: int | None,
    floor: int = 8192,
    *,
    draft: GgufHeader | None = None,
    projector: GgufHeader | None = None,
    adapter_bytes: int = 0,
    all_outputs: bool = False,
) -> int | None:
    """The context to start with where the arguments name none: as much of the trained one as fits.

    Budgets are in bytes, None for "there is no GPU" and for "the system's memory isn't limited". A multiple
    of 256, or the trained context itself; None when not even `floor` tokens fit (or the trained context,
    where that is shorter).
    """

    def fits(context: int) -> bool:
        need = estimate(
            header,
            replace(arguments, context=context),
            gpu=budget_gpu is not None,
            draft=draft,
            projector=projector,
            adapter_bytes=adapter_bytes,
            all_outputs=all_outputs,
        )
        return (budget_gpu is None or need.total_gpu <= budget_gpu) and (
            budget_cpu is None or need.total_cpu <= budget_cpu
        )

    whole = header.context_length or _UNKNOWN_CONTEXT
    if fits(whole):
        return whole
    # In groups of 256 cells, which is how the engine rounds: `low` fits, `high` doesn't.
    low, high = -(-floor // 256), -(-whole // 256)
    if low >= high or not fits(low * 256):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * 256) else (low, middle)
    return low * 256


@dataclass(frozen=True, slots=True)
class _Plan:
    """What llama-server makes of the arguments for one model (`server.cpp`, `llama_context`)."""

    context: int
    slots: int
    layers: tuple[LayerMemory, ...]
    mask_cells: int  # that a token may look at, with those of a window beside those of the whole context
    score_cells: int  # that a head looks at in one layer, at most
    tokens: int  # of the largest micro-batch
    outputs: int  # rows of logits that are reserved for it
    output_rows: int  # rows of logits that are handed over


def _plan(header: GgufHeader, arguments: MemoryArguments, *, all_outputs: bool, speculative: bool) -> _Plan:
    slots = arguments.slots or _AUTO_SLOTS
    unified = arguments.slots is None or bool(arguments.unified)
    asked = arguments.context or header.context_length or _UNKNOWN_CONTEXT
    if unified:
        cells, streams = pad(asked), 1
    else:
        cells, streams = pad(max(pad(asked) // slots, 1)), slots
    causal = has_cache(header) and header.number("attention.causal", 1) != 0
    batch = min(arguments.batch, asked) if causal else arguments.batch
    ubatch = min(batch, arguments.ubatch or batch)
    tokens = min(cells * streams, ubatch)
    rows = slots * (1 + arguments.draft_tokens) if speculative else slots
    outputs = tokens if arguments.whole_batch_outputs or all_outputs else min(tokens, rows)
    shape = ContextShape(
        cells=cells,
        streams=streams,
        slots=slots,
        ubatch=ubatch,
        type_k=arguments.cache_type_k,
        type_v=arguments.cache_type_v,
        swa_full=arguments.swa_full,
    )
    layers = layer_memory(header, shape)
    if not has_cache(header):
        mask_cells = score_cells = tokens
    elif any(layer.per_token for layer in layers):
        mask_cells, score_cells = cells + window_cells(header, shape), cells
    else:
        mask_cells = score_cells = 0
    return _Plan(
        context=cells * streams,
        slots=slots,
        layers=layers,
        mask_cells=mask_cells,
        score_cells=score_cells,
        tokens=tokens,
        outputs=outputs,
        output_rows=rows,
    )


def _model(
    header: GgufHeader, arguments: MemoryArguments, *, gpu: bool, all_outputs: bool, speculative: bool
) -> Footprint:
    plan = _plan(header, arguments, all_outputs=all_outputs, speculative=speculative)
    placement = Placement(header, arguments, gpu=gpu)
    weights = placement.weights()
    kv_gpu = kv_cpu = 0
    for number, layer in enumerate(plan.layers):
        if arguments.kv_offload and not placement.layer_on_cpu(number):
            kv_gpu += layer.cache + layer.state
        else:
            kv_cpu += layer.cache + layer.state
    full = _compute(header, arguments, plan)
    # With everything on a GPU, the host holds what goes in (masks and embedded tokens) and what comes out.
    inputs = _mask(arguments, plan) + plan.tokens * (header.embedding_length + 10) * _F32
    handed_over = plan.output_rows * header.vocabulary * _F32
    partly = gpu and (placement.some_layers_on_cpu or kv_cpu > 0)
    return Footprint(
        weights_gpu=weights.gpu,
        weights_cpu=weights.cpu,
        weights_cpu_mapped=weights.cpu_mapped,
        kv_gpu=kv_gpu,
        kv_cpu=kv_cpu,
        compute_gpu=full + (weights.largest_moved if arguments.op_offload else 0) if gpu else 0,
        compute_cpu=handed_over + (full if partly or not gpu else inputs),
        process_cpu=header.vocabulary * _PROCESS_PER_TOKEN,
        prompt_cache_cpu=_prompt_cache(header, arguments, plan),
        context=plan.context,
        slots=plan.slots,
    )


def _mask(arguments: MemoryArguments, plan: _Plan) -> int:
    """Bytes of the attention masks: a value for each token of a batch and each cell that it may look at."""
    return plan.tokens * plan.mask_cells * (2 if arguments.flash_attention else _F32)


def _compute(header: GgufHeader, arguments: MemoryArguments, plan: _Plan) -> int:
    """Bytes of the compute buffer that is reserved for the largest micro-batch.

    The masks live through the whole graph. Beside them stands, for each token, the widest moment of a layer:
    the three rows of a feed-forward part (or of all chosen experts) or the logits, each with five rows of
    the model's width around it; or queries, keys and values. Without flash attention also the scores.
    """
    width = header.embedding_length
    layers = range(header.block_count)
    queries = max((header.head_count(n) for n in layers), default=0) * header.key_length
    keys = max((header.head_count_kv(n) for n in layers), default=0) * header.key_length
    chosen = header.expert_used_count
    experts = chosen * header.number("expert_feed_forward_length", header.feed_forward_length)
    experts += header.number("expert_shared_feed_forward_length")
    wide = max(
        # Where experts are, a dense layer is an exception, but a wide one.
        3 * header.feed_forward_length,
        3 * experts if chosen else 0,
        2 * chosen * width,
        5 * header.number("ssm.inner_size"),
    )
    attention = plan.tokens * (2 * queries + 2 * keys + 3 * width)
    if header.block_count > 1:
        feed_forward = plan.tokens * (wide + 5 * width)
        logits = plan.outputs * header.vocabulary + plan.tokens * 5 * width
    else:
        # The last layer goes on with those rows only that are asked for, and here it is the first as well.
        feed_forward = plan.outputs * (wide + width)
        logits = plan.outputs * (header.vocabulary + 2 * width)
    if not arguments.flash_attention:
        heads = max((header.head_count(n) for n in layers), default=0)
        attention += plan.tokens * (heads * plan.score_cells + 2 * width)
    floats = max(feed_forward, logits, attention) + plan.tokens * 10
    return _mask(arguments, plan) + floats * _F32


def _prompt_cache(header: GgufHeader, arguments: MemoryArguments, plan: _Plan) -> int:
    """The most that prompts kept on the host may take (`server_prompt_cache`, context checkpoints).

    Without a limit in MiB (-1) the engine keeps as many tokens as its context has. A checkpoint holds what
    can't be rewound, the windows and recurrent states, and a slot has at most `--ctx-checkpoints` of them.
    """
    if arguments.whole_batch_outputs or not has_cache(header):
        return 0
    states = sum(layer.state for layer in plan.layers)
    ceiling = arguments.cache_ram_mib * MIB
    if ceiling < 0:
        ceiling = states + sum(layer.cache for layer in plan.layers)
    windows = 0 if arguments.swa_full else sum(layer.cache for layer in plan.layers if layer.windowed)
    return ceiling + arguments.checkpoints * (windows + states)


def _projector(header: GgufHeader, *, gpu: bool) -> Footprint:
    """A multimodal projector: its weights, and the rows of the patches of one image of its usual size.

    Sizes are those of `clip.vision.*` in its file. Models that take images of any size (qwen2vl and its like)
    need more for larger ones.
    """
    side = header.number("vision.image_size") // max(header.number("vision.patch_size"), 1)
    width = header.number("vision.embedding_length")
    row = 3 * header.number("vision.feed_forward_length") + 5 * width
    compute = side * side * row * _F32
    weights = header.weight_bytes
    if gpu:
        return Footprint(weights_gpu=weights, compute_gpu=compute)
    return Footprint(weights_cpu=weights, compute_cpu=compute)
