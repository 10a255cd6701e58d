"""Keys that have names, models and limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llamesh.config.access_keys import MOST_KEYS
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings, load_settings

SECRET = "hunter2-and-more"
HASHED = "sha256:" + "ab" * 32


def load(tmp_path: Path, text: str, secrets: str = "", **environ: str) -> Settings:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "secrets.yaml").write_text(secrets or "{}")
    return load_settings(tmp_path / "config.yaml", tmp_path / "secrets.yaml", environ)


def refused(tmp_path: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environ)
    assert SECRET not in str(caught.value)
    return [str(problem).removeprefix(f"{tmp_path}/") for problem in caught.value.problems]


def test_keys_without_names_are_called_by_their_place(tmp_path: Path) -> None:
    auth = load(
        tmp_path,
        f"""
auth:
  enabled: true
  allowed_keys: [{SECRET}, {{name: Alice, key: other}}, '{HASHED}']
  admin_keys: [boss]
""",
    ).auth
    assert [key.name for key in auth.allowed_keys] == ["key-1", "Alice", "key-3"]
    assert [key.name for key in auth.admin_keys] == ["admin-1"]
    assert SECRET not in f"{auth!r}{auth}{auth.model_dump()}{auth.model_dump_json()}"
    assert auth.allowed_keys[2].digest() == bytes.fromhex("ab" * 32)
    assert auth.administrators() == auth.admin_keys


def test_all_that_a_key_may_say(tmp_path: Path) -> None:
    auth = load(
        tmp_path,
        """
auth:
  admin_keys:
    - name: ops.team_1-a
      key: a key of words
      models: qwen*
      requests_per_minute: 1
      requests_per_day: 2
      tokens_per_minute: 3
      tokens_per_day: 4
      max_concurrent_requests: 5
    - {name: plain, key: k, models: , tokens_per_day: }
""",
    ).auth
    first, second = auth.admin_keys
    assert first.models == ("qwen*",)
    assert [getattr(first, name) for name in type(first).model_fields][3:] == [1, 2, 3, 4, 5]
    assert (first.is_restricted, second.is_restricted) == (True, False)


def test_without_admin_keys_those_administer_who_are_not_restricted(tmp_path: Path) -> None:
    auth = load(
        tmp_path,
        "auth: {allowed_keys: [a, {name: b, key: b}, {name: c, key: c, models: [m]}, "
        "{name: d, key: d, requests_per_day: 1}]}",
    ).auth
    assert [key.name for key in auth.administrators()] == ["key-1", "b"]


@pytest.mark.parametrize(
    ("patterns", "yes", "no"),
    [
        (["tiny"], ["tiny:default", "TINY:long"], ["tiny2:default", "a-tiny:default"]),
        (["Tiny:Long"], ["tiny:long"], ["tiny:default", "tiny:longer"]),
        (["qwen*"], ["qwen:x", "qwen3-8b:default"], ["my-qwen:default"]),
        (["*:fast", "b?.[x]"], ["a:fast", "b:fast", "b?.[x]:y"], ["a:slow", "bc.x:default"]),
        (["a*b*:*1"], ["ab:1", "a-x-b-y:v1"], ["ab:2", "a:b1"]),
        (["*"], ["a:b", "org/model.gguf:default"], []),
        (["org/*"], ["org/a/b:default"], ["other/a:default"]),
    ],
)
def test_patterns_of_models(tmp_path: Path, patterns: list[str], yes: list[str], no: list[str]) -> None:
    text = json.dumps({"auth": {"allowed_keys": [{"name": "a", "key": "b", "models": patterns}]}})
    pattern = load(tmp_path, text).auth.allowed_keys[0].models_pattern()
    assert pattern is not None
    assert [name for name in (*yes, *no) if pattern.fullmatch(name.casefold())] == yes


def test_the_environment_and_the_secrets_may_hold_mappings(tmp_path: Path) -> None:
    listed = json.dumps(["plain", {"name": "bob", "key": SECRET, "models": ["m*"]}])
    auth = load(tmp_path, "auth: {allowed_keys: [x]}", LLAMESH_AUTH__ALLOWED_KEYS=listed).auth
    assert [key.name for key in auth.allowed_keys] == ["key-1", "bob"]
    auth = load(
        tmp_path, "", "auth: {allowed_keys: [{name: eve, key: e}]}", LLAMESH_AUTH__ALLOWED_KEYS=listed
    ).auth
    assert [key.name for key in auth.allowed_keys] == ["eve"]
    (problem,) = refused(tmp_path, "", LLAMESH_AUTH__ADMIN_KEYS=json.dumps([{"name": "bob", "kee": SECRET}]))[
        :1
    ]
    assert problem.startswith("environment variable LLAMESH_AUTH__ADMIN_KEYS: auth.admin_keys[0]")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{key: k}", "auth.allowed_keys[0].name: is missing (every entry here needs `name:`)"),
        ("{name: a}", "auth.allowed_keys[0].key: is missing (every entry here needs `key:`)"),
        (
            f"{{name: {SECRET}!, key: k}}",
            "auth.allowed_keys[0].name: isn't a name for a key (1 to 64 letters, digits, `.`, `_` or `-`)",
        ),
        ("{name: 5, key: k}", "auth.allowed_keys[0].name: must be text (text; put it in quotes)"),
        ("{name: a, key: 5}", "auth.allowed_keys[0].key: a key isn't text (put it in quotes)"),
        (
            "{name: a, key: 'sha256:abc'}",
            "auth.allowed_keys[0].key: a hashed key isn't a SHA-256 "
            "(sha256: and 64 hexadecimal digits, or the key itself)",
        ),
        (
            "{name: a, key: k, modles: [m]}",
            "auth.allowed_keys[0].modles: unknown key (nearest: auth.allowed_keys[0].models)",
        ),
        (
            f"{{name: a, {SECRET}: k}}",
            "auth.allowed_keys[0]: holds an unknown key, which isn't repeated here: it may be a secret "
            "(it takes name, key, models, requests_per_minute, requests_per_day, tokens_per_minute, "
            "tokens_per_day, max_concurrent_requests)",
        ),
        (
            "{name: a, key: k, models: []}",
            "auth.allowed_keys[0].models: is empty (at least one entry, or leave the key out)",
        ),
        (
            "{name: a, key: k, models: ['a:b:c']}",
            "auth.allowed_keys[0].models[0]: not the name of a model: 'a:b:c' "
            "(`model` for all of its profiles, or `model:profile`; `*` stands for anything)",
        ),
        (
            "{name: a, key: k, requests_per_day: -1}",
            "auth.allowed_keys[0].requests_per_day: must be at least 0 (0 or more)",
        ),
        (
            "{name: a, key: k, tokens_per_minute: many}",
            "auth.allowed_keys[0].tokens_per_minute: must be a whole number (a whole number)",
        ),
        ("[a]", "auth.allowed_keys[0]: a key isn't text (put it in quotes)"),
    ],
)
def test_entries_that_are_refused(tmp_path: Path, entry: str, said: str) -> None:
    assert refused(tmp_path, f"auth:\n  allowed_keys:\n    - {entry}\n") == [f"config.yaml:3: {said}"]


@pytest.mark.parametrize(
    ("allowed", "admins", "said"),
    [
        (
            "[{name: a, key: k}, {name: A, key: l}]",
            "[]",
            "2: auth.allowed_keys[1].name: has the same name as auth.allowed_keys[0]: A",
        ),
        ("[{name: a, key: k}]", "[{name: a, key: l}]", "3: auth.admin_keys[0].name: has the same name as"),
        ("[{name: key-2, key: k}, l]", "[]", "2: auth.allowed_keys[1]: has the same name as"),
        (
            "[{name: a, key: k}]",
            "[{name: a, key: k}]",
            "3: auth.admin_keys[0].key: the same key as auth.allowed_keys[0] "
            "(one entry for each key; one of admin_keys may do all that allowed_keys may)",
        ),
        ("[k, {name: a, key: k}]", "[]", "2: auth.allowed_keys[1].key: the same key as auth.allowed_keys[0]"),
        (
            "[{name: a, key: hunter2}]",
            "['sha256:f52fbd32b2b3b86ff88ef6c490628285f482af15ddcb29541f94bcf526a3f6c7']",
            "3: auth.admin_keys[0].key: the same key as auth.allowed_keys[0]",
        ),
    ],
)
def test_names_and_keys_that_are_there_twice(tmp_path: Path, allowed: str, admins: str, said: str) -> None:
    (problem,) = refused(tmp_path, f"auth:\n  allowed_keys: {allowed}\n  admin_keys: {admins}\n")
    assert problem.startswith(f"config.yaml:{said}")


def test_a_plain_key_may_be_in_both_lists_as_ever(tmp_path: Path) -> None:
    load(tmp_path, "auth: {allowed_keys: [k, k], admin_keys: [k]}")


def test_there_is_an_end(tmp_path: Path) -> None:
    keys = [f"k{number}" for number in range(MOST_KEYS + 1)]
    (problem,) = refused(tmp_path, json.dumps({"auth": {"allowed_keys": keys}}))
    assert "auth.allowed_keys: holds 1001 keys (at most 1000)" in problem
    load(tmp_path, json.dumps({"auth": {"allowed_keys": keys[1:]}}))
