"""llama-server's flags, as the embedded engine takes them: the table.

A row says how a flag is spelled, what its value looks like, and which fields of xllamacpp's
`CommonParams` it sets (dots lead into nested ones). Names and meaning are those of llama-server's
`--help` (b11434 and b11549 were read); the older `--mlock`, `--mmap` and `--no-mmap`, which cookbooks
still hold, are understood too. Flags that llama-server has and the engine can't serve stand in
`refused`, with what to do instead. `generation` holds the rows for sampling, chat and speculation;
`command_line` reads by this table.
"""

from __future__ import annotations

from llamesh.local.engine import values as v
from llamesh.local.engine.flag import CACHE_TYPE, OVERRIDES, TEMPLATE, Flag, cpu_flags, switch, takes, toggle
from llamesh.local.engine.generation import CHAT, DRAFT, SAMPLING, SPECULATIVE
from llamesh.local.engine.late import Member, Overrides

FLASH = v.switch_words(
    *(
        Member("llama_flash_attn_type", f"LLAMA_FLASH_ATTN_TYPE_{name}")
        for name in ("ENABLED", "DISABLED", "AUTO")
    )
)
LOAD = {
    "auto": "AUTO",
    "none": "NONE",
    "mmap": "MMAP",
    "mlock": "MLOCK",
    "mmap+mlock": "MMAP_MLOCK",
    "dio": "DIRECT_IO",
}
LOAD_MODES = {word: Member("llama_load_mode", f"LLAMA_LOAD_MODE_{name}") for word, name in LOAD.items()}
MODEL = (
    takes("-m --model", "FILE", v.text, "model.path"),
    takes("-mm --mmproj", "FILE", v.existing_file, "mmproj.path"),
    *toggle("--mmproj-auto", "--no-mmproj --no-mmproj-auto", "no_mmproj", inverted=True),
    *toggle("--mmproj-offload", "--no-mmproj-offload", "mmproj_use_gpu"),
    takes("--image-min-tokens", "N", v.integer(-1), "image_min_tokens"),
    takes("--image-max-tokens", "N", v.integer(-1), "image_max_tokens"),
    takes("--mtmd-batch-max-tokens", "N", v.integer(1), "mtmd_batch_max_tokens"),
    takes("--video-fps", "N", v.number(above=0), "video_fps"),
    takes("--video-timestamp-interval", "MS", v.integer(0), "video_timestamp_interval_ms"),
    takes("--video-ffmpeg-dir", "DIR", v.text, "video_ffmpeg_bin_dir"),
    takes("--lora", "FILE,...", v.lora, "lora_adapters"),
    takes("--lora-scaled", "FILE:SCALE,...", v.lora_scaled, "lora_adapters"),
    switch("--lora-init-without-apply", "lora_init_without_apply"),
    switch("--check-tensors", "check_tensors"),
    takes("-lm --load-mode", "MODE", v.one_of(LOAD_MODES), "load_mode"),
    switch("--mmap", "load_mode", value=LOAD_MODES["mmap"]),
    switch("--no-mmap", "load_mode", value=LOAD_MODES["none"]),
    switch("--mlock", "load_mode", value=LOAD_MODES["mmap+mlock"]),
    takes(
        "-lzm --lazy-mode",
        "MODE",
        v.member("llama_lazy_mode", "LLAMA_LAZY_MODE_", ("on", "auto", "off")),
        "lazy_mode",
    ),
    switch("--offline", "offline"),
)

CONTEXT = (
    # An explicit 0 means the model's whole context: --fit may not shrink it. -1 is the field's largest value.
    takes(
        "-c --ctx-size",
        "N",
        v.integer(0),
        "n_ctx",
        then=lambda size: {} if size else {"fit_params_min_ctx": -1},
    ),
    takes("--kv-unified-per-slot", "N", v.integer(0), "kv_unified_per_slot"),
    takes("-np --parallel", "N", v.slots, "n_parallel"),
    takes("-n --predict --n-predict", "N", v.integer(-1), "n_predict"),
    takes("-b --batch-size", "N", v.integer(1), "n_batch"),
    takes("-ub --ubatch-size", "N", v.integer(1), "n_ubatch"),
    takes("--keep", "N", v.integer(-1), "n_keep"),
    switch("--swa-full", "swa_full"),
    takes("-ctxcp --ctx-checkpoints --swa-checkpoints", "N", v.integer(0), "n_ctx_checkpoints"),
    takes("-cms --checkpoint-min-step", "N", v.integer(0), "checkpoint_min_step"),
    takes("-cram --cache-ram", "MIB", v.integer(-1), "cache_ram_mib"),
    *toggle("-kvu --kv-unified", "-no-kvu --no-kv-unified", "kv_unified"),
    *toggle("--cache-idle-slots", "--no-cache-idle-slots", "cache_idle_slots"),
    *toggle("--context-shift", "--no-context-shift", "ctx_shift"),
    *toggle("-cb --cont-batching", "-nocb --no-cont-batching", "cont_batching"),
    takes(
        "-fa --flash-attn",
        "on|off|auto",
        v.one_of(FLASH),
        "flash_attn_type",
    ),
    takes("-ctk --cache-type-k", "TYPE", CACHE_TYPE, "cache_type_k"),
    takes("-ctv --cache-type-v", "TYPE", CACHE_TYPE, "cache_type_v"),
    takes(
        "--rope-scaling",
        "none|linear|yarn",
        v.member("llama_rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_", ("none", "linear", "yarn")),
        "rope_scaling_type",
    ),
    takes("--rope-scale", "N", v.reciprocal, "rope_freq_scale"),
    takes("--rope-freq-base", "N", v.number(), "rope_freq_base"),
    takes("--rope-freq-scale", "N", v.number(), "rope_freq_scale"),
    takes("--yarn-orig-ctx", "N", v.integer(0), "yarn_orig_ctx"),
    takes("--yarn-ext-factor", "N", v.number(), "yarn_ext_factor"),
    takes("--yarn-attn-factor", "N", v.number(), "yarn_attn_factor"),
    takes("--yarn-beta-slow", "N", v.number(), "yarn_beta_slow"),
    takes("--yarn-beta-fast", "N", v.number(), "yarn_beta_fast"),
    *toggle("--warmup", "--no-warmup", "warmup"),
    *toggle("--perf", "--no-perf", "no_perf", "sampling.no_perf", inverted=True),
)

DEVICES = (
    *cpu_flags(
        {
            "threads": "-t --threads",
            "mask": "-C --cpu-mask",
            "range": "-Cr --cpu-range",
            "strict": "--cpu-strict",
            "priority": "--prio",
            "poll": "--poll",
        },
        "cpuparams",
    ),
    *cpu_flags(
        {
            "threads": "-tb --threads-batch",
            "mask": "-Cb --cpu-mask-batch",
            "range": "-Crb --cpu-range-batch",
            "strict": "--cpu-strict-batch",
            "priority": "--prio-batch",
            "poll": "--poll-batch",
        },
        "cpuparams_batch",
    ),
    takes("-ngl --gpu-layers --n-gpu-layers", "N|auto|all", v.layers, "n_gpu_layers"),
    takes(
        "-sm --split-mode",
        "none|layer|row|tensor",
        v.member("llama_split_mode", "LLAMA_SPLIT_MODE_", ("none", "layer", "row", "tensor")),
        "split_mode",
    ),
    takes("-ts --tensor-split", "N0,N1,...", v.shares(), "tensor_split"),
    takes("-mg --main-gpu", "INDEX", v.integer(0), "main_gpu"),
    takes("-fit --fit", "on|off", v.one_of(v.switch_words(True, False)), "fit_params"),
    takes("-fitt --fit-target", "MIB0,...", v.shares(unit=2**20, broadcast=True), "fit_params_target"),
    takes("-fitc --fit-ctx", "N", v.integer(0), "fit_params_min_ctx"),
    takes("-ot --override-tensor", "PATTERN=TYPE,...", v.overrides, OVERRIDES),
    switch("-cmoe --cpu-moe", OVERRIDES, value=Overrides((f"{v.EXPERTS}=CPU",))),
    takes("-ncmoe --n-cpu-moe", "N", v.first_layers(v.EXPERTS), OVERRIDES),
    takes("-ncffn --n-cpu-ffn", "N", v.first_layers(v.DENSE), OVERRIDES),
    *toggle("-kvo --kv-offload", "-nkvo --no-kv-offload", "no_kv_offload", inverted=True),
    *toggle("--op-offload", "--no-op-offload", "no_op_offload", inverted=True),
    *toggle("--repack", "-nr --no-repack", "no_extra_bufts", inverted=True),
    switch("--no-host", "no_host"),
    takes(
        "--numa",
        "TYPE",
        v.member("ggml_numa_strategy", "GGML_NUMA_STRATEGY_", ("distribute", "isolate", "numactl")),
        "numa",
    ),
)

SERVER = (
    takes("--host", "ADDRESS,...", v.hosts, "hostnames"),
    takes("--port", "PORT", v.integer(0, 65535), "port"),
    switch("--reuse-port", "reuse_port"),
    takes("--api-prefix", "PREFIX", v.text, "api_prefix"),
    takes("--api-key", "KEY,...", v.comma_list(v.text), "api_keys"),
    takes("--api-key-file", "FILE", v.key_lines, "api_keys"),
    takes("--ssl-key-file", "FILE", v.existing_file, "ssl_file_key"),
    takes("--ssl-cert-file", "FILE", v.existing_file, "ssl_file_cert"),
    takes(
        "--cors-origins",
        "ORIGINS",
        v.text,
        "cors_origins",
        then=lambda _: {"cors_origins_explicit": True},
    ),
    takes("--cors-methods", "METHODS", v.text, "cors_methods"),
    takes("--cors-headers", "HEADERS", v.text, "cors_headers"),
    *toggle("--cors-credentials", "--no-cors-credentials", "cors_credentials"),
    takes("-a --alias", "NAME,...", v.names, "model_alias"),
    takes("--tags", "TAG,...", v.names, "model_tags"),
    takes("-to --timeout", "SECONDS", v.integer(0), "timeout_read", "timeout_write"),
    takes("--sse-ping-interval", "SECONDS", v.integer(-1), "sse_ping_interval"),
    takes("--threads-http", "N", v.integer(-1), "n_threads_http"),
    switch("--embedding --embeddings", "embedding"),
    switch(
        "--rerank --reranking",
        "embedding",
        then=lambda _: {"pooling_type": Member("llama_pooling_type", "LLAMA_POOLING_TYPE_RANK")},
    ),
    takes(
        "--pooling",
        "TYPE",
        v.member("llama_pooling_type", "LLAMA_POOLING_TYPE_", ("none", "mean", "cls", "last", "rank")),
        "pooling_type",
    ),
    takes("--embd-normalize", "N", v.integer(-1), "embd_normalize"),
    *toggle("--cache-prompt", "--no-cache-prompt", "cache_prompt"),
    takes("--cache-reuse", "N", v.integer(0), "n_cache_reuse"),
    switch("--metrics", "endpoint_metrics"),
    switch("--props", "endpoint_props"),
    *toggle("--slots", "--no-slots", "endpoint_slots"),
    takes("--slot-save-path", "DIR", v.directory, "slot_save_path"),
    takes("-sps --slot-prompt-similarity", "N", v.number(0), "slot_prompt_similarity"),
    takes("--media-path", "DIR", v.directory, "media_path"),
    takes("--sleep-idle-seconds", "SECONDS", v.sleep_seconds, "sleep_idle_seconds"),
    *toggle("--ui --webui", "--no-ui --no-webui", "ui"),
    takes("--ui-config --webui-config", "JSON", v.text, "ui_config_json"),
    takes("--ui-config-file --webui-config-file", "FILE", v.contents, "ui_config_json"),
    takes("--path", "DIR", v.text, "public_path"),
    takes("--log-prompts-dir", "DIR", v.text, "path_prompts_log_dir"),
    # Below the lowest level that llama.cpp logs at.
    switch("--log-disable", "verbosity", value=-1),
    switch("-v --verbose --log-verbose", "verbosity", value=v.INT32_MAX),
    takes("-lv --verbosity --log-verbosity", "N", v.integer(0), "verbosity"),
    # What the engine does anyway.
    switch("--log-prefix"),
    switch("--log-timestamps"),
    switch("--no-log-jsonl"),
    takes("--log-colors", "off|auto", v.one_of(dict.fromkeys(("off", "auto"), True))),
)

FLAGS: tuple[Flag, ...] = (*MODEL, *CONTEXT, *DEVICES, *SERVER, *SAMPLING, *CHAT, *SPECULATIVE)

# Fields that gather what several flags say; any other field keeps the last.
GATHERED = frozenset(
    {
        *("api_keys", "model_alias", "model_tags", "antiprompt", "lora_adapters", TEMPLATE),
        *("sampling.user_sampling_config", "speculative.types"),
        *(OVERRIDES, f"{DRAFT}.{OVERRIDES}", "cpuparams.cpumask", "cpuparams_batch.cpumask"),
        *(f"{DRAFT}.cpuparams.cpumask", f"{DRAFT}.cpuparams_batch.cpumask"),
    }
)
