"""What among llama-server's flags decides how much memory an instance takes.

Spellings, defaults and environment variables are those of `common/arg.cpp` and `common/common.h` of llama.cpp
(b11434, and the older names that earlier builds know). The last of repeated flags wins; a flag wins over its
variable; a value that llama-server will refuse counts as not given, since then nothing starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llamesh.core.model_header import GgmlType, type_named

__all__ = ["ALL_LAYERS", "MemoryArguments", "read_memory_arguments"]

# More layers than any model has: "all of them".
ALL_LAYERS = 1 << 20
_F16 = GgmlType("f16", 1, 2)


@dataclass(frozen=True, slots=True)
class MemoryArguments:
    """The flags that matter, with llama-server's own defaults. Names of files are as written.

    `context` in tokens: None where nothing was said, 0 for what the model was trained with. `slots` None:
    llama-server chooses (4 slots over one cache). `gpu_layers` counts from the last layer, the output being
    the first of them. `overrides` are `-ot` patterns with whether they name the CPU.
    """

    context: int | None = None
    slots: int | None = None
    unified: bool | None = None
    batch: int = 2048
    ubatch: int = 512
    flash_attention: bool = True
    cache_type_k: GgmlType = _F16
    cache_type_v: GgmlType = _F16
    kv_offload: bool = True
    swa_full: bool = False
    whole_batch_outputs: bool = False  # embeddings and reranking: a result for each token, not for each slot
    gpu_layers: int = ALL_LAYERS
    use_devices: bool = True
    op_offload: bool = True
    cpu_expert_layers: int = 0
    cpu_feed_forward_layers: int = 0
    overrides: tuple[tuple[str, bool], ...] = ()
    mapped: bool = True
    repack: bool = True
    cache_ram_mib: int = 8192  # -1: no limit
    checkpoints: int = 32
    projector: str | None = None
    projector_offload: bool = True
    adapters: tuple[str, ...] = ()
    draft: str | None = None
    draft_tokens: int = 3
    draft_gpu_layers: int = ALL_LAYERS
    draft_use_devices: bool | None = None  # None: as the model's own
    draft_cache_type_k: GgmlType = _F16
    draft_cache_type_v: GgmlType = _F16
    draft_cpu_expert_layers: int = 0
    draft_overrides: tuple[tuple[str, bool], ...] = ()

    def for_draft(self) -> MemoryArguments:
        """These arguments as they hold for the draft model (`common_base_params_to_speculative`)."""
        return replace(
            self,
            gpu_layers=self.draft_gpu_layers,
            use_devices=self.use_devices if self.draft_use_devices is None else self.draft_use_devices,
            cache_type_k=self.draft_cache_type_k,
            cache_type_v=self.draft_cache_type_v,
            cpu_expert_layers=self.draft_cpu_expert_layers,
            cpu_feed_forward_layers=0,
            overrides=self.draft_overrides,
            whole_batch_outputs=False,
            cache_ram_mib=0,
            checkpoints=0,
            projector=None,
            adapters=(),
            draft=None,
        )


def read_memory_arguments(
    arguments: Sequence[str], environ: Mapping[str, str] | None = None
) -> MemoryArguments:
    """The arguments of a profile (already split), and of the environment that its child will have.

    Never raises: what isn't understood is left at its default.
    """
    given: dict[str, Any] = {}
    for variable, text in (environ or {}).items():
        if variable in _VARIABLES:
            _set(given, _VARIABLES[variable], text)
        elif variable in _SWITCH_VARIABLES and (on := _ON_OFF.get(text)) is not None:
            given[_SWITCH_VARIABLES[variable]] = on
    index = 0
    while index < len(arguments):
        word = arguments[index]
        name, equals, text = word.partition("=")
        flag = name.replace("_", "-") if name.startswith("--") else name
        index += 1
        if not equals and flag in _SWITCHES:
            field, value = _SWITCHES[flag]
            given[field] = value
        elif flag in _FLAGS:
            field = _FLAGS[flag]
            if not equals:
                following = arguments[index : index + 1]
                # Older builds know -fa without a value.
                if field == "flash_attention" and not (following and following[0] in _FLASH):
                    given[field] = True
                    continue
                text = "".join(following)
                index += 1
            _set(given, field, text)
    if given.pop("pooled", False):
        given["whole_batch_outputs"] = True
    return MemoryArguments(**given)


def _set(given: dict[str, Any], field: str, text: str) -> None:
    value = _READERS[field](text)
    if value is None:
        return
    if field in _LISTS:
        given[field] = given.get(field, ()) + value
    else:
        given[field] = value


def _whole(text: str) -> int | None:
    # What fits 32 bits, more or less: no text of thousands of digits is converted.
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 10):
        return None
    return int(text)


def _not_negative(text: str) -> int | None:
    number = _whole(text)
    return None if number is None or number < 0 else number


def _positive(text: str) -> int | None:
    return _not_negative(text) or None


def _layers(text: str) -> int | None:
    if text in ("auto", "all"):
        return ALL_LAYERS
    number = _whole(text)
    # -1 is an older spelling of "auto", and so is whatever else is negative.
    return ALL_LAYERS if number is not None and number < 0 else number


def _devices(text: str) -> bool:
    return text.strip() != "none"


def _load_mode(text: str) -> bool | None:
    return {"auto": True, "mmap": True, "mmap+mlock": True, "none": False, "mlock": False, "dio": False}.get(
        text
    )


def _overrides(text: str) -> tuple[tuple[str, bool], ...]:
    found = []
    for part in text.split(","):
        pattern, equals, buffer = part.partition("=")
        if equals:
            found.append((pattern, buffer == "CPU"))
    return tuple(found)


def _paths(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


def _path(text: str) -> str | None:
    return text or None


_ON_OFF = {
    **dict.fromkeys(("on", "enabled", "true", "1"), True),
    **dict.fromkeys(("off", "disabled", "false", "0"), False),
}
_FLASH = {**_ON_OFF, "auto": True}

# Repeated, these add up.
_LISTS = frozenset({"overrides", "draft_overrides", "adapters"})

_READERS: Mapping[str, Callable[[str], Any]] = {
    "context": _not_negative,
    "slots": _positive,
    "batch": _positive,
    "ubatch": _not_negative,
    "flash_attention": _FLASH.get,
    "cache_type_k": type_named,
    "cache_type_v": type_named,
    "pooled": lambda text: text != "none",
    "gpu_layers": _layers,
    "use_devices": _devices,
    "cpu_expert_layers": _not_negative,
    "cpu_feed_forward_layers": _not_negative,
    "overrides": _overrides,
    "mapped": _load_mode,
    "cache_ram_mib": _whole,
    "checkpoints": _not_negative,
    "projector": _path,
    "adapters": _paths,
    "draft": _path,
    "draft_tokens": _not_negative,
    "draft_gpu_layers": _layers,
    "draft_use_devices": _devices,
    "draft_cache_type_k": type_named,
    "draft_cache_type_v": type_named,
    "draft_cpu_expert_layers": _not_negative,
    "draft_overrides": _overrides,
}

# Flags with a value: the field, its spellings, its environment variable.
_WITH_VALUE = (
    ("context", "-c --ctx-size", "CTX_SIZE"),
    ("slots", "-np --parallel", "N_PARALLEL"),
    ("batch", "-b --batch-size", "BATCH"),
    ("ubatch", "-ub --ubatch-size", "UBATCH"),
    ("flash_attention", "-fa --flash-attn", "FLASH_ATTN"),
    ("cache_type_k", "-ctk --cache-type-k", "CACHE_TYPE_K"),
    ("cache_type_v", "-ctv --cache-type-v", "CACHE_TYPE_V"),
    ("pooled", "--pooling", "POOLING"),
    ("gpu_layers", "-ngl --gpu-layers --n-gpu-layers", "N_GPU_LAYERS"),
    ("use_devices", "-dev --device", "DEVICE"),
    ("cpu_expert_layers", "-ncmoe --n-cpu-moe", "N_CPU_MOE"),
    ("cpu_feed_forward_layers", "-ncffn --n-cpu-ffn", "N_CPU_FFN"),
    ("overrides", "-ot --override-tensor", "OVERRIDE_TENSOR"),
    ("mapped", "-lm --load-mode", "LOAD_MODE"),
    ("cache_ram_mib", "-cram --cache-ram", "CACHE_RAM"),
    ("checkpoints", "-ctxcp --ctx-checkpoints --swa-checkpoints", "CTX_CHECKPOINTS"),
    ("projector", "-mm --mmproj", "MMPROJ"),
    ("adapters", "--lora", None),
    ("draft", "-md --model-draft --spec-draft-model", "SPEC_DRAFT_MODEL"),
    ("draft_tokens", "--spec-draft-n-max --draft --draft-n --draft-max", None),
    (
        "draft_gpu_layers",
        "-ngld --gpu-layers-draft --n-gpu-layers-draft --spec-draft-ngl",
        "N_GPU_LAYERS_DRAFT",
    ),
    ("draft_use_devices", "-devd --device-draft --spec-draft-device", None),
    ("draft_cache_type_k", "-ctkd --cache-type-k-draft --spec-draft-type-k", "SPEC_DRAFT_CACHE_TYPE_K"),
    ("draft_cache_type_v", "-ctvd --cache-type-v-draft --spec-draft-type-v", "SPEC_DRAFT_CACHE_TYPE_V"),
    (
        "draft_cpu_expert_layers",
        "-ncmoed --n-cpu-moe-draft --spec-draft-ncmoe --spec-draft-n-cpu-moe",
        "SPEC_DRAFT_N_CPU_MOE",
    ),
    ("draft_overrides", "-otd --override-tensor-draft --spec-draft-override-tensor", None),
)
# Flags without: the field, what it becomes, the spellings.
_WITHOUT_VALUE: tuple[tuple[str, object, str], ...] = (
    ("unified", True, "-kvu --kv-unified"),
    ("unified", False, "-no-kvu --no-kv-unified"),
    ("kv_offload", True, "-kvo --kv-offload"),
    ("kv_offload", False, "-nkvo --no-kv-offload"),
    ("swa_full", True, "--swa-full"),
    ("whole_batch_outputs", True, "--embedding --embeddings --rerank --reranking"),
    ("op_offload", True, "--op-offload"),
    ("op_offload", False, "--no-op-offload"),
    ("cpu_expert_layers", ALL_LAYERS, "-cmoe --cpu-moe"),
    ("draft_cpu_expert_layers", ALL_LAYERS, "-cmoed --cpu-moe-draft --spec-draft-cpu-moe"),
    ("mapped", True, "--mmap"),
    ("mapped", False, "--no-mmap"),
    ("repack", True, "--repack"),
    ("repack", False, "-nr --no-repack"),
    ("projector", None, "--no-mmproj --no-mmproj-auto"),
    ("projector_offload", True, "--mmproj-offload"),
    ("projector_offload", False, "--no-mmproj-offload"),
)
_FLAGS = {flag: field for field, flags, _ in _WITH_VALUE for flag in flags.split()}
_SWITCHES = {flag: (field, value) for field, value, flags in _WITHOUT_VALUE for flag in flags.split()}
_VARIABLES = {f"LLAMA_ARG_{name}": field for field, _, name in _WITH_VALUE if name is not None}
_SWITCH_VARIABLES = {
    "LLAMA_ARG_KV_UNIFIED": "unified",
    "LLAMA_ARG_KV_OFFLOAD": "kv_offload",
    "LLAMA_ARG_SWA_FULL": "swa_full",
    "LLAMA_ARG_MMAP": "mapped",
    "LLAMA_ARG_REPACK": "repack",
    "LLAMA_ARG_MMPROJ_OFFLOAD": "projector_offload",
}
