"""What `llamesh check` decides: who has room beside whom, and what is worth a warning."""

from __future__ import annotations

from typing import Any

import pytest

from llamesh.commands.check.judge import Candidate, judge, warnings
from llamesh.config.cookbook import Cookbook, ModelPath, Profile
from llamesh.config.settings import Settings
from llamesh.core.capacity import Budget, Need

BUDGET = Budget(10, vram=1000, sysmem=8000)


def profile(name: str, id_: str = "default", *arguments: str, **more: Any) -> Profile:
    return Profile(name, id_, "", "", ModelPath(f"/{name}.gguf"), arguments, **more)


def candidate(name: str, vram: int, sysmem: int = 100, **more: Any) -> Candidate:
    return Candidate(profile(name, **more), Need(vram, sysmem))


def verdicts(*candidates: Candidate, budget: Budget = BUDGET) -> dict[str, str]:
    return {key.partition(":")[0]: found.verdict for key, found in judge(candidates, budget).items()}


def test_all_at_once_one_at_a_time_and_never() -> None:
    assert verdicts(candidate("a", 400), candidate("b", 600)) == {"a": "fits", "b": "fits"}
    both = judge([candidate("a", 600), candidate("b", 600), candidate("c", 1001)], BUDGET)
    assert [found.verdict for found in both.values()] == ["eviction", "eviction", "never"]
    assert "b would leave" in both["a:default"].why
    assert "1001 MiB of GPU memory" in both["c:default"].why


def test_one_that_never_fits_is_in_nobodys_way() -> None:
    assert verdicts(candidate("a", 900), candidate("huge", 5000)) == {"a": "fits", "huge": "never"}


def test_what_is_kept_loaded_cannot_leave() -> None:
    found = judge([candidate("kept", 700, min_instances=1), candidate("b", 600)], BUDGET)
    assert found["kept:default"].verdict == "eviction"
    assert found["b:default"].verdict == "never"
    assert "min_instances" in found["b:default"].why
    twice = verdicts(candidate("kept", 300, min_instances=3), candidate("b", 200))
    assert twice["b"] == "never"


def test_listed_unknown_and_too_large() -> None:
    found = judge(
        [
            candidate("listed", 1, max_instances=0),
            Candidate(profile("unknown"), None),
            Candidate(profile("long"), Need(1, 1), too_large="not even 8192 tokens"),
        ],
        BUDGET,
    )
    assert [one.verdict for one in found.values()] == ["listed", "unknown", "never"]
    assert found["long:default"].why == "not even 8192 tokens"


def test_small_models_make_room_for_themselves_on_the_cpu() -> None:
    small = Candidate(profile("embed", kind="embedding"), Need(200, 50), cpu_only=Need(0, 300))
    assert verdicts(candidate("a", 900), small) == {"a": "eviction", "embed": "fits"}


def test_no_more_instances_than_allowed() -> None:
    budget = Budget(1, vram=1000)
    assert verdicts(candidate("a", 1), candidate("b", 1), budget=budget) == {"a": "eviction", "b": "eviction"}
    assert verdicts(candidate("a", 1), budget=Budget(0)) == {"a": "never"}


def settings(**document: Any) -> Settings:
    return Settings.model_validate(document)


def test_nothing_to_warn_of() -> None:
    assert warnings(settings(), Cookbook((profile("a"),))) == []


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"listen_addr": "0.0.0.0:1"}, "auth.enabled is false"),
        ({"listen_addr": "0.0.0.0:1", "auth": {"enabled": True, "allowed_keys": ["k"]}}, "in the clear"),
        ({"auth": {"allowed_keys": ["k"]}}, "while auth.enabled is false: auth.allowed_keys"),
        ({"server_tls": {"cert_path": "c"}}, "server_tls.cert_path"),
        ({"cluster": {"peers": ["a:1"]}}, "cluster.peers"),
        ({"cluster": {"noise": {"enabled": False}}}, "cluster.noise.enabled has no effect"),
        ({"logging": {"filename": "x.log"}}, "logging.filename"),
        ({"cluster": {"circuit_breaker": {"enabled": False, "failure_threshold": 1}}}, "failure_threshold"),
    ],
)
def test_settings_to_warn_of(document: dict[str, Any], said: str) -> None:
    [warning] = warnings(settings(**document), Cookbook())
    assert said in warning


@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ([profile("a", "default", "--port", "8080")], "the port of listen_addr"),
        (
            [profile("a", "default", "--port", "9"), profile("b", "default", "--port", "9")],
            "a:default, b:def",
        ),
        ([profile("a", "default", "--port", "9", max_instances=2)], "allows one instance, not 2"),
        ([profile("a", "long")], "ask for a:long"),
        ([profile("a", min_instances=2)], "above model_defaults.max_instances_per_model (1)"),
    ],
)
def test_profiles_to_warn_of(profiles: list[Profile], said: str) -> None:
    [warning] = warnings(settings(), Cookbook(tuple(profiles)))
    assert said in warning


def test_too_few_ports_and_too_many_instances() -> None:
    kept = Cookbook((profile("a", min_instances=1), profile("b", min_instances=1)))
    said = warnings(settings(llama_cpp_ports={"ports": [9]}, max_instances_per_node=1), kept)
    assert len(said) == 2
    assert "1 ports for the 2 instances" in said[0]


def test_a_model_of_models_dir_that_an_alias_hides() -> None:
    cookbook = Cookbook((profile("a"),), {"gpt": "a"})
    found = (profile("GPT"), profile("other"))
    [warning] = warnings(settings(), cookbook.with_found(found), found)
    assert warning == "models_dir holds a model GPT that the alias gpt of a hides; rename one of them"
