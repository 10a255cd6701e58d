"""The whole answer of `llamesh check`, as a value: what each profile would be started with, and whether."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import trio

from llamesh.commands.check.judge import Candidate, Judgement, judge, warnings
from llamesh.commands.check.look import (
    Context,
    Weights,
    command_line,
    context_of,
    find_weights,
    in_shell,
    learned_values,
    size_of,
)
from llamesh.config.cookbook import Profile
from llamesh.config.settings import Settings
from llamesh.config.store import Files, Store
from llamesh.core.capacity import Budget
from llamesh.local.engine.refused import REFUSED
from llamesh.local.launch import BadArguments, Engine, EngineNotFound, find_engine
from llamesh.local.memory import Memory
from llamesh.local.sizing import Size
from llamesh.local.weights import find_cache
from llamesh.local.weights.folder import ModelsFolder

_FOLDER_SECONDS = 10.0

#: Stands for the engine in command lines where there is none.
NO_ENGINE = Engine(("llama-server",), "path", "unknown")

_BROKEN = ("missing", "unreadable", "damaged")


@dataclass(frozen=True, slots=True)
class Planned:
    """One profile. `command`: the words of its command line, secrets masked, empty where it has none;
    `problem`: why it can't be started as it is written, "" when it can."""

    profile: Profile
    weights: Weights
    context: Context
    size: Size | None
    command: tuple[str, ...]
    judgement: Judgement
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything. `budget`: what instances may take on this machine, and what is left of it at present.
    `errors` are what has to be mended, `warnings` what may surprise."""

    node_id: str
    engine: Engine | None
    budget: Budget
    profiles: tuple[Planned, ...]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON: sizes in MiB unless a name says bytes, contexts in tokens, null for what isn't known."""
        return {
            "node_id": self.node_id,
            "engine": None
            if self.engine is None
            else {
                "origin": self.engine.origin,
                "version": self.engine.version,
                "command": list(self.engine.command),
            },
            "budget": {
                "max_instances": self.budget.max_instances,
                "vram_mb": self.budget.vram,
                "vram_now_mb": self.budget.vram_now,
                "sysmem_mb": self.budget.sysmem,
                "sysmem_now_mb": self.budget.sysmem_now,
            },
            "profiles": [_document(planned) for planned in self.profiles],
            "errors": list(self.errors),
            "warnings": list(self.warnings),
        }


def _document(planned: Planned) -> dict[str, Any]:
    profile, weights, size = planned.profile, planned.weights, planned.size
    return {
        "key": profile.key,
        "name": profile.public_name,
        "kind": profile.kind,
        "source": {
            "state": weights.state,
            "name": weights.name,
            "path": weights.path,
            "size_bytes": weights.size,
            "problem": weights.problem or None,
        },
        "command": list(planned.command),
        "command_line": in_shell(planned.command),
        "context": {
            "asked": planned.context.asked,
            "used": planned.context.used,
            "trained": planned.context.trained,
            "reduced": planned.context.reduced,
        },
        "memory": None
        if size is None
        else {"vram_mb": size.need.vram, "sysmem_mb": size.need.sysmem, "from": size.source},
        "verdict": planned.judgement.verdict,
        "why": planned.judgement.why or None,
    }


async def make_plan(files: Files, environ: Mapping[str, str]) -> Plan:
    """Read the files, look at this machine, and decide. Raises ConfigError, with all that is wrong."""
    store = Store(files, environ)
    settings = store.current.settings
    found, errors = await _models_dir(store)
    cookbook = store.current.cookbook
    warned = warnings(settings, cookbook, found)
    engine: Engine | None = None
    try:
        wanted = settings.llama_cpp
        engine = await find_engine(wanted.binary_path, environ=environ, will_be_built=wanted.enabled)
    except EngineNotFound as error:
        errors.append(str(error))
    memory = Memory(store.current, engine or NO_ENGINE, learned_values(settings))
    await memory.sample([])
    cache = find_cache(environ)
    looked: list[Planned | None] = [None] * len(cookbook.profiles)

    async def look(index: int, profile: Profile) -> None:
        located, weights = await find_weights(profile, cache)
        size = await size_of(located, weights, memory)
        looked[index] = _planned(profile, located, weights, size, engine or NO_ENGINE, settings)

    async with trio.open_nursery() as nursery:
        for index, profile in enumerate(cookbook.profiles):
            nursery.start_soon(look, index, profile)
    planned = [one for one in looked if one is not None]
    budget = memory.budget()
    verdicts = judge([_candidate(one) for one in planned], replace(budget, vram_now=None, sysmem_now=None))
    planned = [replace(one, judgement=_verdict(one, verdicts[one.profile.key], engine)) for one in planned]
    for one in planned:
        complaints, remarks = _remarks(one, engine)
        # In a mesh, another node may have the file, or the room.
        (warned if settings.cluster.enabled and not one.problem else errors).extend(complaints)
        warned += remarks
    return Plan(settings.node_id, engine, budget, tuple(planned), tuple(errors), tuple(warned))


async def _models_dir(store: Store) -> tuple[tuple[Profile, ...], list[str]]:
    """Have the store know what is in models_dir; what was found there, and what is wrong with it."""
    folder = store.current.settings.models_dir
    if folder is None:
        return (), []
    if not folder.is_dir():
        return (), [f"models_dir {folder} isn't a folder"]
    with trio.move_on_after(_FOLDER_SECONDS):
        scan = ModelsFolder(store, folder).scan
        found = await trio.to_thread.run_sync(scan, abandon_on_cancel=True)
        store.publish_found(found)
        return found, []
    return (), [f"models_dir {folder} doesn't answer: is its disk away?"]


def _planned(
    profile: Profile,
    located: Profile,
    weights: Weights,
    size: Size | None,
    engine: Engine,
    settings: Settings,
) -> Planned:
    context = context_of(located, weights, size)
    command: tuple[str, ...] = ()
    problem = weights.problem
    try:
        ports = settings.llama_cpp_ports.all_ports() or ()
        command = command_line(located, weights, engine, size.context if size else None, ports)
    except BadArguments as error:
        problem = str(error)
    return Planned(
        profile, weights, context, size, command, Judgement("unknown"), problem if not command else ""
    )


def _candidate(planned: Planned) -> Candidate:
    size = planned.size
    usable = planned.weights.state not in _BROKEN and not planned.problem
    if size is None or not usable:
        return Candidate(planned.profile, None)
    return Candidate(planned.profile, size.need, size.cpu_only, size.too_large)


def _verdict(planned: Planned, judgement: Judgement, engine: Engine | None) -> Judgement:
    weights = planned.weights
    if judgement.verdict == "listed":
        return judgement
    if planned.problem:
        return Judgement("never", planned.problem)
    if weights.state in _BROKEN:
        return Judgement("missing", weights.problem)
    if engine is not None and engine.origin == "embedded":
        for flag, why in _refused_flags(planned.profile):
            return Judgement("never", f"the engine refuses {flag}: {why}")
    if weights.state == "download" and planned.size is None:
        return Judgement("download", "fetched at its first start; its size is known then")
    return judgement


def _remarks(planned: Planned, engine: Engine | None) -> tuple[list[str], list[str]]:
    """What has to be mended about a profile, and what is worth a warning."""
    key, verdict, context = planned.profile.key, planned.judgement.verdict, planned.context
    complaints, remarks = list[str](), list[str]()
    if verdict in ("never", "missing"):
        complaints.append(f"{key} can't start here: {planned.judgement.why}")
    if context.reduced:
        remarks.append(
            f"{key} gets a context of {context.used} tokens instead of {context.trained}: no more fits; "
            f"-c {context.used} says so in the cookbook"
        )
    if (asked := context.asked) and context.trained and asked > context.trained:
        remarks.append(
            f"{key}: -c {asked} is more than the {context.trained} tokens that the model is made for"
        )
    for flag in _unknown_flags(planned.profile, engine):
        remarks.append(f"{key}: {flag} isn't among the flags that this engine lists")
    return complaints, remarks


def _refused_flags(profile: Profile) -> list[tuple[str, str]]:
    """The flags that the embedded engine can't serve, and what to do instead."""
    words = [word.replace("_", "-") if word.startswith("--") else word for word in profile.arguments]
    return [(word, REFUSED[word]) for word in dict.fromkeys(words) if word in REFUSED]


def _unknown_flags(profile: Profile, engine: Engine | None) -> list[str]:
    if engine is None or not engine.flags:
        return []
    words = [word.replace("_", "-") for word in profile.arguments if word.startswith("--")]
    # A value may begin with two dashes as well, but none in use does.
    return [word for word in dict.fromkeys(words) if word not in engine.flags]
