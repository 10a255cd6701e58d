"""`llamesh doctor`, and what a node says at its start: a GPU that the engine can't use, and what mends that.

Exit codes: 0 when nothing is wrong, 1 when something is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import trio

from llamesh.config.sections import LlamaCpp
from llamesh.core.backends import BACKENDS, choose_backend, gpus_unused, missing_for
from llamesh.local.asking import ask, devices_in
from llamesh.local.builds import machine
from llamesh.local.builds.failure import BuildFailed
from llamesh.local.builds.prebuilt import choose_pin
from llamesh.local.builds.record import build_behind
from llamesh.local.builds.tools import PACKAGES
from llamesh.local.launch import ASK_SECONDS, Engine, EngineNotFound, child_environment, find_engine

_FLAG = "--list-devices"

# Setting up a driver for the first time can take long.
_ASK_SECONDS = 20.0

_BETTER = {"nvidia": "cuda", "amd": "hip", "apple": "metal"}


async def unused_gpus(
    engine: Engine, environ: Mapping[str, str], seconds: float = _ASK_SECONDS
) -> tuple[str, ...]:
    """For each GPU that the engine can't use, a sentence with the command that mends it.

    Nothing is said where the engine doesn't list its devices within `seconds`.
    """
    there = await trio.to_thread.run_sync(machine.look, environ)
    if not there.gpus:
        return ()
    devices: tuple[str, ...] = ()
    if engine.origin != "embedded":
        if _FLAG not in engine.flags:
            return ()
        try:
            lines, answered = await ask(
                [*engine.command, _FLAG], child_environment(environ, api_key=""), seconds
            )
        except OSError:
            return ()
        if not answered:
            return ()
        devices = devices_in(lines)
    elif there.system == "Darwin":
        return ()  # its package is built with Metal
    which = "the embedded engine" if engine.origin == "embedded" else engine.command[0]
    return tuple(
        f"this machine has a GPU of {maker} that {which} can't use: {_mend(_BETTER[maker], environ)}"
        for maker in gpus_unused(there.gpus, devices)
    )


def _mend(backend: str, environ: Mapping[str, str]) -> str:
    there = machine.look(environ)
    can_build = backend in BACKENDS and not missing_for(backend, there) and not missing_tools(environ)
    if can_build:
        return f"llamesh build --backend {backend}"
    try:
        choose_pin(backend, there, os.uname().machine)
    except BuildFailed:
        return f"llamesh build --backend {backend} (it says what is missing)"
    return f"llamesh build --prebuilt --backend {backend}, which needs no compiler"


def missing_tools(environ: Mapping[str, str]) -> tuple[str, ...]:
    """What every build needs and isn't here, with what brings it."""
    path = environ.get("PATH", os.defpath)
    return tuple(
        f"{tool} is missing: {package}"
        for tool, package in PACKAGES.items()
        if not any(shutil.which(one, path=path) for one in ((tool, "ninja") if tool == "make" else (tool,)))
    )


@dataclass(frozen=True, slots=True)
class Remark:
    """One thing about the engine. `wrong`: it has to be mended."""

    text: str
    wrong: bool = False


async def examine(
    settings: LlamaCpp,
    environ: Mapping[str, str],
    *,
    ask_seconds: float = ASK_SECONDS,
    list_seconds: float = _ASK_SECONDS,
) -> list[Remark]:
    """How it stands with the engine. `ask_seconds`: for `--version` and `--help` each, `list_seconds`: for
    `--list-devices`.
    """
    there = await trio.to_thread.run_sync(machine.look, environ)
    remarks = [Remark(f"GPUs: {', '.join(sorted(there.gpus)) or 'none'}")]
    try:
        engine = await find_engine(
            settings.binary_path, environ=environ, ask_seconds=ask_seconds, will_be_built=settings.enabled
        )
    except EngineNotFound as error:
        remarks.append(Remark(f"engine: {error}", wrong=True))
    else:
        remarks.append(Remark(f"engine: {engine.origin}, version {engine.version}, {engine.command[0]}"))
        behind = build_behind(settings.binary_path)
        if behind is not None:
            remarks.append(Remark(f"built from {behind[0].source}, commit {behind[0].commit[:12]}"))
        if engine.always:
            words = f"it mixes up conversations in its prompt cache: run with {' '.join(engine.always)}"
            remarks.append(Remark(words))
        unused = await unused_gpus(engine, environ, list_seconds)
        remarks += [Remark(sentence, wrong=True) for sentence in unused]
    choice = choose_backend(there)
    remarks.append(Remark(f"building: {choice.backend} is the best that can be built here"))
    remarks += [Remark(note) for note in choice.notes]
    return remarks + [Remark(note, wrong=settings.enabled) for note in missing_tools(environ)]


def doctor(settings: LlamaCpp, environ: Mapping[str, str]) -> int:
    """Say how it stands with the engine, on stdout. The exit code."""
    remarks = trio.run(examine, settings, environ)
    for remark in remarks:
        sys.stdout.write(f"{remark.text}\n")
    return 1 if any(remark.wrong for remark in remarks) else 0
