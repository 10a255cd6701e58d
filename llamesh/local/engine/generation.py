"""Rows of the flag table about what is generated: sampling, chat templates, speculation."""

from __future__ import annotations

from llamesh.local.engine import values as v
from llamesh.local.engine.flag import CACHE_TYPE, OVERRIDES, TEMPLATE, cpu_flags, switch, takes, toggle
from llamesh.local.engine.late import Member, Overrides

SPECULATION = v.member(
    "common_speculative_type",
    "COMMON_SPECULATIVE_TYPE_",
    (
        *("none", "draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark"),
        *("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"),
    ),
)
SAMPLING = (
    takes("--samplers", "NAME;...", v.samplers, "sampling.samplers", mark="SAMPLERS"),
    takes("--sampler-seq --sampling-seq", "LETTERS", v.sampler_letters, "sampling.samplers"),
    takes("-s --seed", "SEED", v.seed, "sampling.seed"),
    switch("--ignore-eos", "sampling.ignore_eos"),
    takes("--temp --temperature", "N", v.number(0), "sampling.temp", mark="TEMP"),
    takes("--top-k", "N", v.integer(), "sampling.top_k", mark="TOP_K"),
    takes("--top-p", "N", v.number(), "sampling.top_p", mark="TOP_P"),
    takes("--min-p", "N", v.number(), "sampling.min_p", mark="MIN_P"),
    takes("--xtc-probability", "N", v.number(), "sampling.xtc_probability", mark="XTC_PROBABILITY"),
    takes("--xtc-threshold", "N", v.number(), "sampling.xtc_threshold", mark="XTC_THRESHOLD"),
    takes("--typical --typical-p", "N", v.number(), "sampling.typ_p"),
    takes("--repeat-last-n", "N", v.integer(0), "sampling.penalty_last_n", mark="PENALTY_LAST_N"),
    takes("--repeat-penalty", "N", v.number(above=0), "sampling.penalty_repeat", mark="PENALTY_REPEAT"),
    takes("--presence-penalty", "N", v.number(), "sampling.penalty_present"),
    takes("--frequency-penalty", "N", v.number(), "sampling.penalty_freq"),
    takes("--dry-multiplier", "N", v.number(), "sampling.dry_multiplier"),
    takes("--dry-base", "N", v.number(1), "sampling.dry_base"),
    takes("--dry-allowed-length", "N", v.integer(), "sampling.dry_allowed_length"),
    takes("--dry-penalty-last-n", "N", v.integer(0), "sampling.dry_penalty_last_n"),
    takes("--adaptive-target", "N", v.number(), "sampling.adaptive_target"),
    takes("--adaptive-decay", "N", v.number(), "sampling.adaptive_decay"),
    takes("--dynatemp-range", "N", v.number(), "sampling.dynatemp_range"),
    takes("--dynatemp-exp", "N", v.number(), "sampling.dynatemp_exponent"),
    takes("--mirostat", "0|1|2", v.integer(0, 2), "sampling.mirostat", mark="MIROSTAT"),
    takes("--mirostat-lr", "N", v.number(), "sampling.mirostat_eta", mark="MIROSTAT_ETA"),
    takes("--mirostat-ent", "N", v.number(), "sampling.mirostat_tau", mark="MIROSTAT_TAU"),
    takes("--grammar", "GRAMMAR", v.grammar, "sampling.grammar"),
    takes("--grammar-file", "FILE", v.contents_of(v.grammar), "sampling.grammar"),
    takes("-j --json-schema", "SCHEMA", v.schema, "sampling.grammar"),
    takes("-jf --json-schema-file", "FILE", v.contents_of(v.schema), "sampling.grammar"),
    switch("-bs --backend-sampling", "sampling.backend_sampling"),
)

CHAT = (
    *toggle("--jinja", "--no-jinja", "use_jinja"),
    takes("--chat-template", "TEMPLATE", v.text, "chat_template"),
    takes("--chat-template-file", "FILE", v.contents, "chat_template"),
    takes("--chat-template-kwargs", "JSON", v.json_object, TEMPLATE),
    *toggle("--skip-chat-parsing", "--no-skip-chat-parsing", "force_pure_content_parser"),
    *toggle("--prefill-assistant", "--no-prefill-assistant", "prefill_assistant"),
    takes(
        "--reasoning-format",
        "FORMAT",
        v.member(
            "common_reasoning_format",
            "COMMON_REASONING_FORMAT_",
            ("none", "auto", "deepseek", "deepseek-legacy"),
        ),
        "reasoning_format",
    ),
    takes(
        "-rea --reasoning",
        "on|off|auto",
        v.one_of(v.switch_words(1, 0, -1)),
        "enable_reasoning",
        then=lambda on: {} if on < 0 else {TEMPLATE: {"enable_thinking": "true" if on else "false"}},
    ),
    takes("--reasoning-effort", "LEVEL", v.reasoning_effort, TEMPLATE),
    takes("--reasoning-budget", "N", v.integer(-1), "sampling.reasoning_budget_tokens"),
    takes("--reasoning-budget-message", "TEXT", v.text, "sampling.reasoning_budget_message"),
    switch(
        "--reasoning-preserve",
        "preserve_reasoning_specified",
        then=lambda _: {TEMPLATE: {"preserve_reasoning": "true"}},
    ),
    switch(
        "--no-reasoning-preserve",
        "preserve_reasoning_specified",
        then=lambda _: {TEMPLATE: {"preserve_reasoning": "false"}},
    ),
    takes("-r --reverse-prompt", "TEXT", v.stop_text, "antiprompt"),
    *toggle("-e --escape", "--no-escape", "escape"),
    switch("-sp --special", "special"),
)

DRAFT = "speculative.draft"

SPECULATIVE = (
    takes("--spec-type", "TYPE,...", v.comma_list(SPECULATION), "speculative.types"),
    takes("--spec-draft-model -md --model-draft", "FILE", v.model_file, f"{DRAFT}.mparams.path"),
    takes("--spec-draft-n-max", "N", v.integer(0), f"{DRAFT}.n_max"),
    takes("--spec-draft-n-min", "N", v.integer(0), f"{DRAFT}.n_min"),
    takes("--spec-draft-p-split --draft-p-split", "P", v.number(), f"{DRAFT}.p_split"),
    takes("--spec-draft-p-min --draft-p-min", "P", v.number(), f"{DRAFT}.p_min"),
    takes(
        "--spec-draft-sampling",
        "greedy|probabilistic",
        v.one_of({"greedy": False, "probabilistic": True}),
        f"{DRAFT}.probabilistic",
    ),
    *toggle("--spec-draft-backend-sampling", "--no-spec-draft-backend-sampling", f"{DRAFT}.backend_sampling"),
    takes(
        "--spec-draft-ngl -ngld --gpu-layers-draft --n-gpu-layers-draft",
        "N|auto|all",
        v.layers,
        f"{DRAFT}.n_gpu_layers",
    ),
    takes("--spec-draft-type-k -ctkd --cache-type-k-draft", "TYPE", CACHE_TYPE, f"{DRAFT}.cache_type_k"),
    takes("--spec-draft-type-v -ctvd --cache-type-v-draft", "TYPE", CACHE_TYPE, f"{DRAFT}.cache_type_v"),
    takes(
        "--spec-draft-override-tensor -otd --override-tensor-draft",
        "PATTERN=TYPE,...",
        v.overrides,
        f"{DRAFT}.{OVERRIDES}",
    ),
    switch(
        "--spec-draft-cpu-moe -cmoed --cpu-moe-draft",
        f"{DRAFT}.{OVERRIDES}",
        value=Overrides((f"{v.EXPERTS}=CPU",)),
    ),
    takes(
        "--spec-draft-n-cpu-moe --spec-draft-ncmoe -ncmoed --n-cpu-moe-draft",
        "N",
        v.first_layers(v.EXPERTS),
        f"{DRAFT}.{OVERRIDES}",
    ),
    *cpu_flags(
        {
            "threads": "--spec-draft-threads -td --threads-draft",
            "mask": "--spec-draft-cpu-mask -Cd --cpu-mask-draft",
            "range": "--spec-draft-cpu-range -Crd --cpu-range-draft",
            "strict": "--spec-draft-cpu-strict --cpu-strict-draft",
            "priority": "--spec-draft-prio --prio-draft",
            "poll": "--spec-draft-poll --poll-draft",
        },
        f"{DRAFT}.cpuparams",
    ),
    *cpu_flags(
        {
            "threads": "--spec-draft-threads-batch -tbd --threads-batch-draft",
            "mask": "--spec-draft-cpu-mask-batch -Cbd --cpu-mask-batch-draft",
            "range": "--spec-draft-cpu-range-batch -Crbd --cpu-range-batch-draft",
            "strict": "--spec-draft-cpu-strict-batch --cpu-strict-batch-draft",
            "priority": "--spec-draft-prio-batch --prio-batch-draft",
            "poll": "--spec-draft-poll-batch --poll-batch-draft",
        },
        f"{DRAFT}.cpuparams_batch",
    ),
    takes("--spec-ngram-mod-n-min", "N", v.integer(0, 1024), "speculative.ngram_mod.n_min"),
    takes("--spec-ngram-mod-n-max", "N", v.integer(0, 1024), "speculative.ngram_mod.n_max"),
    takes("--spec-ngram-mod-n-match", "N", v.integer(1, 1024), "speculative.ngram_mod.n_match"),
    *(
        takes(
            f"--spec-{kind}-{name}", "N", v.integer(1, high), f"speculative.{kind}.{name}".replace("-", "_")
        )
        for kind in ("ngram-simple", "ngram-map-k", "ngram-map-k4v")
        for name, high in (("size-n", 1024), ("size-m", 1024), ("min-hits", v.INT32_MAX))
    ),
    # Upstream's own default for drafting from the prompt; the sizes are those of the fields already.
    switch(
        "--spec-default",
        "speculative.types",
        value=(Member("common_speculative_type", "COMMON_SPECULATIVE_TYPE_NGRAM_MOD"),),
    ),
    takes(
        "-lcs --lookup-cache-static", "FILE", v.existing_file, "speculative.ngram_cache.lookup_cache_static"
    ),
    takes("-lcd --lookup-cache-dynamic", "FILE", v.text, "speculative.ngram_cache.lookup_cache_dynamic"),
)
