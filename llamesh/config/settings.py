"""config.yaml: the whole schema, and how a file, the environment and secrets become one value."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from llamesh.config.environment import read_environment
from llamesh.config.layers import Layers
from llamesh.config.problems import ConfigError, Finding, KeyPath, Place, in_order, shown
from llamesh.config.schema import explain, place_of
from llamesh.config.sections import (
    Audit,
    Auth,
    Cluster,
    Http,
    LlamaCpp,
    LlamaCppPorts,
    Logging,
    ModelDefaults,
    ServerTls,
    WedgeDetector,
)
from llamesh.config.values import (
    Address,
    Count,
    ListenAddress,
    NodeId,
    Positive,
    Seconds,
    Section,
    Text,
    Url,
    UserPath,
    reject,
    reject_all,
    user_path,
)
from llamesh.config.yaml_source import read_yaml

__all__ = ["Address", "Settings", "default_node_id", "load_settings"]


def default_node_id() -> str:
    """This machine's host name, cut to what a node id may hold."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", socket.gethostname()).strip("-")
    return name[:64] or "node"


def _model_name(value: str) -> str:
    if not re.fullmatch(r"[^:]+(:[^:]+)?", value):
        raise reject(f"not the name of a model: {shown(value)}", "`model` or `model:profile`")
    return value


class Origins:
    """Where each value was written, for messages that come later. Two settings that say the same are
    equal wherever they were written, so any two of these are."""

    def __init__(self, places: Mapping[KeyPath, Place] | None = None, file: str = "config.yaml") -> None:
        self.places = places or {}
        self.file = file

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origins)

    __hash__ = None  # type: ignore[assignment]


class Settings(Section):
    """A node's configuration: the table of config.yaml, nested as its keys are. Frozen.

    Sizes ending in `_mb` are MiB, `_ms` milliseconds, `_seconds` and `_secs` seconds. None for
    `max_vram_mb` and `max_sysmem_mb` means that the node measures, 0 that it may use none.
    """

    node_id: NodeId = Field(default_factory=default_node_id)
    listen_addr: ListenAddress = Address("127.0.0.1", 8080)
    public_url: Url | None = None
    max_vram_mb: Count | None = None
    max_sysmem_mb: Count | None = None
    max_instances_per_node: Positive = 100
    default_model: Annotated[Text, AfterValidator(_model_name)] | None = None
    metrics_path: UserPath = user_path("./node-metrics.json")
    shutdown_grace_period_seconds: Seconds = 30.0
    max_hops: Count = 10
    max_total_queue_entries: Count = 0
    upstream_read_timeout_ms: Count = 0
    yield_to: tuple[Text, ...] = ()
    models_dir: UserPath | None = None
    disk_budget_gb: Seconds = 0.0
    keep_downloading: bool = True
    model_defaults: ModelDefaults = ModelDefaults()
    llama_cpp_ports: LlamaCppPorts = LlamaCppPorts()
    llama_cpp: LlamaCpp = LlamaCpp()
    cluster: Cluster = Field(default_factory=Cluster)
    http: Http = Http()
    auth: Auth = Auth()
    server_tls: ServerTls = ServerTls()
    logging: Logging = Logging()
    audit: Audit = Audit()
    wedge_detector: WedgeDetector = WedgeDetector()

    _origins: Origins = PrivateAttr(default_factory=Origins)

    @field_validator("llama_cpp_ports", mode="after")
    @classmethod
    def _apart_from_the_listener(cls, value: LlamaCppPorts, info: ValidationInfo) -> LlamaCppPorts:
        listen = info.data.get("listen_addr")  # absent when it was refused itself
        if isinstance(listen, Address) and listen.port in (value.all_ports() or ()):
            message = f"holds {listen.port}, the port of listen_addr"
            raise reject(message, "leave that port to the node itself")
        return value

    @field_validator("cluster", mode="after")
    @classmethod
    def _agrees_with_the_listener(cls, value: Cluster, info: ValidationInfo) -> Cluster:
        listen, ports = info.data.get("listen_addr"), info.data.get("llama_cpp_ports")
        own, findings = value.listen_addr, list[Finding]()
        if own is not None and own.port and own == listen:
            hint = "another port, or leave it out to share the one of listen_addr"
            findings.append(Finding(("listen_addr",), "is the same as the node's listen_addr", hint))
        if own is not None and isinstance(ports, LlamaCppPorts) and own.port in (ports.all_ports() or ()):
            message = f"port {own.port} is one of llama_cpp_ports"
            findings.append(Finding(("listen_addr",), message, "leave that port to the node itself"))
        reachable = own or listen
        exposed = isinstance(reachable, Address) and not reachable.is_loopback
        if value.enabled and not value.noise.enabled and exposed:
            message = f"is off while other machines can reach {reachable}"
            findings.append(Finding(("noise", "enabled"), message, "true; false is for loopback only"))
        if findings:
            raise reject_all(findings)
        return value

    @field_validator("audit", mode="after")
    @classmethod
    def _apart_from_the_log(cls, value: Audit, info: ValidationInfo) -> Audit:
        log = info.data.get("logging")
        if not isinstance(log, Logging) or not (value.enabled and log.enabled):
            return value
        if value.directory.absolute() == log.directory.absolute() and value.filename == log.filename:
            finding = Finding(("filename",), "is the file of logging", "another name or directory")
            raise reject_all([finding])
        return value

    def origin(self, *path: str | int) -> Place:
        """Where the value at a path (`"cluster", "peers", 0`) was written, for an error message."""
        return place_of(path, self._origins.places, self._origins.file)


def load_settings(
    path: Path | None,
    secrets: Path | None,
    environ: Mapping[str, str],
    *,
    required: bool = True,
    secrets_required: bool = True,
) -> Settings:
    """Read the configuration: secrets over environment over file. Raises ConfigError with all problems.

    `path` and `secrets` are YAML files of the same schema; None, and a missing file that isn't
    `required`, means defaults. `environ` holds `LLAMESH_*` variables among others.
    """
    layers = Layers()
    _add_file(layers, path, required)
    data, places, problems = read_environment(environ, Settings)
    layers.problems += problems
    layers.add(data, places, "environment")
    _add_file(layers, secrets, secrets_required)
    origins = Origins(layers.places, str(path or "config.yaml"))
    try:
        settings = Settings.model_validate(layers.data)
    except ValidationError as error:
        layers.problems += explain(error, Settings, layers.places, origins.file)
    else:
        settings._origins = origins
    if layers.problems:
        raise ConfigError(in_order(layers.problems))
    return settings


def _add_file(layers: Layers, path: Path | None, required: bool) -> None:
    if path is None or (not required and not path.exists() and not path.is_symlink()):
        return
    try:
        document = read_yaml(path)
    except ConfigError as error:
        layers.problems += error.problems
    else:
        layers.problems += document.problems
        layers.add(document.data, document.places, document.file)
