"""The sections of config.yaml below the first level: their keys, defaults and rules."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from llamesh.config.access_keys import AccessKey, KeyEntry, contradictions, named
from llamesh.config.peers import StaticPeerEntry
from llamesh.config.problems import Finding, shown
from llamesh.config.tls import certificate_findings
from llamesh.config.values import (
    Count,
    ListenAddress,
    Port,
    Positive,
    PositiveSeconds,
    Seconds,
    Section,
    Text,
    TextOrList,
    UserPath,
    reject,
    reject_all,
    user_path,
)

_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_ORIGIN = re.compile(r"\*|[A-Za-z][A-Za-z0-9+.-]*://[^/\s]+")
_ALLOWED_HOST = re.compile(r"\*|(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")

# RFC 6335, 5.1: 15 characters at most, a letter among them, no hyphen at an end or beside another.
_SERVICE = re.compile(r"_(?=[^.]{1,15}\.)(?=[^.]*[A-Za-z])[A-Za-z0-9]+(-[A-Za-z0-9]+)*\._(tcp|udp)\.local\.?")


def _git_word(value: str) -> str:
    # git would take it for an option of its own.
    if value.startswith("-") or re.search(r"\s", value):
        raise reject(f"not a name that git takes: {shown(value)}", "no blanks, and no `-` in front")
    return value


def _origin(value: str) -> str:
    if not _ORIGIN.fullmatch(value):
        raise reject(f"not an origin: {shown(value)}", "such as https://chat.example.org, no path, or *")
    return value


def _host_name(value: str) -> str:
    if not _ALLOWED_HOST.fullmatch(value):
        hint = "a name such as llm.example.org, *.example.org for all below it, or *"
        raise reject(f"not the name of a host: {shown(value)}", hint)
    return value


def _header(value: str) -> str:
    if not _HEADER.fullmatch(value):
        raise reject(f"not the name of a header: {shown(value)}", "such as x-api-key")
    return value


def _file_name(value: str) -> str:
    if "/" in value or value in (".", ".."):
        raise reject(f"not a file name: {shown(value)}", "a name; the folder goes into `directory`")
    return value


def _noise_key(value: str) -> str:
    prefix, _, encoded = value.partition(":")
    try:
        if prefix == "noise25519" and len(base64.b64decode(encoded, validate=True)) == 32:
            return value
    except (binascii.Error, ValueError):
        pass
    raise reject(f"not a node's public key: {shown(value)}", "noise25519: and 32 bytes in base64")


def _service_name(value: str) -> str:
    if not _SERVICE.fullmatch(value):
        raise reject(f"not a service type: {shown(value)}", "such as _llama-mesh._tcp.local")
    return value


GitWord = Annotated[Text, AfterValidator(_git_word)]


class ModelDefaults(Section):
    """What holds for each profile that doesn't say otherwise. 0 means no limit of this kind."""

    max_concurrent_requests_per_instance: Count = 0
    max_queue_size_per_model: Count = 0
    max_instances_per_model: Count = 1
    max_wait_in_queue_ms: Count = 60_000
    max_request_duration_ms: Count = 0
    min_eviction_tenure_secs: Seconds = 15.0


class PortRange(Section):
    """Ports from `start` to `end`, both included."""

    start: Port
    end: Port

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.start > self.end:
            raise reject(f"the range {self.start} to {self.end} runs backwards", "start no larger than end")
        return self


class LlamaCppPorts(Section):
    """Where llama-server children may listen; without either key the system picks free ports."""

    ports: tuple[Port, ...] | None = None
    ranges: tuple[PortRange, ...] | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.all_ports() == ():
            raise reject("holds no port at all", "name some, or leave it out: then the system picks")
        return self

    def all_ports(self) -> tuple[int, ...] | None:
        """Each port once, ascending, or None when the system picks."""
        if self.ports is None and self.ranges is None:
            return None
        ports = set(self.ports or ())
        for span in self.ranges or ():
            ports.update(range(span.start, span.end + 1))
        return tuple(sorted(ports))


class LlamaCpp(Section):
    """The llama-server binary, and whether this node builds it."""

    enabled: bool = False
    repo_url: GitWord = "https://github.com/ggml-org/llama.cpp"
    branch: GitWord = "master"
    repo_path: UserPath = user_path("./llama.cpp")
    build_path: UserPath = user_path("./llama.cpp/build")
    binary_path: UserPath = user_path("./llama.cpp/bin/llama-server")
    build_args: tuple[Text, ...] = ()
    build_command_args: tuple[Text, ...] = ("-j",)
    auto_update_interval_seconds: Seconds = 0.0
    keep_builds: Count = 3


class Discovery(Section):
    """Finding peers on the local network. `interfaces` are names or addresses, or `all`."""

    mdns: bool = True
    service_name: Annotated[Text, AfterValidator(_service_name)] = "_llama-mesh._tcp.local"
    interfaces: Annotated[TextOrList, Field(min_length=1)] = ("all",)


class Noise(Section):
    """Encryption between nodes. A path left out is the file of its usual name in `config_dir`."""

    enabled: bool = True
    tofu: bool = True
    config_dir: UserPath = Field(default_factory=lambda: user_path("~/.llama-mesh/"))
    private_key_path: UserPath | None = None
    known_peers_path: UserPath | None = None
    previous_key_path: UserPath | None = None
    allowed_keys: tuple[Annotated[Text, AfterValidator(_noise_key)], ...] = ()
    session_ttl_seconds: PositiveSeconds = 3600.0


class CircuitBreaker(Section):
    """When a failing peer is left alone, and how it is tried again."""

    enabled: bool = True
    failure_threshold: Positive = 5
    success_threshold: Positive = 2
    open_duration_base_ms: Positive = 5000
    open_duration_max_ms: Positive = 60_000
    half_open_probe_interval_ms: Count = 1000

    @model_validator(mode="after")
    def _base_below_max(self) -> Self:
        base, most = self.open_duration_base_ms, self.open_duration_max_ms
        if base > most:
            message = f"{base} is above open_duration_max_ms ({most})"
            raise reject_all([Finding(("open_duration_base_ms",), message, f"at most {most}")])
        return self


class Cluster(Section):
    """Other nodes. Times are seconds, fractions allowed."""

    enabled: bool = False
    peers: tuple[StaticPeerEntry, ...] = ()
    gossip_interval_seconds: PositiveSeconds = 1.0
    max_concurrent_gossip: Positive = 16
    version_mismatch_action: Literal["warn", "reject_major", "reject_any"] = "warn"
    discovery: Discovery = Discovery()
    listen_addr: ListenAddress | None = None
    serve_peers: Literal["always", "idle", "on_power", "never"] = "always"
    accept_administration: bool = True
    noise: Noise = Field(default_factory=Noise)
    circuit_breaker: CircuitBreaker = CircuitBreaker()


class Http(Section):
    """The API's own limits."""

    request_body_limit_bytes: Positive = 104_857_600
    idle_timeout_seconds: PositiveSeconds = 120.0
    body_read_timeout_ms: Positive = 30_000
    protocol_detect_timeout_ms: Positive = 10_000
    cors_allowed_origins: tuple[Annotated[Text, AfterValidator(_origin)], ...] = ()
    allowed_hosts: tuple[Annotated[Text, AfterValidator(_host_name)], ...] = ()
    stream_keepalive_seconds: Seconds = 10.0


class Auth(Section):
    """Who may call. A key is itself, or `sha256:` and the 64 hexadecimal digits of its SHA-256."""

    enabled: bool = False
    required_header: Annotated[Text, AfterValidator(_header)] = "x-api-key"
    allowed_keys: tuple[KeyEntry, ...] = ()
    admin_keys: tuple[KeyEntry, ...] = ()

    @field_validator("allowed_keys", mode="after")
    @classmethod
    def _clients_have_names(cls, value: tuple[AccessKey, ...]) -> tuple[AccessKey, ...]:
        return named(value, "key")

    @field_validator("admin_keys", mode="after")
    @classmethod
    def _administrators_have_names(cls, value: tuple[AccessKey, ...]) -> tuple[AccessKey, ...]:
        return named(value, "admin")

    @model_validator(mode="after")
    def _has_keys(self) -> Self:
        if self.enabled and not self.allowed_keys and not self.admin_keys:
            finding = Finding(("allowed_keys",), "auth is enabled without a key", "list at least one key")
            raise reject_all([finding])
        lists = (("allowed_keys", self.allowed_keys), ("admin_keys", self.admin_keys))
        if findings := [*contradictions(lists)]:
            raise reject_all(findings)
        return self

    def administrators(self) -> tuple[AccessKey, ...]:
        """Who may administer: without `admin_keys` all who have neither models nor limits of their own."""
        return self.admin_keys or tuple(key for key in self.allowed_keys if not key.is_restricted)


class ServerTls(Section):
    """TLS for clients. Both files are PEM; they are read and checked when it is enabled."""

    enabled: bool = False
    cert_path: UserPath | None = None
    key_path: UserPath | None = None

    @model_validator(mode="after")
    def _usable(self) -> Self:
        findings = certificate_findings(self.cert_path, self.key_path) if self.enabled else []
        if findings:
            raise reject_all(findings)
        return self


class Logging(Section):
    """The log file besides stdout."""

    enabled: bool = False
    directory: UserPath = user_path("./logs")
    filename: Annotated[Text, AfterValidator(_file_name)] = "proxy.log"
    max_keep_files: Count = 7
    compression: bool = True


class Audit(Section):
    """The file that says who did what. `max_file_mb`: a new file then, and each day; `keep_days`: 0 = for
    ever.
    """

    enabled: bool = False
    directory: UserPath = user_path("./logs")
    filename: Annotated[Text, AfterValidator(_file_name)] = "audit.jsonl"
    max_file_mb: Positive = 64
    keep_days: Count = 90
    compression: bool = True


class WedgeDetector(Section):
    """Noticing an instance that is busy and gets nowhere."""

    enabled: bool = False
    window_ms: Positive = 600_000
    sample_interval_ms: Positive = 5000
    cpu_only: bool = False
