"""config.yaml: defaults as documented, every rule, every refusal with its file and line."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from llamesh.config.peers import StaticPeer
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Address, Settings, default_node_id, load_settings


def load(tmp_path: Path, text: str, secrets: str | None = None, **environ: str) -> Settings:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    secret_path = None
    if secrets is not None:
        secret_path = tmp_path / "secrets.yaml"
        secret_path.write_text(secrets)
    return load_settings(path, secret_path, environ)


def problems(tmp_path: Path, text: str, secrets: str | None = None, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, secrets, **environ)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


def test_nothing_at_all_is_a_configuration(tmp_path: Path) -> None:
    assert load_settings(None, None, {}) == load(tmp_path, "") == Settings()
    assert load(tmp_path, "cluster:\n  noise:\nhttp:\nllama_cpp:\n  build_args:\nmax_hops:\n") == Settings()


def test_the_defaults_are_the_documented_ones() -> None:
    defaults = Settings()
    assert str(defaults.listen_addr) == "127.0.0.1:8080"
    assert (defaults.max_vram_mb, defaults.max_sysmem_mb, defaults.public_url) == (None, None, None)
    assert (defaults.max_instances_per_node, defaults.max_hops) == (100, 10)
    assert defaults.metrics_path == Path("node-metrics.json")
    assert defaults.model_defaults.max_wait_in_queue_ms == 60_000
    assert defaults.model_defaults.min_eviction_tenure_secs == 15
    assert defaults.llama_cpp_ports.all_ports() is None
    assert defaults.llama_cpp.build_command_args == ("-j",)
    assert defaults.cluster.noise.config_dir == Path("~/.llama-mesh").expanduser()
    assert defaults.cluster.circuit_breaker.open_duration_max_ms == 60_000
    assert defaults.http.request_body_limit_bytes == 104_857_600
    assert defaults.auth.required_header == "x-api-key"
    assert defaults.wedge_detector.window_ms == 600_000


def test_the_node_is_called_like_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for host, node_id in [
        ("box.lan", "box.lan"),
        ("Mike's Mac!", "Mike-s-Mac"),
        ("", "node"),
        ("é", "node"),
        ("x" * 90, "x" * 64),
    ]:
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        assert default_node_id() == Settings().node_id == node_id


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("[::1]:8080", "::1", 8080),
        ("[fe80::1%eth0]:80", "fe80::1%eth0", 80),
        ("localhost:65535", "localhost", 65535),
        ("my-host.example.org:1", "my-host.example.org", 1),
    ],
)
def test_an_address_is_read_and_gives_its_text_back(text: str, host: str, port: int) -> None:
    address = Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, text)


@given(st.ip_addresses().map(str), st.integers(0, 65535))
def test_every_ip_address_survives_its_text(host: str, port: int) -> None:
    assert Address.parse(str(Address(host, port))) == Address(host, port)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert Address.parse(text).host


def test_loopback() -> None:
    assert all(Address.parse(text).is_loopback for text in ("127.3.2.1:1", "[::1]:1", "localhost:1"))
    assert not any(Address.parse(text).is_loopback for text in ("0.0.0.0:1", "[::]:1", "box:1", "10.0.0.1:1"))


_KEY = "noise25519:" + "A" * 43 + "="


@pytest.mark.parametrize(
    "text",
    [
        "listen_addr: 127.0.0.1:8080\nllama_cpp_ports: {ranges: [{start: 8081, end: 8081}]}",
        "llama_cpp_ports: {}",
        "public_url: https://node.example.org:8443/",
        "public_url: '[::1]:80'",
        "max_vram_mb: 0\nmax_instances_per_node: 1",
        f"cluster: {{noise: {{allowed_keys: ['{_KEY}']}}}}",
        "cluster: {enabled: true, noise: {enabled: false}}",
        "cluster: {listen_addr: 0.0.0.0:8081, gossip_interval_seconds: 0.25}",
        "cluster: {peers: [{address: 'a:1', wake_mac: , node_id: }, '[::1]:2']}",
        "cluster: {discovery: {service_name: _a-1-b._udp.local.}}",
        "cluster: {circuit_breaker: {half_open_probe_interval_ms: 0}}",
        "http: {stream_keepalive_seconds: 0, cors_allowed_origins: ['*', 'https://a.example.org:1']}",
        "auth: {enabled: true, admin_keys: [hunter2]}",
        f"auth: {{enabled: true, allowed_keys: ['sha256:{'aB' * 32}']}}",
        "server_tls: {enabled: false, cert_path: /nowhere/at/all}",
    ],
)
def test_accepts(tmp_path: Path, text: str) -> None:
    load(tmp_path, text)


def test_ports_are_joined_inclusive_and_once(tmp_path: Path) -> None:
    text = (
        "llama_cpp_ports: {ports: [9003, 9001], ranges: [{start: 9002, end: 9004}, {start: 9000, end: 9000}]}"
    )
    assert load(tmp_path, text).llama_cpp_ports.all_ports() == (9000, 9001, 9002, 9003, 9004)


@pytest.mark.parametrize(
    "mac", ["aa:bb:cc:dd:ee:0f", "AA-BB-CC-DD-EE-0F", "aabbccddee0f", " aa:bb:cc:dd:ee:0f "]
)
def test_a_peer_that_says_more(tmp_path: Path, mac: str) -> None:
    entry = f"{{address: 'nas.lan:8080', wake_mac: '{mac}', node_id: nas}}"
    loaded = load(tmp_path, f"cluster: {{peers: [{entry}, 'box:1']}}")
    nas, box = loaded.cluster.peers
    assert nas == StaticPeer(Address("nas.lan", 8080), "aa:bb:cc:dd:ee:0f", "nas")
    assert box == StaticPeer(Address("box", 1))
    assert len({nas, box}) == 2
    # What is written out can be read again.
    dumped = loaded.model_dump()["cluster"]["peers"]
    assert dumped == (
        {"address": "nas.lan:8080", "wake_mac": "aa:bb:cc:dd:ee:0f", "node_id": "nas"},
        "box:1",
    )
    assert Settings.model_validate({"cluster": {"peers": dumped}}).cluster.peers == (nas, box)


def test_everything_wrong_is_told_at_once_in_the_order_of_the_lines(tmp_path: Path) -> None:
    text = "max_hops: x\nauth: {enabled: true}\nhtt: {}\nmax_hops: 3\nllama_cpp_ports: {ports: [8080]}\n"
    found = problems(tmp_path, text, secrets="node_id: '/'\n", LLAMESH_FOO="1", LLAMESH_MAX_VRAM_MB="x")
    assert [line.partition(": ")[0] for line in found] == [
        "config.yaml:1",
        "config.yaml:2",
        "config.yaml:3",
        "config.yaml:4",
        "config.yaml:5",
        "environment variable LLAMESH_FOO",
        "secrets.yaml:1",
        "environment variable LLAMESH_MAX_VRAM_MB",
    ]


def test_secrets_go_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    text = "node_id: file\nmax_hops: 1\nmax_vram_mb: 1\n"
    text += "http: {body_read_timeout_ms: 1, idle_timeout_seconds: 1}\n"
    merged = load(
        tmp_path,
        text,
        secrets="node_id: secret\nhttp:\n  idle_timeout_seconds: 3\nauth:\ncluster:\n",
        LLAMESH_NODE_ID="environment",
        LLAMESH_MAX_HOPS="2",
        LLAMESH_HTTP__IDLE_TIMEOUT_SECONDS="2",
    )
    assert (merged.node_id, merged.max_hops, merged.max_vram_mb) == ("secret", 2, 1)
    assert (merged.http.body_read_timeout_ms, merged.http.idle_timeout_seconds) == (1, 3)


def test_an_error_names_the_layer_that_the_value_came_from(tmp_path: Path) -> None:
    found = problems(tmp_path, "max_hops: 1\nhttp: {idle_timeout_seconds: 1}", secrets="\nmax_hops: x\n")
    assert found == ["secrets.yaml:2: max_hops: must be a whole number, not 'x' (a whole number)"]
    section = '{"idle_timeout_seconds": "x", "cors_allowed_origins": 5}'
    found = problems(tmp_path, "http: {idle_timeout_seconds: 1}", LLAMESH_HTTP=section)
    assert [line.partition(": must")[0] for line in found] == [
        "environment variable LLAMESH_HTTP: http.idle_timeout_seconds",
        "environment variable LLAMESH_HTTP: http.cors_allowed_origins",
    ]
    found = problems(tmp_path, "", secrets="cluster: {noise: {tofu: false}}", LLAMESH_CLUSTER='{"noise": 5}')
    assert found == [
        "environment variable LLAMESH_CLUSTER: cluster.noise: must be a mapping of keys"
        " (put its keys below it, indented)"
    ]
    found = problems(tmp_path, "http: 5", secrets="http: {idle_timeout_seconds: 0}")
    assert found == [
        "config.yaml:1: http: must be a mapping of keys (put its keys below it, indented)",
        "secrets.yaml:1: http.idle_timeout_seconds: must be above 0, not 0 (more than 0)",
    ]


def test_a_missing_file_counts_only_where_it_was_asked_for(tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere.yaml"
    assert load_settings(nowhere, nowhere, {}, required=False, secrets_required=False) == Settings()
    with pytest.raises(ConfigError) as caught:
        load_settings(nowhere, tmp_path, {})
    assert str(caught.value) == (
        f"{nowhere}: doesn't exist (check the path)\n{tmp_path}: is a directory (name the YAML file in it)"
    )
    nowhere.symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError):  # a dangling link is a mistake, not an absence
        load_settings(nowhere, None, {}, required=False)


def test_keys_are_never_shown(tmp_path: Path) -> None:
    loaded = load(tmp_path, "auth: {enabled: true, allowed_keys: [hunter2]}")
    assert "hunter2" not in f"{loaded!r} {loaded} {loaded.model_dump()} {loaded.model_dump_json()}"
    assert [key.get_secret_value() for key in loaded.auth.allowed_keys] == ["hunter2"]
    for text in ("auth: hunter2", "auth: {allowed_keys: hunter2}", "auth: {allowed_keys: ['hunter2 ']}"):
        assert "hunter2" not in "".join(problems(tmp_path, text)), text
    assert "hunter2" not in "".join(problems(tmp_path, "", LLAMESH_AUTH="hunter2"))
    assert "hunter2" not in "".join(problems(tmp_path, "", LLAMESH_AUTH__ALOWED_KEYS="hunter2"))


def test_settings_know_where_they_came_from_and_are_equal_without_it(tmp_path: Path) -> None:
    loaded = load(tmp_path, "# first\nmax_hops: 3\ncluster:\n  peers: [a:1]\n")
    assert loaded.origin("max_hops").line == 2
    assert loaded.origin("cluster", "peers", 0).line == 4
    assert loaded.origin("cluster", "peers", 7, "x").line == 4
    assert loaded.origin("node_id").line is None
    assert loaded == load(tmp_path, "cluster: {peers: [a:1]}\nmax_hops: 3")
    assert loaded != load(tmp_path, "max_hops: 3")


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        setattr(Settings(), "max_hops", 3)  # noqa: B010 - the type checker knows already


def test_a_strange_key_is_shown_harmlessly(tmp_path: Path) -> None:
    (line,) = problems(tmp_path, '"\\e[2J\\n": 1')
    assert line.startswith(r"config.yaml:1: '\x1b[2J\n': unknown key")
    (line,) = problems(tmp_path, "x" * 900 + ": 1")
    assert len(line) < 160
