"""llama-server's flags that the embedded engine can't serve, each with what to do instead."""

from __future__ import annotations

_NO_DOWNLOAD = "the embedded engine doesn't download: fetch the file and name it with model_path"
_NOT_BOUND = "the embedded engine has no setting for it; a llama-server (llama_cpp.binary_path) takes it"
_NO_TOOLS = "the embedded engine doesn't run programs for the models it serves"
_ONE_MODEL = "the embedded engine serves one model, the profile's"
_DRAFT_MAX = "llama-server has removed it: use --spec-draft-n-max or --spec-ngram-mod-n-max"
_DRAFT_MIN = "llama-server has removed it: use --spec-draft-n-min or --spec-ngram-mod-n-min"

# llama-server's other flags, each with why it is refused.
REFUSED: dict[str, str] = {
    name: reason
    for names, reason in (
        (
            "-hf -hfr --hf-repo -hff --hf-file -hft --hf-token -mu --model-url -dr --docker-repo "
            "-mmu --mmproj-url --spec-draft-hf -hfd -hfrd --hf-repo-draft --embd-gemma-default "
            "--fim-qwen-1.5b-default --fim-qwen-3b-default --fim-qwen-7b-default --fim-qwen-7b-spec "
            "--fim-qwen-14b-spec --fim-qwen-30b-default --gpt-oss-20b-default --gpt-oss-120b-default "
            "--vision-gemma-4b-default --vision-gemma-12b-default -cl --cache-list",
            _NO_DOWNLOAD,
        ),
        (
            "--rpc -dev --device --spec-draft-device -devd --device-draft -mmdev --mmproj-device "
            "--override-kv --control-vector --control-vector-scaled --control-vector-layer-range "
            "--spm-infill --dry-sequence-breaker --log-file --log-jsonl --no-log-prefix --no-log-timestamps "
            "--top-nsigma --top-n-sigma -l --logit-bias --spec-synth-len "
            "--spec-synth-rates --completion-bash",
            _NOT_BOUND,
        ),
        (
            "--tools --tools-runtime --mcp-servers-config --mcp-servers-json -ag --agent -no-ag --no-agent "
            "--ui-mcp-proxy --webui-mcp-proxy --no-ui-mcp-proxy --no-webui-mcp-proxy",
            _NO_TOOLS,
        ),
        ("--models-dir --models-preset --models-max --models-autoload --no-models-autoload", _ONE_MODEL),
        ("--draft --draft-n --draft-max", _DRAFT_MAX),
        ("--draft-min --draft-n-min", _DRAFT_MIN),
        ("--spec-ngram-size-n", "llama-server has removed it: use --spec-ngram-simple-size-n and its kin"),
        ("--spec-ngram-size-m", "llama-server has removed it: use --spec-ngram-simple-size-m and its kin"),
        (
            "--spec-ngram-min-hits",
            "llama-server has removed it: use --spec-ngram-simple-min-hits and its kin",
        ),
    )
    for name in names.split()
}
