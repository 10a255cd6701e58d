"""The documents that GETs answer with, the same from both lanes."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import PurePath
from typing import Any
from urllib.parse import unquote

import msgspec
import trio

import llamesh
from llamesh.config.cookbook import Cookbook, Profile
from llamesh.config.problems import ConfigError
from llamesh.config.settings import Settings
from llamesh.config.store import Store
from llamesh.core.capacity import Need
from llamesh.core.lifecycle import State
from llamesh.dispatch import Dispatch
from llamesh.errors import LlameshError, ModelNotFound
from llamesh.local.pool import Pool
from llamesh.net.exchange import Headers
from llamesh.telemetry.learned import LearnedValues
from llamesh.telemetry.prometheus import Gauges, ProfileFigures
from llamesh.telemetry.stats import NodeStats
from llamesh.web.access import Access
from llamesh.web.caller import ANYBODY, Caller
from llamesh.web.mesh_pages import MeshPages
from llamesh.web.tls import Certificate

# OpenAI's `created`. Constant, since clients cache by it and nothing here was "created".
CREATED = 1_700_000_000

_MIB = 1 << 20

# member of `node_resources` -> labels of llamesh_memory_bytes
_MEMORY_GAUGES = (
    ("max_vram_mb", "vram", "maximum"),
    ("max_sysmem_mb", "sysmem", "maximum"),
    ("reserved_vram_mb", "vram", "reserved"),
    ("reserved_sysmem_mb", "sysmem", "reserved"),
    ("external_vram_mb", "vram", "external"),
    ("external_sysmem_mb", "sysmem", "external"),
    ("device_vram_total_mb", "vram", "total"),
    ("sysmem_total_mb", "sysmem", "total"),
    ("device_vram_used_mb", "vram", "used"),
)


class Pages:
    """Reads the state of the node into documents; changes nothing."""

    def __init__(
        self,
        store: Store,
        pool: Pool,
        dispatch: Dispatch,
        stats: NodeStats,
        learned: LearnedValues,
        access: Access,
    ) -> None:
        self._store = store
        self._pool = pool
        self._dispatch = dispatch
        self._stats = stats
        self._learned = learned
        self._access = access
        self._started = time.time()
        self.address = ""
        self.mesh: MeshPages | None = None
        self.certificate: Certificate | None = None

    @property
    def _settings(self) -> Settings:
        return self._store.current.settings

    def _cookbook(self) -> Cookbook:
        return self._store.current.cookbook

    def fast(self, path: bytes, headers: Headers) -> tuple[int, Headers, bytes] | None:
        """The GETs of the fast lane: status, headers, body; None when `path` isn't one of them."""
        try:
            if path in (b"/v1/models", b"/models"):
                return _json(200, self.models(self._access.check(headers)))
            if path.startswith(b"/v1/models/"):
                name = path[len(b"/v1/models/") :].decode("utf-8", "replace")
                return _json(200, self.model(name, self._access.check(headers)))
            if path in (b"/health", b"/healthz"):
                return _json(200, {"status": "ok"})
            if path == b"/readyz":
                document = self.ready()
                return _json(200 if document["status"] == "ready" else 503, document)
            if path == b"/version":
                return _json(200, self.version())
        except LlameshError as error:
            status, own, body = _json(error.status, error.document())
            own.append((b"x-llamesh-node", self._settings.node_id.encode()))
            if error.status == 401:
                own.append((b"www-authenticate", b"Bearer"))
            return status, own, body
        return None

    # Documents.

    def models(self, caller: Caller = ANYBODY) -> dict[str, Any]:
        """`GET /v1/models`: those that the caller's key may use."""
        listed = self._cookbook().listed()
        data = [self._model(profile) for profile in listed]
        if self.mesh is not None:
            data += self.mesh.models({profile.key.casefold() for profile in listed})
        if caller.models is not None:
            data = [one for one in data if self._access.may_use(caller, *_names(one))]
        return {"object": "list", "data": data}

    def model(self, name: str, caller: Caller = ANYBODY) -> dict[str, Any]:
        """`GET /v1/models/{id}`. Raises ModelNotFound or Forbidden."""
        entry = self._named(name)
        self._access.check_model(caller, *_names(entry))
        return entry

    def _named(self, name: str) -> dict[str, Any]:
        profile = self._cookbook().find(unquote(name))
        if profile is None:
            if self.mesh is not None and (entry := self.mesh.model(unquote(name))) is not None:
                return entry
            raise ModelNotFound(
                f"node {self._settings.node_id} knows no model {unquote(name)[:120]!r}; see GET /v1/models",
                param="model",
            )
        return self._model(profile)

    def ready(self) -> dict[str, Any]:
        """`GET /readyz`: `status` is "ready" or "draining" (for a `reason`); `can_spawn`: one more instance
        may start; `config_problems`: mistakes in files that were changed and therefore not taken in.
        """
        closed, problems = self._dispatch.closed, self._store.problems
        return {
            "status": "draining" if closed else "ready",
            "can_spawn": not closed and self._pool.can_spawn(),
            "node_id": self._settings.node_id,
            "reason": closed or None,
            "config_problems": _shown(problems) if problems else [],
        }

    def version(self) -> dict[str, Any]:
        """`GET /version`."""
        engine = self._pool.engine
        return {
            "version": llamesh.__version__,
            "node_id": self._settings.node_id,
            "llama_cpp_version": engine.version,
            "engine": engine.origin,
        }

    def metrics(self) -> dict[str, Any]:
        """`GET /metrics/json`."""
        hashes = {}
        for profile in self._cookbook().profiles:
            stats = self._stats.profile(profile.key)
            hashes[profile.key] = {
                "display_names": [profile.key],
                "requests_total": stats.requests_total,
                "errors_total": stats.errors_total,
                "tokens_generated_total": stats.tokens_generated_total,
                "prompt_tokens_total": stats.prompt_tokens_total,
                "cached_tokens_total": stats.cached_tokens_total,
                "current_requests": stats.current_requests,
                "queue_len": self._dispatch.queue_length(profile.key),
                "instance_count": len(self._pool.instances(profile.key)),
                "tps": round(stats.tokens_per_second, 2),
                "starts_total": stats.starts_total,
                "start_failures_total": stats.start_failures_total,
                "crashes_total": stats.crashes_total,
            }
        return {
            "node_id": self._settings.node_id,
            "version": llamesh.__version__,
            "requests_total": self._stats.requests_total,
            "errors_total": self._stats.errors_total,
            "current_requests": self._stats.current_requests,
            "connections": self._stats.connections,
            "node_resources": self._resources(),
            "hashes": hashes,
        }

    def nodes(self) -> dict[str, Any]:
        """`GET /cluster/nodes`."""
        others = self.mesh.nodes() if self.mesh is not None else {}
        own = {"address": self.address, "status": "alive", "last_seen": time.time(), **self.summary()}
        return {"nodes": {self._settings.node_id: own, **others}}

    def summary(self) -> dict[str, Any]:
        """This node's entry there, as far as it can be told to others."""
        profiles = self._cookbook().profiles
        loaded = sorted({i.profile.key for i in self._pool.all() if i.state is State.READY})
        return {
            "ready": not bool(self._dispatch.closed),
            "version": llamesh.__version__,
            "llama_cpp_version": self._pool.engine.version,
            "active_instances": sum(1 for _ in self._pool.all()),
            "current_requests": self._stats.current_requests,
            "loaded_models": loaded,
            "supported_models": [p.key for p in profiles],
            "model_stats": {p.key: self._model_stats(p) for p in profiles},
            **self._resources(),
            "total_queue_length": self._dispatch.queue_length(),
            "started_at_unix": self._started,
        }

    def running(self) -> dict[str, Any]:
        """`GET /running`: the instances, as llama-swap lists them, with their log's last lines left out."""
        now = trio.current_time()
        return {
            "running": [
                {
                    "model": i.profile.public_name,
                    "state": i.state.value,
                    "instance": i.id,
                    "slots": i.slots,
                    "busy": i.busy_slots,
                    "age_seconds": round(now - i.created, 1),
                    "pid": i.child.pid if i.child else None,
                }
                for i in self._pool.all()
            ]
        }

    def gauges(self) -> Gauges:
        """What Prometheus shows beside the counters."""
        instances: dict[tuple[str, str], int] = {}
        for instance in self._pool.all():
            at = (instance.profile.key, instance.state.value)
            instances[at] = instances.get(at, 0) + 1
        resources = self._resources()
        memory = {
            (kind, what): resources[name] * _MIB
            for name, kind, what in _MEMORY_GAUGES
            if resources[name] is not None
        }
        return Gauges(
            instances,
            {profile.key: self._figures(profile.key) for profile in self._cookbook().profiles},
            not self._dispatch.closed,
            memory,
            dict(self._pool.evictions),
            (self._store.reloads, self._store.refusals, self._store.problems is None),
            self._profile_memory(),
            self.mesh.figures() if self.mesh is not None else None,
            self.certificate.expiry if self.certificate is not None else None,
            self._access.figures,
        )

    def _figures(self, key: str) -> ProfileFigures:
        serving = [one for one in self._pool.instances(key) if one.state is State.READY]
        trouble = self._pool.trouble(key)
        return ProfileFigures(
            self._dispatch.queue_length(key),
            sum(one.slots for one in serving),
            sum(one.busy_slots for one in serving),
            trouble is not None and trouble.exhausted,
        )

    # Parts.

    def _model(self, profile: Profile) -> dict[str, Any]:
        learned = self._learned.of(profile.key)
        params = {"n_ctx": learned.n_ctx, "n_ctx_train": learned.n_ctx_train, "n_slots": learned.n_slots}
        speed = self._stats.profile(profile.key).tokens_per_second or learned.tokens_per_second
        entry: dict[str, Any] = {
            "id": profile.public_name,
            "object": "model",
            "created": CREATED,
            "owned_by": self._settings.node_id,
            "status": self.status(profile),
            "metadata": {
                "model": profile.model,
                "profile_id": profile.id,
                "description": profile.model_description,
                "profile_description": profile.description,
                "idle_timeout_seconds": profile.idle_timeout_seconds,
                "estimated_tokens_per_second": round(speed, 2) if speed else None,
                "parsed_model_params": {name: value or None for name, value in params.items()},
            },
        }
        if learned.context_length:
            entry["context_length"] = learned.context_length
        return entry

    def status(self, profile: Profile) -> dict[str, Any]:
        """One of unloaded, queued, downloading, loading, loaded, failed."""
        states = {i.state for i in self._pool.instances(profile.key)}
        trouble = self._pool.trouble(profile.key)
        if State.READY in states:
            return {"value": "loaded"}
        if State.STARTING in states:
            return {"value": "loading"}
        if (download := self._pool.weights.progress(profile)) is not None:
            return {"value": "downloading", **download.document()}
        if (error := self._pool.weights.failure(profile)) is not None:
            return {"value": "failed", "exit_code": None, "reason": str(error)}
        if trouble is not None and trouble.exhausted:
            code = trouble.last.exit_code if trouble.last else None
            return {"value": "failed", "exit_code": code}
        if self._dispatch.queue_length(profile.key):
            return {"value": "queued"}
        return {"value": "unloaded"}

    def _model_stats(self, profile: Profile) -> dict[str, Any]:
        memory = self._pool.memory
        holdings = [held for i in self._pool.instances(profile.key) if (held := memory.held(i)) is not None]
        size = memory.size(profile)
        return {
            "instance_count": len(self._pool.instances(profile.key)),
            "queue_len": self._dispatch.queue_length(profile.key),
            "tps": round(self._stats.profile(profile.key).tokens_per_second, 2),
            "vram_mb": sum(held.vram for held in holdings) if holdings else None,
            "sysmem_mb": sum(held.sysmem for held in holdings) if holdings else None,
            "estimated_vram_mb": size.need.vram if size else None,
            "estimated_sysmem_mb": size.need.sysmem if size else None,
            "estimate_source": size.source if size else None,
        }

    def _profile_memory(self) -> dict[tuple[str, str, str], int]:
        found = {}
        for profile in self._cookbook().profiles:
            stats = self._model_stats(profile)
            for kind in ("vram", "sysmem"):
                for what, name in (("measured", f"{kind}_mb"), ("estimated", f"estimated_{kind}_mb")):
                    if stats[name] is not None:
                        found[profile.key, kind, what] = stats[name] * _MIB
        return found

    def _resources(self) -> dict[str, Any]:
        """MiB; None = not known."""
        memory, budget = self._pool.memory, self._pool.memory.budget()
        held = Need()
        for instance in self._pool.all():
            held += memory.charge(instance)
        device = memory.accounts.device_wide if memory.accounts is not None else None
        system = memory.accounts.sysmem if memory.accounts is not None else None
        known = device is not None and device.external is not None
        return {
            "available_vram": _left(budget.vram_now, held.vram),
            "available_sysmem": _left(budget.sysmem_now, held.sysmem),
            "reserved_vram_mb": held.vram,
            "reserved_sysmem_mb": held.sysmem,
            "max_vram_mb": budget.vram,
            "max_sysmem_mb": budget.sysmem,
            "external_vram_mb": _mib(device.external) if device else None,
            "external_sysmem_mb": _mib(system.external) if system else None,
            "device_vram_used_mb": _mib(device.ours + device.external)
            if device is not None and device.external is not None
            else None,
            "device_vram_total_mb": _mib(device.total) if device else None,
            "sysmem_total_mb": _mib(system.total) if system else None,
            "gpu_telemetry_available": known,
            "evictions": dict(self._pool.evictions),
        }


def _shown(error: ConfigError) -> list[str]:
    """The problems for everybody's eyes: where the files are is the operator's business, who has the log."""
    return [
        str(replace(problem, file=PurePath(problem.file).name))
        for problem in error.problems[: ConfigError.SHOWN]
    ]


def _names(entry: dict[str, Any]) -> tuple[str, str]:
    """Model and profile of an entry of `/v1/models`."""
    return entry["metadata"]["model"], entry["metadata"]["profile_id"]


def _mib(size: int | None) -> int | None:
    return None if size is None else size // _MIB


def _left(limit: int | None, used: int) -> int | None:
    return None if limit is None else max(0, limit - used)


def _json(status: int, document: Any) -> tuple[int, Headers, bytes]:
    return status, [(b"content-type", b"application/json")], msgspec.json.encode(document)
