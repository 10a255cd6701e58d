"""Where the weights of a model lie: on the GPU, in the process, or in the mapped file."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from llamesh.core.memory_arguments import ALL_LAYERS, MemoryArguments
from llamesh.core.model_header import GGML_TYPES, GgufHeader, Tensor

__all__ = ["Placement", "Weights"]

_INPUTS = re.compile(r"(?:token_embd|position_embd|token_types|per_layer_token_embd)")
# common.h: LLM_FFN_EXPS_REGEX and its dense sibling.
_EXPERTS = re.compile(r"\.ffn_(?:up|down|gate|gate_up)_(?:ch)?exps")
_FEED_FORWARD = re.compile(r"\.ffn_(?:up|down|gate|gate_up)\.")
# Types that a CPU gets in another order, in memory of their own and no longer in the mapped file
# (ggml-cpu/repack.cpp). It depends on the CPU; the sum is the same either way.
_REPACKED = frozenset(
    number for number, kind in GGML_TYPES.items() if kind.name in ("q4_0", "q4_k", "q2_k", "iq4_nl", "mxfp4")
)


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of weights by place, as in `Footprint`.

    `largest_moved`: the largest tensor of a layer that stays with the CPU beside a GPU. Large batches copy
    such tensors over, one after the other.
    """

    gpu: int
    cpu: int
    cpu_mapped: int
    largest_moved: int


class Placement:
    """Which layers and tensors stay with the CPU (`llama_model_base::load_tensors`).

    The first layers do, as many as `--gpu-layers` leaves; the embedding of the input always does. Single
    tensors are moved by `-ot`, `--cpu-moe` and their like.
    """

    def __init__(self, header: GgufHeader, arguments: MemoryArguments, *, gpu: bool) -> None:
        self._header = header
        self._arguments = arguments
        self._gpu = gpu
        # The layers are filled from the last one on; the output counts as one more at the end.
        self._first = max(header.block_count + 1 - arguments.gpu_layers, 0) if gpu else ALL_LAYERS
        self._overrides = tuple(_compiled(arguments.overrides))

    @property
    def some_layers_on_cpu(self) -> bool:
        """Whether at least one whole layer is computed by the CPU."""
        return self._first > 0

    def layer_on_cpu(self, number: int) -> bool:
        """Whether the CPU computes a layer, and keeps its cache. The output counts as one behind the last."""
        return number < self._first

    def weights(self) -> Weights:
        """Bytes of all tensors by place."""
        header, arguments = self._header, self._arguments
        on_gpu = own = mapped = moved = 0
        tied = not any(tensor.name == "output.weight" for tensor in header.tensors)
        for tensor in header.tensors:
            if not self._on_cpu(tensor):
                on_gpu += tensor.size
                continue
            inputs = _INPUTS.match(tensor.name)
            if not arguments.mapped or (
                arguments.repack and tensor.kind in _REPACKED and len(tensor.shape) > 1 and not inputs
            ):
                own += tensor.size
            else:
                mapped += tensor.size
            if tensor.name == "token_embd.weight" and tied and not self.layer_on_cpu(header.block_count):
                on_gpu += tensor.size  # the output uses the same weights, and has its own copy there
            if self._gpu and tensor.layer is not None:
                moved = max(moved, tensor.size)
        return Weights(on_gpu, own, mapped, moved)

    def _on_cpu(self, tensor: Tensor) -> bool:
        if not self._gpu:
            return True
        for pattern, to_cpu in self._overrides:
            if pattern.search(tensor.name):
                return to_cpu
        arguments = self._arguments
        if tensor.layer is not None and tensor.layer < self._header.block_count:
            number = tensor.layer
            if number < arguments.cpu_expert_layers and _EXPERTS.search(tensor.name):
                return True
            if number < arguments.cpu_feed_forward_layers and _FEED_FORWARD.search(tensor.name):
                return True
            return self.layer_on_cpu(number)
        return bool(_INPUTS.match(tensor.name)) or self.layer_on_cpu(self._header.block_count)


def _compiled(overrides: Iterable[tuple[str, bool]]) -> Iterable[tuple[re.Pattern[str], bool]]:
    for pattern, to_cpu in overrides:
        try:
            yield re.compile(pattern), to_cpu
        except re.error:
            continue  # llama-server's expressions are a little different: leave out what doesn't read
