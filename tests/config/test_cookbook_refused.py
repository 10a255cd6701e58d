"""Every cookbook that is refused: exactly what is said about it, and on which line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamesh.config.cookbook import load_cookbook
from llamesh.config.problems import ConfigError

ONE_SOURCE = "one of model_path, hf_repo, url, or a model flag (-m, -hf, ...) in llama_server_args"
ONCE = "each name or alias once, upper and lower case being the same"
ONE_PROFILE = "at least one, usually with `id: default`"


def in_profile(lines: str) -> str:
    """A cookbook whose one profile starts on line 4 and has `lines` from line 5 on."""
    body = "".join(f"        {line}\n" for line in lines.splitlines())
    return f"models:\n  - name: m\n    profiles:\n      - id: default\n{body}"


def two_models(first: str, second: str) -> str:
    return (
        f"models:\n  - {first}\n    profiles: [{{id: default, model_path: /m}}]\n"
        f"  - {second}\n    profiles: [{{id: default, model_path: /m}}]\n"
    )


P = "models[0].profiles[0]"

# The file, `line: path: what is wrong`, and what would be right.
REFUSALS = [
    ("model: []", "1: model: unknown key", "nearest: models"),
    ("models: 5", "1: models: must be a list, not 5", "a list, such as [a, b]"),
    ("models:\n  m: {}", "1: models: must be a list, not a mapping", "a list, such as [a, b]"),
    ("models:\n  - m", "2: models[0]: must be a mapping of keys, not 'm'", "its keys below it, indented"),
    ("models:\n  - name: m", "2: models[0].profiles: the model has no profile", ONE_PROFILE),
    (
        "models:\n  - name: m\n    profiles: []",
        "3: models[0].profiles: the model has no profile",
        ONE_PROFILE,
    ),
    (
        "models:\n  - profiles: [{id: a, model_path: /m}]",
        "2: models[0].name: is missing",
        "every entry here needs `name:`",
    ),
    (
        "models:\n  - name: m\n    profiles:\n      - model_path: /m",
        "4: models[0].profiles[0].id: is missing",
        "every entry here needs `id:`",
    ),
    (
        two_models("name: 'qwen3:8b'", "name: b"),
        "2: models[0].name: holds a colon: 'qwen3:8b'",
        "no `:`; it separates a model from its profile",
    ),
    (
        two_models("name: a\n    aliases: ['x:y']", "name: b"),
        "3: models[0].aliases[0]: holds a colon: 'x:y'",
        "no `:`; it separates a model from its profile",
    ),
    (two_models("name: ''", "name: b"), "2: models[0].name: is empty", "some text"),
    (
        two_models("name: ' a'", "name: b"),
        "2: models[0].name: is empty or has blanks around it",
        "some text",
    ),
    (
        two_models('name: "a\\nb"', "name: b"),
        "2: models[0].name: holds a control character",
        "text on one line",
    ),
    (two_models("name: 3", "name: b"), "2: models[0].name: must be text, not 3", "text; put it in quotes"),
    (two_models("name: Qwen", "name: qWEN"), "4: models[1].name: 'qWEN' is taken by models[0].name", ONCE),
    (
        two_models("name: a\n    aliases: [B]", "name: b"),
        "5: models[1].name: 'b' is taken by models[0].aliases[0]",
        ONCE,
    ),
    (
        two_models("name: a", "name: b\n    aliases: [x, A]"),
        "5: models[1].aliases[1]: 'A' is taken by models[0].name",
        ONCE,
    ),
    (
        two_models("name: a\n    enabled: false", "name: a"),
        "5: models[1].name: 'a' is taken by models[0].name",
        ONCE,
    ),
    (
        "models:\n  - name: m\n    profiles:\n    - {id: x, model_path: /m}\n    - {id: X, model_path: /m}",
        "5: models[0].profiles[1].id: 'X' is taken by models[0].profiles[0].id",
        "each profile id of this model once, upper and lower case being the same",
    ),
    (in_profile("description: d"), f"4: {P}: doesn't say where the model is", ONE_SOURCE),
    (in_profile("llama_server_args: -c 4096"), f"4: {P}: doesn't say where the model is", ONE_SOURCE),
    (
        in_profile("model_path: /m\nhf_repo: a/b"),
        f"4: {P}: names the model more than once: model_path and hf_repo",
        "keep one of them",
    ),
    (
        in_profile("model_path: /m\nllama_server_args: --hf_repo a/b"),
        f"4: {P}: names the model more than once: model_path and --hf_repo in llama_server_args",
        "keep one of them",
    ),
    (
        in_profile("llama_server_args: -m a -mu b"),
        f"4: {P}: names the model more than once: -m in llama_server_args and -mu in llama_server_args",
        "keep one of them",
    ),
    (
        in_profile("model_path: /m\nhf_file: f.gguf"),
        f"6: {P}.hf_file: has no hf_repo beside it",
        "`hf_repo: owner/name`",
    ),
    (
        in_profile("hf_repo: just-a-name"),
        f"5: {P}.hf_repo: not a repository: 'just-a-name'",
        "owner/name, or owner/name:quantisation",
    ),
    (
        in_profile("hf_repo: ../b"),
        f"5: {P}.hf_repo: not a repository: '../b'",
        "owner/name, or owner/name:quantisation",
    ),
    (
        in_profile("hf_repo: a/b:../c"),
        f"5: {P}.hf_repo: not a quantisation: '../c'",
        "such as owner/name:Q4_K_M",
    ),
    (
        in_profile(f"url: http://example.org/m.gguf\nsha256: {'a' * 64}"),
        f"5: {P}.url: the address isn't https: 'http://example.org/m.gguf'",
        "such as https://example.org/models/name.gguf",
    ),
    (
        in_profile("url: https://example.org/m.gguf"),
        f"5: {P}.url: has no sha256 beside it",
        "`sha256:` and what `sha256sum FILE` prints",
    ),
    (
        in_profile("url: https://example.org/m.gguf\nsha256: abc"),
        f"6: {P}.sha256: not a SHA-256: 'abc'",
        "64 hexadecimal digits, as `sha256sum` prints them",
    ),
    (
        in_profile(f"model_path: /m\nsha256: {'a' * 64}"),
        f"6: {P}.sha256: has no url beside it",
        "`url: https://...`; the hub has its own",
    ),
    (
        in_profile(f"hf_repo: a/b\nurl: https://example.org/m.gguf\nsha256: {'a' * 64}"),
        f"4: {P}: names the model more than once: hf_repo and url",
        "keep one of them",
    ),
    (
        in_profile("hf_repo: a/b\nhf_file: ../f.gguf"),
        f"6: {P}.hf_file: not a file of a repository: '../f.gguf'",
        "its path below the repository's root",
    ),
    (
        in_profile("model_path: /m\nllama_server_args: --alias 'x"),
        f"6: {P}.llama_server_args: a quote isn't closed",
        "close it, or escape a literal one with a backslash",
    ),
    (
        in_profile("llama_server_args: --model=/m"),
        f"5: {P}.llama_server_args: llama-server doesn't take --model=VALUE",
        "--model VALUE, with a blank",
    ),
    (
        in_profile("model_path: /m\nllama_server_args: [-c, 1]"),
        f"6: {P}.llama_server_args: must be text",
        "text; put it in quotes",
    ),
    (
        in_profile("model_path: /m\nidle_timeout_seconds: -1"),
        f"6: {P}.idle_timeout_seconds: must be at least 0, not -1",
        "0 or more",
    ),
    (
        in_profile("model_path: /m\nstartup_timeout_seconds: 0"),
        f"6: {P}.startup_timeout_seconds: must be above 0, not 0",
        "more than 0",
    ),
    (
        in_profile("model_path: /m\nmax_instances: 1\nmin_instances: 2"),
        f"7: {P}.min_instances: 2 is above max_instances (1)",
        "at most 1",
    ),
    (
        in_profile("model_path: /m\nidle_timeout_secs: 1"),
        f"6: {P}.idle_timeout_secs: unknown key",
        f"nearest: {P}.idle_timeout_seconds",
    ),
    (
        "models:\n  - name: m\n    hf_repo: a/b\n    profiles: [{id: default, model_path: /m}]",
        "3: models[0].hf_repo: unknown key",
        "nearest: models[].profiles[].hf_repo",
    ),
    (
        in_profile("model_path: /m\nmodel_path: /n"),
        f"6: {P}.model_path: the key is there twice",
        "remove one; the first is on line 5",
    ),
]


@pytest.mark.parametrize(("text", "said", "hint"), REFUSALS)
def test_refuses_with_file_and_line(tmp_path: Path, text: str, said: str, hint: str) -> None:
    path = tmp_path / "cookbook.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_cookbook(path)
    assert str(caught.value) == f"{path}:{said} ({hint})"


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "cookbook.yaml"
    path.write_text(
        "models:\n"
        "  - name: a:b\n"
        "    profiles:\n"
        "      - id: default\n"
        "        idle_timeout_seconds: soon\n"
        "        llama_server_args: --alias 'x\n"
        "      - {}\n"
        "  - name: A:B\n"
        "    profile: []\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_cookbook(path)
    assert [(problem.line, problem.path) for problem in caught.value.problems] == [
        (2, "models[0].name"),
        (5, "models[0].profiles[0].idle_timeout_seconds"),
        (6, "models[0].profiles[0].llama_server_args"),
        (7, "models[0].profiles[1].id"),
        (7, "models[0].profiles[1]"),
        (8, "models[1].name"),
        (8, "models[1].name"),
        (8, "models[1].profiles"),
        (9, "models[1].profile"),
    ]


@pytest.mark.parametrize("text", ["- a", "words", "5"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cookbook.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="must be a mapping of keys"):
        load_cookbook(path)


def test_a_cookbook_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_cookbook(tmp_path / "cookbook.yaml")
    missing = tmp_path / "cookbook.yaml"
    assert str(caught.value) == f"{missing}: doesn't exist (check the path; `llamesh init` writes one)"
