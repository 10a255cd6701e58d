"""What is decided from what was found out: which profiles have room on this machine, and what to warn of.

Nothing here reads anything. The rule for room is the node's own (`core.capacity`), asked as if one
instance of every other profile were loaded and idle, and those of `min_instances` couldn't leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from llamesh.config.cookbook import DEFAULT_PROFILE, Cookbook, Profile
from llamesh.config.effect import without_effect
from llamesh.config.settings import Settings
from llamesh.config.values import Section
from llamesh.core.capacity import Budget, Evict, Fits, Need, Never, Room, Tenant, room, room_beside_text
from llamesh.core.lifecycle import State
from llamesh.local.launch import fixed_port

#: `fits`: beside all others; `eviction`: alone, but some others have to leave; `never`: not at all, or not
#: beside what is kept loaded; `missing`: its weights aren't usable here; `download`: they come first;
#: `listed`: this node never runs it (max_instances 0); `unknown`: nothing is known of its size.
Verdict = Literal["fits", "eviction", "never", "missing", "download", "listed", "unknown"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A profile as the rule for room sees it. `need` is None while nothing is known of its size;
    `too_large`: why no context that is worth it fits, "" when one does."""

    profile: Profile
    need: Need | None
    cpu_only: Need | None = None
    too_large: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What comes of a profile, and why in words ("" where there is nothing to say)."""

    verdict: Verdict
    why: str = ""


def judge(candidates: Sequence[Candidate], budget: Budget) -> dict[str, Judgement]:
    """Whether each has room, by profile key."""
    able = {
        one.profile.key: one
        for one in candidates
        if not one.too_large and not isinstance(_room(one, (), budget), Never)
    }
    return {one.profile.key: _judge(one, able.values(), budget) for one in candidates}


def _judge(one: Candidate, able: Iterable[Candidate], budget: Budget) -> Judgement:
    if one.profile.max_instances == 0:
        return Judgement("listed", "max_instances is 0: this node lists it and never runs it")
    if one.too_large:
        return Judgement("never", one.too_large)
    if one.need is None:
        return Judgement("unknown", "nothing is known of its size, so nothing is reserved for it")
    others = [tenant for other in able if other is not one for tenant in _tenants(other)]
    found = _room(one, others, budget)
    match found:
        case Fits():
            return Judgement("fits", "on the CPU, where it isn't in others' way" if found.on_cpu else "")
        case Evict(ids):
            more = f" and {len(ids) - 4} more" if len(ids) > 4 else ""
            named = ", ".join(dict.fromkeys(ids[:4])) + more
            return Judgement("eviction", f"not beside all others: were they all loaded, {named} would leave")
        case _:
            return Judgement("never", found.reason)


def _room(one: Candidate, others: Sequence[Tenant], budget: Budget) -> Room:
    need = one.need or Need()
    if one.profile.kind == "text":
        return room(need, others, budget)
    return room_beside_text(need, one.cpu_only, others, budget)


def _tenants(one: Candidate) -> Iterator[Tenant]:
    profile = one.profile
    if profile.max_instances == 0:
        return
    for _ in range(max(1, profile.min_instances)):
        yield Tenant(
            profile.public_name,
            State.READY,
            busy=False,
            charge=one.need or Need(),
            pinned=profile.min_instances > 0,
            is_text=profile.kind == "text",
        )


def warnings(settings: Settings, cookbook: Cookbook, found: Sequence[Profile] = ()) -> list[str]:
    """What may surprise in files that are fine by themselves. `found`: the models of models_dir."""
    return [
        *_open_doors(settings),
        *_idle_keys(settings),
        *_ports(settings, cookbook),
        *_names(cookbook, found),
        *_instances(settings, cookbook),
    ]


def _open_doors(settings: Settings) -> Iterator[str]:
    listen, origin = settings.listen_addr, settings.origin("listen_addr")
    where = origin.file if origin.line is None else f"{origin.file}:{origin.line}"
    if not listen.is_loopback and not settings.auth.enabled:
        yield (
            f"{where}: listen_addr {listen} is open to the network and auth.enabled is false: whoever "
            "reaches it can use the models; set auth.enabled and auth.allowed_keys"
        )
    if not listen.is_loopback and settings.auth.enabled and not settings.server_tls.enabled:
        yield (
            f"{where}: keys travel in the clear to listen_addr {listen}: set server_tls, or put a proxy with "
            "TLS before it"
        )


def _idle_keys(settings: Settings) -> Iterator[str]:
    for name in without_effect(settings):
        yield f"{name} has no effect in this version"
    sections: dict[str, tuple[Section, str]] = {
        "auth": (settings.auth, "allowed_keys admin_keys"),
        "server_tls": (settings.server_tls, "cert_path key_path"),
        "cluster": (settings.cluster, "peers listen_addr serve_peers"),
        "cluster.circuit_breaker": (
            settings.cluster.circuit_breaker,
            " ".join(type(settings.cluster.circuit_breaker).model_fields),
        ),
        "wedge_detector": (settings.wedge_detector, "window_ms sample_interval_ms cpu_only"),
        "logging": (settings.logging, "filename max_keep_files compression"),
        "llama_cpp": (settings.llama_cpp, "auto_update_interval_seconds"),
    }
    for name, (section, keys) in sections.items():
        fields = type(section).model_fields
        if getattr(section, "enabled", True):
            continue
        idle = [
            key
            for key in keys.split()
            if key != "enabled"
            and getattr(section, key) != fields[key].get_default(call_default_factory=True)
        ]
        if idle:
            named = ", ".join(f"{name}.{key}" for key in idle)
            yield f"without effect while {name}.enabled is false: {named}"


def _ports(settings: Settings, cookbook: Cookbook) -> Iterator[str]:
    own = {settings.listen_addr.port: "listen_addr"}
    if settings.cluster.enabled and settings.cluster.listen_addr is not None:
        own[settings.cluster.listen_addr.port] = "cluster.listen_addr"
    users: dict[int, list[Profile]] = {}
    for profile in cookbook.profiles:
        port = fixed_port(profile)
        if port is not None and profile.max_instances != 0:
            users.setdefault(port, []).append(profile)
    for port, profiles in sorted(users.items()):
        names = ", ".join(profile.key for profile in profiles)
        if port in own:
            yield f"{names}: --port {port} is the port of {own[port]}; leave --port out"
        if len(profiles) > 1:
            yield f"{names}: all have --port {port}, so only one of them can run at a time; leave --port out"
        for profile in profiles:
            most = profile.max_instances
            if most is None:
                most = settings.model_defaults.max_instances_per_model
            if most > 1:
                yield f"{profile.key}: --port {port} allows one instance, not {most}; leave --port out"
    ports = settings.llama_cpp_ports.all_ports()
    kept = sum(profile.min_instances for profile in cookbook.profiles)
    if ports is not None and len(ports) < kept:
        yield f"llama_cpp_ports has {len(ports)} ports for the {kept} instances that min_instances keeps"


def _names(cookbook: Cookbook, found: Sequence[Profile]) -> Iterator[str]:
    names = {profile.model.casefold(): f"the model {profile.model}" for profile in cookbook.profiles}
    names |= {alias.casefold(): f"the alias {alias} of {of}" for alias, of in cookbook.aliases.items()}
    listed = set(cookbook.profiles)
    for profile in found:
        if profile not in listed and (by := names.get(profile.model.casefold())) is not None:
            yield f"models_dir holds a model {profile.model} that {by} hides; rename one of them"
    with_default = {p.model.casefold() for p in cookbook.profiles if p.id.casefold() == DEFAULT_PROFILE}
    for model in dict.fromkeys(p.model for p in cookbook.profiles):
        if model.casefold() not in with_default:
            first = next(p for p in cookbook.profiles if p.model == model)
            yield f"{model} has no profile `{DEFAULT_PROFILE}`: clients have to ask for {first.key}"


def _instances(settings: Settings, cookbook: Cookbook) -> Iterator[str]:
    most = settings.model_defaults.max_instances_per_model
    for profile in cookbook.profiles:
        if profile.max_instances is None and most and profile.min_instances > most:
            yield (
                f"{profile.key}: min_instances {profile.min_instances} is above "
                f"model_defaults.max_instances_per_model ({most})"
            )
    kept = Counter({profile.key: profile.min_instances for profile in cookbook.profiles}).total()
    if kept > settings.max_instances_per_node:
        most = settings.max_instances_per_node
        yield f"min_instances keeps {kept} instances; max_instances_per_node is {most}"
