"""`llamesh import`: what becomes of llama-swap's YAML and of llama.cpp's presets."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.commands.convert import command, llama_swap, preset
from llamesh.commands.convert.recipe import Converted
from llamesh.commands.convert.render import arguments, config_text, cookbook_text, scalar
from llamesh.config.cookbook import Cookbook, HubFile, ModelPath, parse_cookbook
from llamesh.config.yaml_source import parse_yaml
from tests.commands.cli import run

SWAP = """
healthCheckTimeout: 500
startPort: 10001
globalTTL: 600
apiKeys: [sk-hunter2]
novelty: 1
macros:
  latest: >
    /opt/llama/llama-server-b9
    --port ${PORT}
  ctx: 4096
  args: "--ctx-size ${ctx}"
models:
  big:
    macros: {ctx: 16384, temp: 0.7}
    cmd: |
      # with a comment
      ${latest}
      --model ${env.MODELS}/big.gguf
      ${args} --temp ${temp} --jinja \\
      --chat-template-kwargs '{"reasoning_effort": "high"}'
    name: Big
    description: "The large one"
    env: ["CUDA_VISIBLE_DEVICES=0", "HF_TOKEN=s3cret"]
    ttl: 60
    aliases: [{id: gpt-4o-mini}, mini, MINI, "big:x"]
    concurrencyLimit: 4
    filters: {stripParams: temperature}
    cmdStop: kill ${PID}
    checkEndpoint: /ready
  "qwen:think":
    unlisted: true
    ttl: 0
    aliases: [thinker]
    cmd: llama-server --host 0.0.0.0 --port ${PORT} -hf a/b-GGUF:Q4_K_M -hff b.gguf --api-key s3cret
  embed: {cmd: "env CUDA_VISIBLE_DEVICES= llama-server --port=${PORT} -m /m/e.gguf --embedding"}
  "a:b:c": {cmd: "llama-server -mu https://example.org/x.gguf"}
  docker: {cmd: "docker run -p ${PORT}:8080 image -m /m.gguf"}
  shell: {cmd: "bash -c 'llama-server -m /m.gguf'"}
  other: {cmd: "vllm serve --port ${PORT} x"}
  empty: {}
  quote: {cmd: "llama-server -m 'x"}
  lost: {cmd: "llama-server ${nothing}"}
  unset: {cmd: "llama-server -m ${env.UNSET_HERE}"}
  port: {cmd: "llama-server -m /m.gguf --alias p${PORT}"}
  bomb: {macros: {a: "${b}${b}", b: "${a}${a}"}, cmd: "llama-server ${a}"}
  nosource: {cmd: "llama-server -c 1"}
  BIG: {cmd: "llama-server -m /other.gguf"}
  mini: {cmd: "llama-server -m /other.gguf"}
  list: [1]
groups:
  g: {swap: true, exclusive: false, persistent: true, members: [big, gone]}
hooks: {on_startup: {preload: [big]}}
peers: {p: {proxy: "http://x", models: [y]}}
"""

INI = """
version = 1
; a comment
[*]
c = 8192
n-gpu-layers = 8
mmap = false
models-max = 3

[a/MODEL-GGUF:Q8_0]
chat-template = chatml
ngl = 123
jinja = true
ctx-size = 4096
LLAMA_ARG_CACHE_RAM = 0
LLAMA_ARG_N_PARALLEL = 2
load-on-startup = true
stop-timeout = 3

[custom]
model = /m/my model.gguf
flash-attn = on
no-webui = true
jinja = false
alias = one, two
host = 0.0.0.0
port = 1
sleep-idle-seconds = 90

[embed]
hf-repo = a/e-GGUF
embeddings = true
tags = x
strange = true

[by-folder]
c = 1
"""


def swap(text: str = SWAP, **environ: str) -> Converted:
    return llama_swap.convert(parse_yaml(text, "swap.yaml").data, environ)


def loaded(made: Converted) -> Cookbook:
    text = cookbook_text(made, "a file")
    return parse_cookbook(parse_yaml(text, "cookbook.yaml"), Path("/folder"))


def test_models_of_llama_swap() -> None:
    made = swap(MODELS="/models")
    cookbook = loaded(made)
    assert [profile.key for profile in cookbook.profiles] == [
        "big:default",
        "qwen:think",
        "embed:default",
        "a-b-c:default",
    ]
    big = cookbook.find("gpt-4o-mini")
    assert big is not None
    assert big is cookbook.find("mini") is cookbook.find("BIG")
    assert big.source == ModelPath("/models/big.gguf")
    assert big.arguments[:5] == ("--ctx-size", "16384", "--temp", "0.7", "--jinja")
    assert big.arguments[-1] == '{"reasoning_effort": "high"}'
    assert big.description == "Big The large one"
    assert (big.idle_timeout_seconds, big.startup_timeout_seconds, big.max_queue_size) == (60, 500, 4)
    think = cookbook.find("qwen:think")
    assert think is not None
    assert think.source == HubFile("a/b-GGUF:Q4_K_M", "b.gguf")
    assert (think.arguments, think.api_key, think.idle_timeout_seconds) == ((), "s3cret", 0)
    embed = cookbook.find("embed")
    assert embed is not None
    assert (embed.kind, embed.idle_timeout_seconds) == ("embedding", 600)
    assert made.config == {"llama_cpp": {"binary_path": "/opt/llama/llama-server-b9"}}


def test_what_llama_swap_has_and_llamesh_has_not() -> None:
    made = swap(MODELS="/models")
    reasons = {left.name: left.reason for left in made.left_out}
    for name, words in {
        "docker": "started through docker",
        "shell": "started through bash",
        "other": "'vllm' isn't llama-server",
        "empty": "no cmd",
        "quote": "a quote in cmd isn't closed",
        "lost": "no macro ${nothing}",
        "unset": "UNSET_HERE isn't set",
        "port": "${PORT} elsewhere",
        "bomb": "expand without end",
        "nosource": "doesn't say where the model is",
        "BIG": "its name is taken",
        "mini": "another model has the alias mini",
        "list": "no mapping",
    }.items():
        assert words in reasons.pop(name), name
    assert reasons == {}
    said = "\n".join(made.recipes[0].notes)
    for words in (
        "CUDA_VISIBLE_DEVICES, HF_TOKEN",
        "cmdStop",
        "filters",
        "checkEndpoint",
        "group g",
        "prewarm",
    ):
        assert words in said
    assert "the alias 'MINI' was left out" in said
    assert "aliases are names of models" in "".join(made.recipes[1].notes)
    everything = cookbook_text(made, "x") + config_text(made, "x") + "".join(made.notes)
    assert "hunter2" not in everything
    assert "HF_TOKEN=" not in everything
    assert "auth.allowed_keys" in everything
    assert "novelty was left out" in everything


def test_one_model_at_a_time_is_said() -> None:
    made = swap("models: {a: {cmd: llama-server -m /a.gguf}}")
    assert "max_instances_per_node" in "".join(made.config_notes)
    assert "{}" in config_text(made, "x")
    assert made.recipes[0].keys["startup_timeout_seconds"] == 120


def test_presets_of_the_router() -> None:
    made = preset.convert(preset.read(INI))
    cookbook = loaded(made)
    model = cookbook.find("a/MODEL-GGUF:Q8_0")
    assert model is not None
    assert model.source == HubFile("a/MODEL-GGUF:Q8_0", None)
    assert " ".join(model.arguments) == (
        "--no-mmap --chat-template chatml -ngl 123 --jinja --ctx-size 4096 --cache-ram 0 --parallel 2"
    )
    assert model.idle_timeout_seconds == 0
    custom = cookbook.find("two")
    assert custom is not None
    assert custom.source == ModelPath("/m/my model.gguf")
    assert " ".join(custom.arguments) == (
        "-c 8192 --n-gpu-layers 8 --no-mmap --flash-attn on --no-webui --no-jinja"
    )
    assert custom.idle_timeout_seconds == 90
    embed = cookbook.find("embed")
    assert embed is not None
    assert embed.kind == "embedding"
    assert [(left.name, "models_dir" in left.reason) for left in made.left_out] == [("by-folder", True)]
    said = " ".join(note for recipe in made.recipes for note in recipe.notes)
    for words in (
        "load-on-startup",
        "stop-timeout",
        "tags were left out",
        "strange isn't a flag",
        "models-max",
    ):
        assert words in said


def test_a_line_that_is_none_of_an_ini_file() -> None:
    with pytest.raises(preset.NotAPreset, match="line 2"):
        preset.read("[a]\nnonsense\n")


# The command.


def test_to_stdout_and_the_report_beside_it(tmp_path: Path) -> None:
    source = tmp_path / "models.ini"
    source.write_text(INI)
    result = run(command, str(source))
    assert result.exit_code == 0
    assert result.stdout.startswith("# Made by `llamesh import` from models.ini (llama.cpp)")
    assert "3 taken over, 1 left out" in result.stderr
    assert "left out: by-folder" in result.stderr
    document = json.loads(run(command, str(source), "--json").stdout)
    assert document["from"] == "llama.cpp"
    assert [one["name"] for one in document["taken"]] == ["a/MODEL-GGUF:Q8_0", "custom", "embed"]
    assert document["left_out"][0]["name"] == "by-folder"


def test_to_files_that_are_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/models")
    source, cookbook, config = (tmp_path / name for name in ("swap.yaml", "cookbook.yaml", "config.yaml"))
    source.write_text(SWAP)
    words = [str(source), "--output", str(cookbook), "--config-output", str(config)]
    result = run(command, *words)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "binary_path" in config.read_text()
    assert stat.S_IMODE(cookbook.stat().st_mode) == 0o600
    cookbook.write_text("mine")
    config.unlink()
    refused = run(command, *words)
    assert refused.exit_code == 1
    assert "--force overwrites it" in refused.stderr
    assert cookbook.read_text() == "mine"
    assert not config.exists()
    assert run(command, *words, "--force").exit_code == 0
    assert "models:" in cookbook.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: []", "cookbook already"),
        ("hello: 1", "neither"),
        ("{", "not valid YAML"),
        ("[a]\nb = 1\nnonsense", "line 3"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, text: str, said: str) -> None:
    source = tmp_path / "file"
    source.write_text(text)
    result = run(command, str(source))
    assert result.exit_code == 1
    assert said in result.stderr


def test_files_that_cannot_be_read_and_those_without_anything(tmp_path: Path) -> None:
    source = tmp_path / "file"
    assert "can't be read" in run(command, str(source)).stderr
    source.write_bytes(b"\xff\xfe")
    assert "UTF-8" in run(command, str(source)).stderr
    source.write_text("models: {a: {cmd: vllm}}")
    result = run(command, str(source), "--output", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()
    source.write_text("a: 1")
    assert "no `models:`" in run(command, str(source), "--from", "llama-swap").stderr
    source.write_text("models: {}")
    assert run(command, str(source), "--from", "llama.cpp").exit_code == 1


# Whatever comes, the result loads.

_TEXT = st.text(max_size=20)
_NAMES = st.one_of(
    _TEXT, st.sampled_from(["a", "A", "a:b", "a:", "-", "on", "1", "a: b", "x #y", "~", "é", "'"])
)
_WORDS = st.one_of(
    _TEXT,
    st.sampled_from(
        (
            *("-m", "--model", "/x y.gguf", "-hf", "a/b:Q4", "-hff", "--port", "${PORT}", "--host"),
            *("--api-key", "k,l", "--embedding", "-c", "4096", "--alias", "${MODEL_ID}", "${a}"),
            *("--sleep-idle-seconds", "9", "--model=x"),
        )
    ),
)
_COMMANDS = st.lists(_WORDS, max_size=8).map(lambda words: " ".join(["llama-server", "-m x", *words]))
_VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXT, st.lists(_TEXT, max_size=2))


@given(
    st.dictionaries(
        _NAMES,
        st.fixed_dictionaries(
            {"cmd": st.one_of(_COMMANDS, _VALUES)},
            optional={
                "ttl": _VALUES,
                "aliases": st.one_of(_VALUES, st.lists(_NAMES, max_size=3)),
                "name": _VALUES,
                "description": _VALUES,
                "concurrencyLimit": _VALUES,
                "macros": st.one_of(_VALUES, st.dictionaries(_TEXT, _VALUES, max_size=2)),
                "env": _VALUES,
                "novelty": _VALUES,
            },
        ),
        max_size=4,
    ),
    st.dictionaries(
        st.sampled_from(["healthCheckTimeout", "globalTTL", "groups", "hooks", "matrix"]), _VALUES
    ),
)
def test_what_comes_of_any_llama_swap_file_loads(models: dict[str, Any], more: dict[str, Any]) -> None:
    made = llama_swap.convert({"models": models, **more}, {"A": "1"})
    assert len(loaded(made).profiles) == len(made.recipes)
    parse_yaml(config_text(made, "x"), "config.yaml")


@given(
    st.lists(
        st.tuples(
            st.one_of(_NAMES, st.just("*"), st.just("a/b")),
            st.dictionaries(
                st.one_of(
                    _TEXT, st.sampled_from(["model", "hf-repo", "c", "ctx-size", "alias", "embedding"])
                ),
                st.one_of(_TEXT, st.sampled_from(["true", "false", "1", "/x.gguf", "a/b", "a, a"])),
                max_size=5,
            ),
        ),
        max_size=4,
    )
)
def test_what_comes_of_any_preset_loads(sections: list[tuple[str, dict[str, str]]]) -> None:
    made = preset.convert([preset.Section(name, keys) for name, keys in sections])
    assert len(loaded(made).profiles) == len(made.recipes)


@given(st.text())
def test_any_text_is_a_preset_or_none(text: str) -> None:
    preset.looks_like_preset(text)
    try:
        sections = preset.read(text)
    except preset.NotAPreset:
        return
    loaded(preset.convert(sections))


@given(st.text())
def test_texts_come_back_as_they_were(text: str) -> None:
    assert parse_yaml(f"a: {scalar(text)}\n", "f").data == {"a": text}
    if text:
        assert parse_yaml(f"a: {arguments(text)}\n", "f").data == {"a": text}
