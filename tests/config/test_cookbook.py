"""The cookbook: profiles as written, names that find them, and every refusal with its line."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamesh.config.cookbook import (
    Cookbook,
    FromArguments,
    HubFile,
    ModelPath,
    Profile,
    UrlFile,
    load_cookbook,
)
from llamesh.config.problems import ConfigError


def load(tmp_path: Path, text: str) -> Cookbook:
    path = tmp_path / "cookbook.yaml"
    path.write_text(text)
    return load_cookbook(path)


def one(tmp_path: Path, profile: str) -> Profile:
    (found,) = load(tmp_path, f"models: [{{name: m, profiles: [{{id: default, {profile}}}]}}]").profiles
    return found


def test_a_profile_has_what_was_written_and_defaults_for_the_rest(tmp_path: Path) -> None:
    found = one(tmp_path, "model_path: /m.gguf")
    assert found == Profile("m", "default", "", "", ModelPath("/m.gguf"))
    assert (found.idle_timeout_seconds, found.startup_timeout_seconds) == (300, 60)
    assert (found.download_timeout_seconds, found.min_instances, found.max_instances) == (3600, 0, None)
    text = """
models:
  - name: Big
    description: of the model
    aliases: [huge]
    profiles:
      - id: Long
        description: of the profile
        hf_repo: owner/name:Q4_K_M
        hf_file: sub/f.gguf
        llama_server_args: >-
          -c 4096
          --chat-template-kwargs '{"a": "b c"}'
        idle_timeout_seconds: 0
        startup_timeout_seconds: 1.5
        download_timeout_seconds: 2
        max_instances: 3
        min_instances: 1
        max_queue_size: 4
        max_wait_in_queue_ms: 5
        max_request_duration_ms: 6
        min_eviction_tenure_secs: 7.5
        estimated_vram_mb: 8
        estimated_sysmem_mb: 9
"""
    cookbook = load(tmp_path, text)
    assert cookbook.aliases == {"huge": "Big"}
    assert cookbook.listed() == (
        Profile(
            model="Big",
            id="Long",
            model_description="of the model",
            description="of the profile",
            source=HubFile("owner/name:Q4_K_M", "sub/f.gguf"),
            arguments=("-c", "4096", "--chat-template-kwargs", '{"a": "b c"}'),
            kind="text",
            idle_timeout_seconds=0,
            startup_timeout_seconds=1.5,
            download_timeout_seconds=2,
            max_instances=3,
            min_instances=1,
            max_queue_size=4,
            max_wait_in_queue_ms=5,
            max_request_duration_ms=6,
            min_eviction_tenure_secs=7.5,
            estimated_vram_mb=8,
            estimated_sysmem_mb=9,
        ),
    )
    assert (cookbook.profiles[0].key, cookbook.profiles[0].public_name) == ("Big:Long", "Big:Long")


def test_no_models_is_a_cookbook(tmp_path: Path) -> None:
    for text in ("", "models:\n", "models: []\n", "# none yet\n"):
        assert load(tmp_path, text) == Cookbook()
    assert Cookbook().find("m") is None


def test_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert one(tmp_path, "model_path: ~/m.gguf").source == ModelPath("/home/someone/m.gguf")
    assert one(tmp_path, "model_path: sub/m.gguf").source == ModelPath(str(tmp_path / "sub/m.gguf"))
    assert one(tmp_path, "hf_repo: a/b").source == HubFile("a/b", None)
    web = one(tmp_path, f"url: 'https://x.example/m.gguf', sha256: {'AB' * 32}")
    assert web.source == UrlFile("https://x.example/m.gguf", "ab" * 32)
    found = one(tmp_path, "llama_server_args: -c 1 -hf a/b:Q8_0 -ngl 9")
    assert found.source == FromArguments("-hf", "a/b:Q8_0")
    assert found.arguments == ("-c", "1", "-hf", "a/b:Q8_0", "-ngl", "9")


def test_a_relative_path_counts_from_the_cookbook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(tmp_path, "models: [{name: m, profiles: [{id: default, model_path: m.gguf}]}]")
    monkeypatch.chdir(tmp_path)
    assert load_cookbook(Path("cookbook.yaml")).profiles[0].source == ModelPath(str(tmp_path / "m.gguf"))


def test_an_api_key_leaves_the_arguments_and_is_not_shown(tmp_path: Path) -> None:
    found = one(tmp_path, "model_path: /m, llama_server_args: -c 1 --api-key hunter2 -ngl 9")
    assert found.api_key == "hunter2"
    assert found.arguments == ("-c", "1", "-ngl", "9")
    assert "hunter2" not in repr(found)
    with pytest.raises(ConfigError) as caught:
        one(tmp_path, "llama_server_args: --api-key hunter2")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        one(tmp_path, "llama_server_args: [--api-key, hunter2]")
    assert "hunter2" not in str(caught.value)


def test_what_is_switched_off_is_not_there(tmp_path: Path) -> None:
    cookbook = load(
        tmp_path,
        """
models:
  - name: off
    enabled: false
    aliases: [gone]
    profiles: [{id: default, model_path: /m}]
  - name: "on"
    profiles:
      - {id: default, model_path: /m, enabled: false}
      - {id: other, model_path: /m, max_instances: 0}
""",
    )
    assert [profile.key for profile in cookbook.listed()] == ["on:other"]
    assert cookbook.aliases == {}
    assert not any(cookbook.find(name) for name in ("off", "off:default", "gone", "on", "on:default"))
    assert cookbook.find("ON:OTHER") is cookbook.profiles[0]


def test_cookbooks_do_not_change(tmp_path: Path) -> None:
    cookbook = load(tmp_path, "models: [{name: m, aliases: [a], profiles: [{id: default, model_path: /m}]}]")
    with pytest.raises(FrozenInstanceError):
        cookbook.profiles = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        cookbook.aliases["b"] = "m"  # type: ignore[index]


# Letters whose cases go back and forth: "ß" and "ı" don't, and casefold has its own opinion of them.
_LETTERS = st.text(alphabet="abcXYZ019-._/éÖж", min_size=1, max_size=8)


@st.composite
def cookbooks(draw: st.DrawFn) -> Cookbook:
    names = draw(st.lists(_LETTERS, min_size=1, max_size=8, unique_by=str.casefold))
    models = draw(st.integers(1, len(names)))
    profiles = [
        Profile(name, id_, "", "", ModelPath("/m"))
        for name in names[:models]
        for id_ in draw(
            st.lists(
                _LETTERS | st.sampled_from(["default", "Default"]),
                min_size=1,
                max_size=3,
                unique_by=str.casefold,
            )
        )
    ]
    aliases = {alias: draw(st.sampled_from(names[:models])) for alias in names[models:]}
    return Cookbook(tuple(profiles), aliases)


@given(cookbooks(), st.sampled_from([str, str.upper, str.lower, str.swapcase, str.title]))
def test_every_way_to_write_a_name_finds_its_profile(cookbook: Cookbook, cased: type[str]) -> None:
    for profile in cookbook.listed():
        names = [
            profile.model,
            *(alias for alias, model in cookbook.aliases.items() if model == profile.model),
        ]
        for name in names:
            assert cookbook.find(cased(f"{name}:{profile.id}")) is profile
            bare = cookbook.find(cased(name))
            assert (bare is profile) == (profile.id.casefold() == "default")
        assert cookbook.find(cased(profile.public_name)) is profile
        assert cookbook.find(cased(profile.key)) is profile


@given(cookbooks(), st.text(max_size=12))
def test_a_name_that_nobody_has_finds_nothing(cookbook: Cookbook, name: str) -> None:
    known = {profile.model.casefold() for profile in cookbook.listed()}
    known |= {alias.casefold() for alias in cookbook.aliases}
    if name.casefold().partition(":")[0] not in known:
        assert cookbook.find(name) is None
    for profile in cookbook.listed():
        assert cookbook.find(f"{profile.key}:{name}") is None
        assert cookbook.find(f"{profile.model}:") is None


@given(cookbooks())
def test_public_names_are_unique(cookbook: Cookbook) -> None:
    names = [profile.public_name.casefold() for profile in cookbook.listed()]
    assert len(set(names)) == len(names)
