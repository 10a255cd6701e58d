"""Every value that config.yaml refuses: exactly what is said about it, and on which line."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamesh.config.problems import ConfigError
from llamesh.config.settings import load_settings

ADDRESS = "such as 127.0.0.1:8080, [::1]:8080 or name:8080; 0.0.0.0:8080 for every interface"

# The file, `line: path: what is wrong`, and what would be right.
REFUSALS = [
    ("node_id: a b", "1: node_id: not a node id: 'a b'", "1 to 64 letters, digits, `.`, `_` or `-`"),
    ("node_id: ''", "1: node_id: not a node id: ''", "1 to 64 letters, digits, `.`, `_` or `-`"),
    (
        f"node_id: {'a' * 65}",
        f"1: node_id: not a node id: '{'a' * 60}...'",
        "1 to 64 letters, digits, `.`, `_` or `-`",
    ),
    ("node_id: 12", "1: node_id: must be text, not 12", "text; put it in quotes"),
    (
        "\nlisten_addr: 8080",
        "2: listen_addr: not an address: 8080",
        "such as 127.0.0.1:8080 or [::1]:8080, in quotes",
    ),
    ("listen_addr: '8080'", "1: listen_addr: not an address: '8080': has no port", ADDRESS),
    ("listen_addr: ':80'", "1: listen_addr: not an address: ':80': has no host", ADDRESS),
    (
        "listen_addr: '::1:80'",
        "1: listen_addr: not an address: '::1:80': an IPv6 address needs brackets",
        ADDRESS,
    ),
    (
        "listen_addr: '[x]:80'",
        "1: listen_addr: not an address: '[x]:80': the brackets don't hold an IPv6 address",
        ADDRESS,
    ),
    (
        "listen_addr: 1.2.3.400:80",
        "1: listen_addr: not an address: '1.2.3.400:80': the host isn't an IPv4 address",
        ADDRESS,
    ),
    (
        "listen_addr: 'a b:80'",
        "1: listen_addr: not an address: 'a b:80': the host is neither a name nor an IP address",
        ADDRESS,
    ),
    (
        "listen_addr: a:65536",
        "1: listen_addr: not an address: 'a:65536': the port isn't a number from 0 to 65535",
        ADDRESS,
    ),
    (
        "public_url: ftp://a",
        "1: public_url: not an address for peers: 'ftp://a'",
        "host:port, or http://host:port",
    ),
    ("public_url: a:0", "1: public_url: not an address for peers: 'a:0'", "host:port, or http://host:port"),
    ("max_vram_mb: -1", "1: max_vram_mb: must be at least 0, not -1", "0 or more"),
    ("max_vram_mb: true", "1: max_vram_mb: not a whole number: true", "a whole number"),
    ("max_vram_mb: 1.5", "1: max_vram_mb: must be a whole number, not 1.5", "a whole number"),
    ("max_vram_mb: 8GB", "1: max_vram_mb: must be a whole number, not '8GB'", "a whole number"),
    (
        f"max_vram_mb: {10**40}",
        "1: max_vram_mb: must be at most 9007199254740992, not a huge number",
        "9007199254740992 or less",
    ),
    ("max_instances_per_node: 0", "1: max_instances_per_node: must be at least 1, not 0", "1 or more"),
    (
        "shutdown_grace_period_seconds: .nan",
        "1: shutdown_grace_period_seconds: not a finite number: nan",
        "a number",
    ),
    (
        "default_model: a:b:c",
        "1: default_model: not the name of a model: 'a:b:c'",
        "`model` or `model:profile`",
    ),
    ("metrics_path: 5", "1: metrics_path: not a path: 5", "a path, such as ./folder/file or ~/folder"),
    (
        "llama_cpp_ports:\n  ports: []",
        "1: llama_cpp_ports: holds no port at all",
        "name some, or leave it out: then the system picks",
    ),
    (
        "llama_cpp_ports:\n  ranges: []",
        "1: llama_cpp_ports: holds no port at all",
        "name some, or leave it out: then the system picks",
    ),
    ("llama_cpp_ports:\n  ports: [0]", "2: llama_cpp_ports.ports[0]: must be at least 1, not 0", "1 or more"),
    (
        "llama_cpp_ports:\n  ports:\n    - 1\n    - 65536",
        "4: llama_cpp_ports.ports[1]: must be at most 65535, not 65536",
        "65535 or less",
    ),
    (
        "llama_cpp_ports:\n  ranges:\n    - start: 9\n      end: 8",
        "3: llama_cpp_ports.ranges[0]: the range 9 to 8 runs backwards",
        "start no larger than end",
    ),
    (
        "llama_cpp_ports:\n  ranges:\n    - start: 9",
        "3: llama_cpp_ports.ranges[0].end: is missing",
        "every entry here needs `end:`",
    ),
    (
        "llama_cpp_ports:\n  ranges: [{start: 8000, end: 8100}]",
        "1: llama_cpp_ports: holds 8080, the port of listen_addr",
        "leave that port to the node itself",
    ),
    (
        "llama_cpp:\n  branch: --upload-pack=x",
        "2: llama_cpp.branch: not a name that git takes: '--upload-pack=x'",
        "no blanks, and no `-` in front",
    ),
    (
        "cluster:\n  peers: [a:1, 'b:0']",
        "2: cluster.peers[1]: port 0 in 'b:0'",
        "the port that the peer listens on",
    ),
    ("cluster:\n  peers: a:1", "2: cluster.peers: must be a list, not 'a:1'", "a list, such as [a, b]"),
    (
        "cluster:\n  peers: [5]",
        "2: cluster.peers[0]: not an address: 5",
        "such as 127.0.0.1:8080 or [::1]:8080, in quotes",
    ),
    (
        "cluster:\n  peers:\n    - {address: a}",
        "3: cluster.peers[0].address: not an address: 'a': has no port",
        ADDRESS,
    ),
    (
        "cluster:\n  peers:\n    - address: a:1\n      wake_mac: 12",
        "4: cluster.peers[0].wake_mac: not a MAC address: 12",
        "such as aa:bb:cc:dd:ee:ff, in quotes",
    ),
    (
        "cluster:\n  peers:\n    - address: a:1\n      wake_mac: aa-bb:cc-dd-ee-ff",
        "4: cluster.peers[0].wake_mac: not a MAC address: 'aa-bb:cc-dd-ee-ff'",
        "such as aa:bb:cc:dd:ee:ff, in quotes",
    ),
    (
        "cluster:\n  peers:\n    - address: a:1\n      wake_mac: ff:ff:ff:ff:ff:ff",
        "4: cluster.peers[0].wake_mac: not the address of one network card: 'ff:ff:ff:ff:ff:ff'",
        "the card's own address",
    ),
    (
        "cluster:\n  peers:\n    - address: a:1\n      node_id: a b",
        "4: cluster.peers[0].node_id: not a node id: 'a b'",
        "1 to 64 letters, digits, `.`, `_` or `-`",
    ),
    (
        "cluster:\n  peers:\n    - address: a:1\n      node_id: 5",
        "4: cluster.peers[0].node_id: must be text, not 5",
        "text; put it in quotes",
    ),
    (
        "cluster:\n  peers:\n    - {wake_mac: 'aa:bb:cc:dd:ee:ff'}",
        "3: cluster.peers[0].address: is missing",
        "every entry here needs `address:`",
    ),
    (
        "cluster:\n  peers:\n    - address: a:1\n      wake_mack: x",
        "4: cluster.peers[0].wake_mack: unknown key",
        "nearest: wake_mac",
    ),
    (
        "cluster:\n  gossip_interval_seconds: 0",
        "2: cluster.gossip_interval_seconds: must be above 0, not 0",
        "more than 0",
    ),
    (
        "cluster:\n  max_concurrent_gossip: 0",
        "2: cluster.max_concurrent_gossip: must be at least 1, not 0",
        "1 or more",
    ),
    (
        "cluster:\n  version_mismatch_action: no",
        "2: cluster.version_mismatch_action: must be 'warn', 'reject_major' or 'reject_any', not 'no'",
        "one of these",
    ),
    (
        "cluster:\n  serve_peers: sometimes",
        "2: cluster.serve_peers: must be 'always', 'idle', 'on_power' or 'never', not 'sometimes'",
        "one of these",
    ),
    (
        "cluster:\n  discovery:\n    interfaces: []",
        "3: cluster.discovery.interfaces: is empty",
        "at least one entry, or leave the key out",
    ),
    *(
        (
            f"cluster:\n  discovery:\n    service_name: {name}._tcp.local",
            f"3: cluster.discovery.service_name: not a service type: '{name}._tcp.local'",
            "such as _llama-mesh._tcp.local",
        )
        for name in ("_a--b", "_-a", "_a-", "_12", "_" + "a" * 16)
    ),
    (
        "cluster:\n  discovery:\n    service_name: mesh",
        "3: cluster.discovery.service_name: not a service type: 'mesh'",
        "such as _llama-mesh._tcp.local",
    ),
    (
        "cluster:\n  listen_addr: 127.0.0.1:8080",
        "2: cluster.listen_addr: is the same as the node's listen_addr",
        "another port, or leave it out to share the one of listen_addr",
    ),
    (
        "llama_cpp_ports:\n  ports: [9000]\ncluster:\n  listen_addr: 0.0.0.0:9000",
        "4: cluster.listen_addr: port 9000 is one of llama_cpp_ports",
        "leave that port to the node itself",
    ),
    (
        "listen_addr: 0.0.0.0:1\ncluster:\n  enabled: true\n  noise:\n    enabled: false",
        "5: cluster.noise.enabled: is off while other machines can reach 0.0.0.0:1",
        "true; false is for loopback only",
    ),
    (
        "cluster:\n  noise:\n    allowed_keys: ['noise25519:AAAA']",
        "3: cluster.noise.allowed_keys[0]: not a node's public key: 'noise25519:AAAA'",
        "noise25519: and 32 bytes in base64",
    ),
    (
        "cluster:\n  circuit_breaker:\n    failure_threshold: 0",
        "3: cluster.circuit_breaker.failure_threshold: must be at least 1, not 0",
        "1 or more",
    ),
    (
        "cluster:\n  circuit_breaker:\n    open_duration_base_ms: 70000",
        "3: cluster.circuit_breaker.open_duration_base_ms: 70000 is above open_duration_max_ms (60000)",
        "at most 60000",
    ),
    (
        "http:\n  idle_timeout_seconds: 0",
        "2: http.idle_timeout_seconds: must be above 0, not 0",
        "more than 0",
    ),
    (
        "http:\n  body_read_timeout_ms: 0",
        "2: http.body_read_timeout_ms: must be at least 1, not 0",
        "1 or more",
    ),
    (
        "http:\n  protocol_detect_timeout_ms: 0",
        "2: http.protocol_detect_timeout_ms: must be at least 1, not 0",
        "1 or more",
    ),
    (
        "http:\n  cors_allowed_origins: [example.org]",
        "2: http.cors_allowed_origins[0]: not an origin: 'example.org'",
        "such as https://chat.example.org, no path, or *",
    ),
    (
        "auth:\n  enabled: true",
        "1: auth.allowed_keys: auth is enabled without a key",
        "list at least one key",
    ),
    (
        "auth:\n  required_header: 'a b'",
        "2: auth.required_header: not the name of a header: 'a b'",
        "such as x-api-key",
    ),
    ("auth:\n  enabled: perhaps", "2: auth.enabled: must be true or false", "true or false"),
    ("auth:\n  allowed_keys: [12345]", "2: auth.allowed_keys[0]: a key isn't text", "put it in quotes"),
    (
        "auth:\n  allowed_keys: [hunter2, '']",
        "2: auth.allowed_keys[1]: a key can't travel in a header",
        "printable ASCII, without blanks around it",
    ),
    (
        "auth:\n  admin_keys: ['sha256:abc']",
        "2: auth.admin_keys[0]: a hashed key isn't a SHA-256",
        "sha256: and 64 hexadecimal digits, or the key itself",
    ),
    (
        "logging:\n  filename: a/b",
        "2: logging.filename: not a file name: 'a/b'",
        "a name; the folder goes into `directory`",
    ),
    (
        "wedge_detector:\n  window_ms: 0",
        "2: wedge_detector.window_ms: must be at least 1, not 0",
        "1 or more",
    ),
    ("max_hops: 1\nmax_hop: 3", "2: max_hop: unknown key", "nearest: max_hops"),
    ("cluster:\n  enabld: true", "2: cluster.enabld: unknown key", "nearest: cluster.enabled"),
    ("tofu: true", "1: tofu: unknown key", "nearest: cluster.noise.tofu"),
    ("_env_file: x", "1: _env_file: unknown key", "nearest: default_model"),
    ("http: 5", "1: http: must be a mapping of keys, not 5", "its keys below it, indented"),
    ("- a", "1: must be a mapping of keys, not a list", "lines such as `node_id: name`"),
    ("just words", "1: must be a mapping of keys, not a single value", "lines such as `node_id: name`"),
]


@pytest.mark.parametrize(("text", "said", "hint"), REFUSALS)
def test_refuses_with_file_and_line(tmp_path: Path, text: str, said: str, hint: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_settings(path, None, {})
    assert str(caught.value) == f"{path}:{said} ({hint})"
