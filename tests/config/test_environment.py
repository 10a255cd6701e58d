"""`LLAMESH_*` variables: names from the schema, lists in both spellings, and no silent typo."""

from __future__ import annotations

import pytest

from llamesh.config.environment import variable_name
from llamesh.config.peers import StaticPeer
from llamesh.config.problems import ConfigError
from llamesh.config.schema import keys_of
from llamesh.config.settings import Address, Settings, load_settings


def load(**environ: str) -> Settings:
    return load_settings(None, None, environ)


def problems(**environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(**environ)
    return str(caught.value).splitlines()


def test_values_of_every_kind() -> None:
    loaded = load(
        LLAMESH_CLUSTER__ENABLED="true",
        LLAMESH_MAX_VRAM_MB="48000",
        LLAMESH_LISTEN_ADDR="127.0.0.1:0",
        LLAMESH_METRICS_PATH="/tmp/m.json",
        LLAMESH_CLUSTER__GOSSIP_INTERVAL_SECONDS="0.5",
        LLAMESH_CLUSTER__NOISE__CONFIG_DIR="/keys",
        llamesh_max_hops="3",
    )
    assert loaded.cluster.enabled is True
    assert loaded.max_vram_mb == 48000
    assert loaded.listen_addr.port == 0
    assert str(loaded.metrics_path) == "/tmp/m.json"
    assert loaded.cluster.gossip_interval_seconds == 0.5
    assert str(loaded.cluster.noise.config_dir) == "/keys"
    assert loaded.max_hops == 3


@pytest.mark.parametrize("peers", ["a:1,b:2", " a:1 , b:2 ,", '["a:1", "b:2"]'])
def test_lists_are_json_or_comma_separated(peers: str) -> None:
    assert [str(peer) for peer in load(LLAMESH_CLUSTER__PEERS=peers).cluster.peers] == ["a:1", "b:2"]


def test_a_list_may_hold_mappings() -> None:
    peers = '["a:1", {"address": "b:2", "wake_mac": "AA-BB-CC-DD-EE-0F", "node_id": "b"}]'
    plain, more = load(LLAMESH_CLUSTER__PEERS=peers).cluster.peers
    assert plain == StaticPeer(Address("a", 1), None, None)
    assert more == StaticPeer(Address("b", 2), "aa:bb:cc:dd:ee:0f", "b")


def test_lists_of_other_things() -> None:
    loaded = load(
        LLAMESH_LLAMA_CPP_PORTS__PORTS="9001,9002",
        LLAMESH_LLAMA_CPP_PORTS__RANGES='[{"start": 9005, "end": 9006}]',
        LLAMESH_AUTH__ALLOWED_KEYS="one,two",
        LLAMESH_CLUSTER__DISCOVERY__INTERFACES="lo,eth0",
        LLAMESH_LLAMA_CPP__BUILD_ARGS="[]",
    )
    assert loaded.llama_cpp_ports.all_ports() == (9001, 9002, 9005, 9006)
    assert len(loaded.auth.allowed_keys) == 2
    assert loaded.cluster.discovery.interfaces == ("lo", "eth0")
    assert loaded.llama_cpp.build_args == ()


def test_a_section_as_json_is_refined_by_its_keys() -> None:
    loaded = load(
        LLAMESH_CLUSTER__NOISE__TOFU="false",
        LLAMESH_CLUSTER__NOISE='{"tofu": true, "session_ttl_seconds": 60}',
        LLAMESH_HTTP='{"idle_timeout_seconds": 7}',
    )
    assert loaded.cluster.noise.tofu is False
    assert loaded.cluster.noise.session_ttl_seconds == 60
    assert loaded.http.idle_timeout_seconds == 7


def test_an_empty_variable_sets_nothing() -> None:
    assert load(LLAMESH_PUBLIC_URL="", LLAMESH_CLUSTER__PEERS="", LLAMESH_MAX_HOPS="") == Settings()


def test_other_variables_are_none_of_our_business() -> None:
    others = {"CLUSTER_TOKEN": "x", "NODE_PRIVATE_KEY": "x", "PATH": "x", "LLAMA_ARG_MODEL": "x"}
    assert load(**others, LLAMESH_TEST_LLAMA_SERVER="x", LLAMESH_CI_CACHE="x", NODE_ID="x") == Settings()


def test_a_variable_that_means_no_key() -> None:
    assert problems(LLAMESH_CLUSTER_ENABLED="true", LLAMESH_MAX_VRAM="", LLAMESH_NODE_ID__X="1") == [
        "environment variable LLAMESH_CLUSTER_ENABLED: sets no known key"
        " (nearest: LLAMESH_CLUSTER__ENABLED, for cluster.enabled)",
        "environment variable LLAMESH_MAX_VRAM: sets no known key"
        " (nearest: LLAMESH_MAX_VRAM_MB, for max_vram_mb)",
        "environment variable LLAMESH_NODE_ID__X: sets no known key (nearest: LLAMESH_NODE_ID, for node_id)",
    ]


def test_a_value_of_the_wrong_kind_names_its_variable() -> None:
    assert problems(
        LLAMESH_MAX_HOPS="many",
        LLAMESH_LLAMA_CPP_PORTS__PORTS="9001,x",
        LLAMESH_HTTP="3",
        LLAMESH_LOGGING='{"enabled": tru',
        LLAMESH_CLUSTER='{"enabld": true}',
        LLAMESH_LLAMA_CPP__BUILD_ARGS="[" * 100_000,
    ) == [
        "environment variable LLAMESH_MAX_HOPS: max_hops:"
        " must be a whole number, not 'many' (a whole number)",
        "environment variable LLAMESH_LLAMA_CPP_PORTS__PORTS: llama_cpp_ports.ports[1]:"
        " must be a whole number, not 'x' (a whole number)",
        "environment variable LLAMESH_LLAMA_CPP__BUILD_ARGS: llama_cpp.build_args:"
        f" must be a list, not '{'[' * 60}...' (a list, such as [a, b])",
        "environment variable LLAMESH_CLUSTER: cluster.enabld: unknown key (nearest: cluster.enabled)",
        "environment variable LLAMESH_HTTP: http: must be a mapping of keys, not '3'"
        " (its keys below it, indented)",
        "environment variable LLAMESH_LOGGING: logging: must be a mapping of keys, not '{\"enabled\": tru'"
        " (its keys below it, indented)",
    ]


def test_every_key_has_a_variable() -> None:
    names = [variable_name(key) for key in keys_of(Settings) if "[]" not in key]
    assert "LLAMESH_CLUSTER__CIRCUIT_BREAKER__HALF_OPEN_PROBE_INTERVAL_MS" in names
    # Set to nothing, each is accepted: none is taken for a typo, none is read in two ways.
    assert load(**dict.fromkeys(names, "")) == Settings()
    assert len(set(names)) == len(names)
